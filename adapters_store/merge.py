"""Several adapters as one: the members of a union, or those that one request names together. Imports no torch.

At a linear the members' operators apply one after the other, in the order in which they are named: a scale of the
output scales what members before it added, as in PEFT. What replaces something may stand once only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from weft.adapters_store.errors import AdapterInvalid, expected
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
    SiteOperators,
    Sparse,
)
from weft.adapters_store.parts import (
    Bottleneck,
    EmbeddingPair,
    KVPrefix,
    Matrix,
    NormOverride,
    Part,
    RowOverride,
    SoftPrompt,
    TokenMask,
)
from weft.adapters_store.plans import is_plain
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

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

    Members whose files were read must be of one file, or be ``joined`` first.
    """
    sites: dict[str, SiteOperators] = {}
    parts: dict[object, tuple[str, Part]] = {}
    for member in members:
        for path, said in member.parsed.sites.items():
            before = sites.get(path, SiteOperators(()))
            added = tuple(_weighted(operator, member) for operator in said.operators)
            folds = tuple(dict.fromkeys((*before.folds, *said.folds)))
            sites[path] = SiteOperators((*before.operators, *added), folds)
        for part in member.parsed.parts:
            _add_part(parts, _weighted_part(part, member), member.label)
    notes = tuple(f"{m.label}: {note}" for m in members for note in m.parsed.notes)
    copies = tuple(copy for m in members for copy in m.parsed.copies)
    first = members[0].parsed
    return ParsedAdapter(method, dialect, sites, copies, notes, first.weights, tuple(p for _, p in parts.values()))


def joined(members: Sequence[Member]) -> list[Member]:
    """The same members over one run of bytes: their files', one behind the other. Tensors are named by member."""
    data = bytearray()
    result = []
    for member in members:
        assert member.parsed.weights is not None, "members were read"
        moved = _moved(member.parsed, len(data), member.label)
        data += member.parsed.weights
        result.append(replace(member, parsed=moved))
    view = memoryview(data).toreadonly()
    return [replace(member, parsed=replace(member.parsed, weights=view)) for member in result]


def _moved(said: Any, by: int, label: str, seen: dict[int, Any] | None = None) -> Any:
    """A copy of what a parser said in which every tensor lies ``by`` bytes further on."""
    # a formula that several tensors share stays one
    known = {} if seen is None else seen
    if id(said) in known:
        return known[id(said)]
    result = said
    if isinstance(said, TensorRef):
        result = replace(said, name=f"{label}: {said.name}", start=said.start + by, stop=said.stop + by)
    elif is_dataclass(said) and not isinstance(said, type):
        changed = {f.name: _moved(getattr(said, f.name), by, label, known) for f in fields(said)}
        result = replace(said, **changed)
    elif isinstance(said, tuple):
        result = tuple(_moved(each, by, label, known) for each in said)
    elif isinstance(said, dict):
        result = {key: _moved(each, by, label, known) for key, each in said.items()}
    known[id(said)] = result
    return result


def _weighted(operator: Operator, member: Member) -> Operator:
    w = member.weight
    if w == 1.0:
        return operator
    match operator:
        case LowRank() | Kron() | Bias():
            return replace(operator, scale=operator.scale * w)
        case Sparse(_, values):
            return replace(operator, values=_times(values, w))
        case Rows(_, rows):
            return replace(operator, rows=_times(rows, w))
        case Columns(_, columns):
            return replace(operator, columns=_times(columns, w))
        case Dense(delta):
            return replace(operator, delta=_times(delta, w))
        case Scale():
            raise _needs_one(member, "it scales outputs")


def _weighted_part(part: Part, member: Member) -> Part:
    if member.weight == 1.0 or isinstance(part, TokenMask):
        return part
    if isinstance(part, EmbeddingPair):
        return replace(part, scale=part.scale * member.weight)
    if isinstance(part, Bottleneck) and isinstance(part.up, Matrix) and part.skip is None:
        bias = None if part.up_bias is None else _times(part.up_bias, member.weight)
        return replace(part, up=Matrix(_times(part.up.weight, member.weight)), up_bias=bias)
    raise _needs_one(member, f"a {type(part).__name__} has no weight")


