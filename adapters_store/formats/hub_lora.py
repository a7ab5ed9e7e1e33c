"""AdapterHub's ``LoRAConfig`` and what it makes of it: LoRA, gated LoRA, DoRA, VeRA, DVoRA; (IA)³ is in ``hub_ia3``.

Tensors at ``<linear>.loras.<adapter>.``: ``lora_A`` [r, in] and ``lora_B`` [out, r], or VeRA's ``vera_D`` [r, r] and
``vera_B`` [out, out] around an A and B that all linears share (``shared_parameters.<adapter>.``), whole matrices of
which only the diagonals begin unlike 0; ``m.weight`` [out, 1] with ``use_dora``; ``gate.{weight,bias}``:

    y = W x + b + g·B A x     g = alpha/r, or with ``use_gating`` the gate alone, mean of σ(w·x + c) over a call
    y = (m / ‖W + B A‖) ⊙ (W x + b + g·B A x)   DoRA: unlike in PEFT, rows are measured without g, and b is scaled

GPT-2's queries, keys and values are one linear: A of n of them are [n·r, in], B are [n·out/3, r], each with its own
gate, in the order q, k, v. Source: ``adapters`` 1.3.0, ``methods/lora.py``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats import hub_ia3
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.hub_common import Context, Member, MemberSettings, piece_of
from weft.adapters_store.formats.hub_linears import KIND, Place, places, read_places
from weft.adapters_store.operators import LowRank, Operator, Scale, SiteOperators
from weft.adapters_store.parts import Gate
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

LORA, DORA, VERA, DVORA = "LORA", "DORA", "VERA", "DVORA"
_NO_CONV1D = "the library computes it for plain linears only"

SERVES = (
    Served("LoRA", "2106.09685", "low_rank", "AdapterHub LoRAConfig", True, "MTL-LoRA"),
    Served("Gated LoRA", "2110.07577", "gated low_rank", "AdapterHub LoRAConfig, use_gating"),
    Served("DoRA", "2402.09353", "scale, low_rank", "AdapterHub DoRAConfig", True, "GPT-2: " + _NO_CONV1D),
    Served("VeRA", "2310.11454", "low_rank", "AdapterHub VeraConfig", False, "GPT-2's attention: " + _NO_CONV1D),
    Served("DVoRA", "2310.11454", "scale, low_rank", "AdapterHub DvoRAConfig", False, "GPT-2: " + _NO_CONV1D),
)

SHARED = "shared_parameters"
TRAINING_ONLY = ("init_weights", "init_weights_seed", "dropout", "dtype")


@dataclass(frozen=True, slots=True)
class _Config:
    """The settings that change the maths."""

    rank: int
    scale: float
    gated: bool
    dora: bool
    vera: bool

    @property
    def method(self) -> str:
        """Which of the four it is."""
        if self.vera:
            return DVORA if self.dora else VERA
        return DORA if self.dora else LORA


@dataclass(frozen=True, slots=True)
class _Pair:
    """A [r, in] and B [out, r], without any scale."""

    a: Value
    b: Value


def read(settings: MemberSettings, context: Context) -> Member:
    """One low-rank pair per linear, scaled as a whole with DoRA."""
    which = read_places(settings)
    mode = settings.choice("composition_mode", ("add", "scale"), "add")
    settings.ignore(*TRAINING_ONLY)
    if mode == "scale":
        return hub_ia3.read(settings, context, which)
    rank, alpha = settings.integer("r"), settings.number("alpha")
    gated, dora = settings.truth("use_gating", False), settings.truth("use_dora", False)
    # how far its diagonals were from 0 at first; that they are said makes it VeRA
    vera = [settings.is_number(key) for key in ("vera_d", "vera_b")]
    config = _Config(rank, alpha / rank, gated, dora, any(vera))
    settings.finish(config.method)
    shared: list[TensorRef] = []
    sites: dict[str, SiteOperators] = {}
    for place in places(context, which):
        if place.site.kind == "conv1d" and (dora or (config.vera and place.parts)):
            raise expected("config", f"a method that the library has for {place.site.path}", config.method, _NO_CONV1D)
        folds = ("the gate in the place of alpha/r",) if gated else ("alpha/r",)
        sites[place.site.path] = SiteOperators(tuple(_operators(context, place, config, shared)), folds)
    return Member(config.method, sites)


def _operators(context: Context, place: Place, config: _Config, shared: list[TensorRef]) -> Iterator[Operator]:
    scale = 1.0 if config.gated else config.scale
    if place.parts:
        yield from _fused(context, place, config, scale)
        return
    path, width = place.site.path, place.site.in_features
    pair = _vera(context, place, config.rank, shared) if config.vera else _pair(context, place, config.rank, 1)
    gate = context.shelf.gate(path, KIND, 1, width) if config.gated else None
    if config.dora:
        magnitude = context.shelf.take(path, KIND, "m.weight", (place.site.out_features, 1), "use_dora is true")
        lengths = _lengths(magnitude, pair, path)
        yield Scale(lengths, of_input=False)
        pair = _Pair(pair.a, Computed(pair.b.name, pair.b.shape, lambda c, b: c * b, (lengths, pair.b)))
    yield LowRank(pair.a, pair.b, scale, gate)


def _pair(context: Context, place: Place, rank: int, parts: int) -> _Pair:
    site, why = place.site, f"r is {rank}"
    tall = site.out_features // 3 * parts if place.parts else site.out_features
    a = context.shelf.take(site.path, KIND, "lora_A", (rank * parts, site.in_features), why)
    return _Pair(a, context.shelf.take(site.path, KIND, "lora_B", (tall, rank), why))


def _fused(context: Context, place: Place, config: _Config, scale: float) -> Iterator[LowRank]:
    """The pairs of a linear that is queries, keys and values: side by side, or apart where each has its gate."""
    site, rank, count = place.site, config.rank, len(place.parts)
    pair = _pair(context, place, rank, count)
    assert isinstance(pair.a, TensorRef)
    assert isinstance(pair.b, TensorRef)
    if not config.gated:
        shape = (site.out_features, rank * count)
        yield LowRank(pair.a, Computed(pair.b.name, shape, _side_by_side(place, rank), (pair.b,)), scale)
        return
    gate = context.shelf.gate(site.path, KIND, count, site.in_features)
    assert isinstance(gate.weight, TensorRef)
    assert isinstance(gate.bias, TensorRef)
    tall = site.out_features // 3
    for i, part in enumerate(place.parts):
        own = Gate(piece_of(gate.weight, i, i + 1), piece_of(gate.bias, i, i + 1))
        b = piece_of(pair.b, i * tall, (i + 1) * tall)
        raised = Computed(b.name, (site.out_features, rank), _at_rows(part * tall, site.out_features), (b,))
        yield LowRank(piece_of(pair.a, i * rank, (i + 1) * rank), raised, scale, own)


def _side_by_side(place: Place, rank: int) -> "Callable[[Tensor], Tensor]":
    tall, parts = place.site.out_features // 3, place.parts

    def formula(b: "Tensor") -> "Tensor":
        whole = b.new_zeros(3 * tall, rank * len(parts))
        for i, part in enumerate(parts):
            whole[part * tall : (part + 1) * tall, i * rank : (i + 1) * rank] = b[i * tall : (i + 1) * tall]
        return whole

    return formula


def _at_rows(start: int, rows: int) -> "Callable[[Tensor], Tensor]":
    def formula(b: "Tensor") -> "Tensor":
        whole = b.new_zeros(rows, b.shape[1])
        whole[start : start + b.shape[0]] = b
        return whole

    return formula


def _vera(context: Context, place: Place, rank: int, shared: list[TensorRef]) -> _Pair:
    """A' = D A and B' = B_v B; A and B are those of all linears.

    The library trains D and B_v whole, so the two products are each linear's own: unlike in PEFT nothing is left to
    share but what the file repeats.
    """
    site, shelf = place.site, context.shelf
    if not shared:
        why = "it is as large as the first linear of the adapter asks"
        shared.append(shelf.take(shelf.base, SHARED, "lora_A", (rank, site.in_features), why))
        shared.append(shelf.take(shelf.base, SHARED, "lora_B", (site.out_features, rank), why))
    a, b = shared
    if (a.shape[1], b.shape[0]) != (site.in_features, site.out_features):
        wanted = f"linears of one shape, [{b.shape[0]}, {a.shape[1]}]"
        got = f"{site.path} [{site.out_features}, {site.in_features}]"
        raise expected("config.attn_matrices", wanted, got, "VeRA's matrices are those of all of them")
    d = shelf.take(site.path, KIND, "vera_D", (rank, rank))
    outer = shelf.take(site.path, KIND, "vera_B", (site.out_features, site.out_features))
    return _Pair(
        Computed(d.name, a.shape, lambda left, right: left @ right, (d, a)),
        Computed(outer.name, b.shape, lambda left, right: left @ right, (outer, b)),
    )


def _lengths(magnitude: TensorRef, pair: _Pair, path: str) -> Computed:
    """m / ‖W + B A‖ by rows, [out, 1]."""

    def formula(m: "Tensor", a: "Tensor", b: "Tensor", weight: "Tensor") -> "Tensor":
        import torch

        lengths: Tensor = m / torch.linalg.vector_norm(weight + b @ a, dim=1, keepdim=True)
        return lengths

    return Computed(magnitude.name, magnitude.shape, formula, (magnitude, pair.a, pair.b), (f"{path}.weight",))
