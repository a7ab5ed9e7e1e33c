"""AdapterHub's bottlenecks (``BnConfig``): Houlsby, Pfeiffer, parallel adapters, AdapterPlus, Compacter.

Tensors at ``<layer>.attention_adapters.adapters.<adapter>.`` where ``mh_adapter`` is set, and at ``output_adapters``
where ``output_adapter`` is: ``adapter_down.0.{weight,bias}`` ([r, d], [r]; number 1 behind a norm that ``ln_before``
puts there as number 0), ``adapter_up.{weight,bias}`` ([d, r], [d]), ``scaling`` [1] or [d] where it is learned,
``gate.{weight,bias}``; with ``phm_layer`` those of ``hub_phm``. r = ⌊d / reduction_factor⌋, at least 1.

Let x be the residual stream in front of a sublayer and h what the sublayer makes. Layers of decoders have no norm
behind the sublayer, so a sequential adapter computes A(u) + R, and then x is added where ``original_ln_after`` is set:

    u = h + x with ``original_ln_before``, else h
    R = u without ``residual_before_ln``, else h

which is x + h + A(u) when x is in one of the two and not in both, and is refused otherwise. A parallel adapter is
x + h + A(x). Source: ``adapters`` 1.3.0, ``methods/modeling.py``, classes ``Adapter`` and ``ParallelAdapter``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.hub_common import Context, Member, MemberSettings, times
from weft.adapters_store.formats.hub_phm import Phm
from weft.adapters_store.parts import ATTENTION, MLP, Bottleneck, KronSum, Matrix
from weft.adapters_store.sites import HiddenInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

BOTTLENECK, COMPACTER = "BOTTLENECK", "COMPACTER"
_REFUSES = "invertible adapters, norms behind the adapter, placements that drop or repeat the residual stream; Gemma"

SERVES = (
    Served("Houlsby adapter", "1902.00751", "bottleneck", "AdapterHub DoubleSeqBnConfig", True, _REFUSES),
    Served("Pfeiffer adapter", "2005.00247", "bottleneck", "AdapterHub SeqBnConfig", True, _REFUSES),
    Served("Parallel adapter", "2110.04366", "bottleneck", "AdapterHub ParBnConfig", True, _REFUSES),
    Served("AdapterPlus", "2406.06820", "bottleneck", "AdapterHub AdapterPlusConfig", False, _REFUSES),
)

KIND = "adapters"
# of torch's LayerNorm
EPSILON = 1e-5
TRAINING_ONLY = (
    "init_weights",
    "init_weights_seed",
    "dropout",
    "stochastic_depth",
    "phm_c_init",
    "phm_init_range",
    "learn_phm",
    "hypercomplex_nonlinearity",
    # without an invertible adapter it says nothing, and decoders have no cross-attention
    "inv_adapter_reduction_factor",
    "cross_adapter",
    # without a norm behind the adapter both ways are one
    "adapter_residual_before_ln",
)


@dataclass(frozen=True)
class _Config:
    """The settings of one member.

    places:   ``attention`` and ``mlp``, those that have one
    widths:   r, by layer
    scaling:  a number, ``learned`` or ``channel``
    """

    places: tuple[str, ...]
    left_out: frozenset[int]
    widths: list[int]
    act: str
    tap: str
    scaling: float | str
    norm: bool
    gated: bool
    phm: Phm | None


def read(settings: MemberSettings, context: Context) -> Member:
    """One bottleneck per place and layer."""
    if context.places.bottlenecks:
        raise expected("config", "a method of linears", "bottlenecks", context.places.bottlenecks)
    config = _config(settings, context)
    method = BOTTLENECK if config.phm is None else COMPACTER
    settings.finish(method)
    parts = tuple(
        _part(config, context, context.catalogue.hidden[context.catalogue.hidden_index[number, after]])
        for number, _ in context.layers(config.left_out)
        for after in config.places
    )
    return Member(method, parts=parts)


def _config(settings: MemberSettings, context: Context) -> _Config:
    for key in ("inv_adapter", "invertible_adapter"):
        settings.refuse(key, "invertible adapters change embeddings in a way that is none of weft's operators")
    settings.refuse("ln_after", "a norm behind the adapter is none of weft's operators")
    settings.ignore(*TRAINING_ONLY)
    flags = {ATTENTION: settings.truth("mh_adapter", False), MLP: settings.truth("output_adapter", False)}
    if not any(flags.values()):
        raise expected("config", "mh_adapter or output_adapter", "neither", "the adapter would do nothing")
    layers, width = context.catalogue.layers, context.catalogue.layers[0].features
    reductions = settings.number_by_layer("reduction_factor", len(layers))
    return _Config(
        tuple(after for after, there in flags.items() if there),
        settings.layers_left_out(),
        [max(1, int(width // reduction)) for reduction in reductions],
        settings.activation(),
        _tap(settings, context.places.hooked),
        settings.number_or("scaling", ("learned", "channel")),
        settings.truth("ln_before", False),
        settings.truth("use_gating", False),
        Phm.read(settings, context),
    )


def _tap(settings: MemberSettings, hooked: bool) -> str:
    """What the adapter reads, once it is sure that x + h + A comes out."""
    parallel, before = settings.truth("is_parallel", False), settings.truth("original_ln_before", False)
    after = settings.truth("original_ln_after", True)
    why = "decoder layers have no norm between, so it is x + h + A(…) only with other settings"
    if hooked and not after:
        settings.refuse_value("original_ln_after", "true", after, "AdapterHub's interface needs it for this family")
    apart = settings.choice("residual_before_ln", (True, False), True, why)
    if parallel:
        if not after:
            settings.refuse_value("original_ln_after", "true", after, "the residual stream would be dropped")
        return "x_res"
    inside, outside = before and not apart, after or hooked
    if inside and outside:
        settings.refuse_value("residual_before_ln", "true", apart, "the residual stream would be added twice")
    if not inside and not outside:
        settings.refuse_value("original_ln_after", "true", after, "the residual stream would be dropped")
    return "h+x_res" if before else "h"


def _part(config: _Config, context: Context, place: HiddenInfo) -> Bottleneck:
    layer, shelf = context.catalogue.layers[place.layer], context.shelf
    module = f"{layer.path}.{'attention' if place.after == ATTENTION else 'output'}_adapters"
    if config.tap not in place.taps:
        raise expected("config", f"a tap that {module} has ({', '.join(place.taps)})", config.tap)
    width, narrow = place.features, config.widths[place.layer]
    norm = None
    if config.norm:
        weight, bias = (shelf.take(module, KIND, f"adapter_down.0.{name}", (width,)) for name in ("weight", "bias"))
        norm = (weight, bias, EPSILON)
    first = f"adapter_down.{int(config.norm)}"
    down: Matrix | KronSum
    up: Matrix | KronSum
    down_bias: Value | None
    up_bias: Value | None
    if config.phm is not None:
        down, down_bias = config.phm.map(module, first, "down", width, narrow)
        up, up_bias = config.phm.map(module, "adapter_up", "up", narrow, width)
    else:
        why = f"reduction_factor makes {width} features {narrow}"
        down = Matrix(shelf.take(module, KIND, f"{first}.weight", (narrow, width), why))
        down_bias = shelf.take(module, KIND, f"{first}.bias", (narrow,), why)
        up = Matrix(shelf.take(module, KIND, "adapter_up.weight", (width, narrow), why))
        up_bias = shelf.take(module, KIND, "adapter_up.bias", (width,), why)
    up, up_bias = _scaled(up, up_bias, config.scaling, context, module, width)
    gate = shelf.gate(module, KIND, 1, width) if config.gated else None
    return Bottleneck(
        place.layer, place.after, config.tap, config.act, down, down_bias, up, up_bias, norm=norm, gate=gate
    )


def _scaled(
    up: Matrix | KronSum, bias: Value | None, scaling: float | str, context: Context, module: str, width: int
) -> tuple[Matrix | KronSum, Value | None]:
    """The scale of the output, in the second map and its bias."""
    change: Callable[[Value], Value]
    if isinstance(scaling, float):
        factor = scaling

        def change(value: Value) -> Value:
            return times(value, factor)
    else:
        elements = 1 if scaling == "learned" else width
        tensor = context.shelf.take(module, KIND, "scaling", (elements,), f"scaling is {scaling}")
        if isinstance(up, KronSum) and elements > 1:
            why = "a scale per channel has no Kronecker form"
            raise expected("config.scaling", "a number or learned beside phm_layer", scaling, why)

        def change(value: Value) -> Value:
            return _rows_times(value, tensor)

    changed = None if bias is None else change(bias)
    if isinstance(up, Matrix):
        return Matrix(change(up.weight)), changed
    return up.times(change), changed


def _rows_times(value: Value, scale: TensorRef) -> Computed:
    def formula(t: "Tensor", s: "Tensor") -> "Tensor":
        return t * s.view(-1, *([1] * (t.dim() - 1)))

    return Computed(value.name, value.shape, formula, (value, scale))