def _needs_one(member: Member, why: str) -> AdapterInvalid:
    return expected(f"weight of {member.label}", "1", f"{member.weight:g}", why)


def _times(value: Value, weight: float) -> Computed:
    return Computed(value.name, value.shape, lambda t: t * weight, (value,))


def _add_part(parts: dict[object, tuple[str, Part]], part: Part, label: str) -> None:
    """Put a part in its place; what stands there already must be able to share it."""
    key = _place(part)
    if key not in parts:
        parts[key] = (label, part)
        return
    owner, there = parts[key]
    together = _together(there, part)
    if together is None:
        what = f"one {type(part).__name__} at {_name(part)}"
        raise expected(label, what, f"another beside that of {owner}", "the two cannot both apply")
    parts[key] = (f"{owner} and {label}", together)


def _place(part: Part) -> object:
    match part:
        case NormOverride(path, _, _):
            return (NormOverride, path)
        case Bottleneck() if is_plain(part):
            return (Bottleneck, part.layer, part.after)
        case Bottleneck():
            return (Bottleneck, part.layer, part.after, "whole")
        case KVPrefix():
            return (KVPrefix, part.layer)
        case _:
            return type(part)


def _name(part: Part) -> str:
    match part:
        case NormOverride(path, _, _):
            return path
        case Bottleneck():
            return f"layer {part.layer} {part.after}"
        case KVPrefix(layer, _, _, _, _, _):
            return f"layer {layer}"
        case _:
            return "the embedding"


def _together(there: Part, part: Part) -> Part | None:
    """Both as one part, or None where there is no such thing."""
    match there, part:
        case SoftPrompt(a), SoftPrompt(b):
            return SoftPrompt(_stacked(a, b))
        case KVPrefix(), KVPrefix() if there.gate is part.gate is None and there.shifts == part.shifts:
            return replace(there, keys=_stacked(there.keys, part.keys), values=_stacked(there.values, part.values))
        case Bottleneck(), Bottleneck() if (there.tap, there.act) == (part.tap, part.act) and is_plain(part):
            return _wider(there, part)
        case TokenMask(a), TokenMask(b) if a == b:
            return there
        case _:
            return None


def _stacked(a: Value, b: Value) -> Computed:
    def formula(first: "Tensor", second: "Tensor") -> "Tensor":
        import torch

        return torch.cat([first.flatten(1), second.flatten(1)]).view(-1, *a.shape[1:])

    return Computed(a.name, (a.shape[0] + b.shape[0], *a.shape[1:]), formula, (a, b))


def _wider(there: Bottleneck, part: Bottleneck) -> Bottleneck:
    """Two bottlenecks that read the same and bend alike, side by side."""
    assert isinstance(there.down, Matrix)
    assert isinstance(part.down, Matrix)
    assert isinstance(there.up, Matrix)
    assert isinstance(part.up, Matrix)
    a, b = there.up.weight, part.up.weight

    def beside(first: "Tensor", second: "Tensor") -> "Tensor":
        import torch

        return torch.cat([first, second], dim=1)

    up = Computed(a.name, (a.shape[0], a.shape[1] + b.shape[1]), beside, (a, b))
    down = _stacked(there.down.weight, part.down.weight)
    ranks = there.down.shape[0], part.down.shape[0]
    return replace(
        there,
        down=Matrix(down),
        up=Matrix(up),
        down_bias=_end_to_end(there.down_bias, part.down_bias, ranks),
        up_bias=_sum(there.up_bias, part.up_bias),
    )


def _end_to_end(a: Value | None, b: Value | None, ranks: tuple[int, int]) -> Value | None:
    if a is None and b is None:
        return None
    present = [value for value in (a, b) if value is not None]

    def formula(*found: "Tensor") -> "Tensor":
        import torch

        given = iter(found)
        parts = [torch.zeros(n) if v is None else next(given).flatten() for v, n in zip((a, b), ranks, strict=True)]
        return torch.cat(parts)

    return Computed(present[0].name, (sum(ranks),), formula, tuple(present))


def _sum(a: Value | None, b: Value | None) -> Value | None:
    if a is None or b is None:
        return b if a is None else a
    return Computed(a.name, (a.elements,), lambda x, y: x.flatten() + y.flatten(), (a, b))
