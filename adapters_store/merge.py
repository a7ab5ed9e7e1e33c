"""Several adapters as one: the members of a union, or those that one request names together. Imports no torch.

At a linear each member takes the linear with the members before it as its own: deltas add up, each computed from the
frozen weight; a scale of the output scales what members before it added, as in PEFT, and a scale of the input reaches
them too. What replaces something may stand once only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.merge_parts import Parts, needs_one, times
from weft.adapters_store.operators import (
    Bias,
    Columns,
    Dense,
    Kron,
    LowRank,
    Operator,
    ParsedAdapter,
    Rows,
    Scale,
    Shared,
    SiteOperators,
    Sparse,
)
from weft.adapters_store.rescale import fed, multiplied_out, pair_rank, scaled
from weft.adapters_store.tensor_refs import Computed, Value

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Member:
    """One adapter of several: what messages call it, and what its part is multiplied by."""

    label: str
    parsed: ParsedAdapter
    weight: float = 1.0


def merge(members: Sequence[Member], method: str, dialect: str) -> ParsedAdapter:
    """One adapter that computes what these compute together. AdapterInvalid where two cannot, with both labels.

    Members whose values are to be read must be over one run of bytes.
    """
    sites: dict[str, _Site] = {}
    parts = Parts()
    for member in members:
        for path, said in member.parsed.sites.items():
            sites.setdefault(path, _Site(path)).add(said, member)
        parts.add(member.parsed.parts, member.label, member.weight)
    return ParsedAdapter(
        method,
        dialect,
        {path: site.operators() for path, site in sites.items()},
        copies=tuple(copy for m in members for copy in m.parsed.copies),
        zeros=tuple(ref for m in members for ref in m.parsed.zeros),
        notes=tuple(f"{m.label}: {note}" for m in members for note in m.parsed.notes),
        weights=members[0].parsed.weights,
        parts=parts.all(),
    )


@dataclass
class _Site:
    """One linear, and what the members so far do to it.

    said:      operators in order
    behind:    deltas that a scale was multiplied into, which must not stand before it
    replacer:  who replaced something of the linear's weight
    """

    path: str
    said: list[Operator] = field(default_factory=list)
    behind: list[Operator] = field(default_factory=list)
    folds: dict[str, None] = field(default_factory=dict)
    replacer: str = ""

    def add(self, site: SiteOperators, member: Member) -> None:
        """The operators of one more member."""
        own: list[Operator] = []
        for said in site.operators:
            if isinstance(said, Dense | Rows) and said.replaces and self.replacer:
                wanted, got = f"one replacement of the weight of {self.path}", f"another beside that of {self.replacer}"
                raise expected(member.label, wanted, got, "one would undo the other")
            operator = _weighted(said, member, self.path)
            if isinstance(operator, Scale):
                self._under(operator)
            own.append(operator)
        if any(isinstance(operator, Dense | Rows) and operator.replaces for operator in own):
            self.replacer = member.label
        self.said += own + self.behind
        self.behind = []
        self.folds |= dict.fromkeys(site.folds)

    def operators(self) -> SiteOperators:
        """What came of it. Kernels take Kronecker terms of one grid: of several, smaller ones are multiplied out."""
        sizes: dict[tuple[int, int], int] = {}
        for operator in self.said:
            if isinstance(operator, Kron):
                sizes[_grid(operator)] = sizes.get(_grid(operator), 0) + pair_rank(operator)
        kept = max(sizes, key=lambda grid: sizes[grid], default=None)
        said = (multiplied_out(o) if isinstance(o, Kron) and _grid(o) != kept else o for o in self.said)
        return SiteOperators(tuple(said), tuple(self.folds))

    def _under(self, scale: Scale) -> None:
        """A member's scale of the linear and of what members before it added."""
        if scale.of_input:
            self.said = [fed(operator, scale.vector) for operator in self.said]
            self.behind = [fed(operator, scale.vector) for operator in self.behind]
            return
        apart = [operator for operator in self.said if not _folds(operator)]
        self.said = [operator for operator in self.said if _folds(operator)]
        self.behind = [scaled(operator, scale.vector, self.path) for operator in (*self.behind, *apart)]


def _weighted(operator: Operator, member: Member, path: str) -> Operator:
    """The operator at the linear ``path``, times the member's weight."""
    w = member.weight
    if w == 1.0:
        return operator
    match operator:
        case Bias(vector, scale, True):
            return _nearer(vector, scale, w, path)
        case LowRank() | Kron() | Bias():
            return replace(operator, scale=operator.scale * w)
        case Sparse(_, values):
            return replace(operator, values=times(values, w))
        case Rows(_, rows) if not operator.replaces:
            return replace(operator, rows=times(rows, w))
        case Columns(_, columns):
            return replace(operator, columns=times(columns, w))
        case Dense(delta) if not operator.replaces:
            return replace(operator, delta=times(delta, w))
        case Rows() | Dense():
            raise needs_one(member.label, w, f"it replaces the weight of {path}")
        case Shared(_, _, outer):
            return replace(operator, outer=times(outer, w))
        case Scale(_, of_input):
            raise needs_one(member.label, w, f"it scales the {'input' if of_input else 'output'} of {path}")


def _nearer(vector: Value, scale: float, weight: float, path: str) -> Bias:
    """A bias in the place of the linear's own, its difference from that times the weight."""

    def formula(new: "Tensor", old: "Tensor") -> "Tensor":
        return old + weight * (scale * new.reshape(-1) - old)

    nearer = Computed(vector.name, (vector.elements,), formula, (vector,), (f"{path}.bias",))
    return Bias(nearer, absolute=True)


def _folds(operator: Operator) -> bool:
    """Whether the fold multiplies a scale into an operator that stands before it."""
    return isinstance(operator, Bias | Scale) or (isinstance(operator, LowRank) and operator.gate is None)


def _grid(kron: Kron) -> tuple[int, int]:
    """How its outputs are folded; kernels take one way per linear."""
    return kron.w1.shape[0], kron.w2.shape[0]
