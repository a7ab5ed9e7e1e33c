"""The parameterised hypercomplex maps of Compacter (``phm_layer``): x H + b with H = Σ kron(S_i, W_i), [in, out].

Tensors of a map: ``W_left`` [n, in/n, k] and ``W_right`` [n, k, out/n] whose products are the W_i, or ``W``
[n, in/n, out/n], and ``b`` [out]; S as ``phm_rule`` [n, n, n], or ``phm_rule_left`` [n, n, 1] and ``phm_rule_right``
[n, 1, n]. S (``shared_phm_rule``) and W (``shared_W_phm``, as ``W_down_left``, …) may be one for all layers, in the
model's ``shared_parameters.<adapter>.``. Neither H nor its layers are ever written out: the transposed terms are kept.
Source: ``adapters`` 1.3.0, ``methods/modeling.py``, ``PHMLayer`` and ``init_shared_parameters``.
"""

from dataclasses import dataclass, field

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.hub_common import Context, MemberSettings, Shelf
from weft.adapters_store.formats.phm_terms import kron_term, turned
from weft.adapters_store.parts import KronSum
from weft.adapters_store.tensor_refs import Computed, TensorRef

SERVES = (
    Served(
        "Compacter", "2106.04647", "bottleneck (kron)", "AdapterHub CompacterConfig", True, "a scale per channel; Gemma"
    ),
    Served(
        "Compacter++",
        "2106.04647",
        "bottleneck (kron)",
        "AdapterHub CompacterPlusPlusConfig",
        True,
        "a scale per channel; Gemma",
    ),
)

KIND, SHARED = "adapters", "shared_parameters"


@dataclass
class Phm:
    """The settings of one member's maps.

    n:     ``phm_dim``, the number of terms
    rank:  k, 0 where the W_i are in one piece
    """

    shelf: Shelf
    n: int
    rank: int
    shared_w: bool
    shared_rule: bool
    factored_rule: bool
    bias: bool
    settings: MemberSettings
    _shared: dict[str, TensorRef] = field(default_factory=dict)

    @classmethod
    def read(cls, settings: MemberSettings, context: Context) -> "Phm | None":
        """None where bottlenecks have plain matrices; what the maps are made of is then without effect."""
        there = settings.truth("phm_layer", False)
        factored = settings.truth("factorized_phm_W", True)
        said = cls(
            context.shelf,
            settings.integer("phm_dim") if there else 0,
            settings.integer("phm_rank") if there and factored else 0,
            settings.truth("shared_W_phm", False),
            settings.truth("shared_phm_rule", True),
            settings.truth("factorized_phm_rule", False),
            settings.truth("phm_bias", True),
            settings,
        )
        settings.ignore("phm_dim", "phm_rank")
        return said if there else None

    def map(self, module: str, place: str, which: str, wide: int, tall: int) -> tuple[KronSum, TensorRef | None]:
        """The map ``which`` (down or up) at a place of a module, from ``wide`` to ``tall`` features, and its bias."""
        n = self.n
        if wide % n or tall % n:
            self.settings.refuse_value("phm_dim", f"a divisor of {wide} and {tall}", n, f"the map {which} of {module}")
        rule = self._rule(module, place)
        weights = self._weights(module, place, which, wide // n, tall // n)
        terms = tuple(kron_term(Computed(rule[0].name, (n, n), turned(i), rule), weights, i) for i in range(n))
        bias = self.shelf.take(module, KIND, f"{place}.b", (tall,)) if self.bias else None
        return KronSum(terms), bias

    def _rule(self, module: str, place: str) -> tuple[TensorRef, ...]:
        n = self.n
        shapes = {"phm_rule": (n, n, n)}
        if self.factored_rule:
            shapes = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        if self.shared_rule:
            return tuple(self._common(role, shape) for role, shape in shapes.items())
        return tuple(self.shelf.take(module, KIND, f"{place}.{role}", shape) for role, shape in shapes.items())

    def _weights(self, module: str, place: str, which: str, wide: int, tall: int) -> tuple[TensorRef, ...]:
        n, rank = self.n, self.rank
        shapes = {"_left": (n, wide, rank), "_right": (n, rank, tall)} if rank else {"": (n, wide, tall)}
        if self.shared_w:
            return tuple(self._common(f"W_{which}{end}", shape) for end, shape in shapes.items())
        return tuple(self.shelf.take(module, KIND, f"{place}.W{end}", shape) for end, shape in shapes.items())

    def _common(self, role: str, shape: tuple[int, ...]) -> TensorRef:
        """A tensor of all layers, taken from the shelf once."""
        if role not in self._shared:
            self._shared[role] = self.shelf.take(self.shelf.base, SHARED, role, shape)
        found = self._shared[role]
        if found.shape != shape:
            self.settings.refuse_value("shared_W_phm", "one reduction_factor for all layers", True, f"{role} is shared")
        return found
