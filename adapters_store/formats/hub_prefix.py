"""AdapterHub's ``PrefixTuningConfig``: keys and values of each layer, rotated by nobody, that every token attends to.

Tensors at the base model's ``prefix_tuning.prefix_tunings.<adapter>.self_prefix.``: ``control_trans`` [p·2L·h·s] with
``flat``, seen as [p, 2L, h·s], or ``wte.weight`` [p, d] and an MLP ``control_trans.{0,2}.{weight,bias}`` that makes
such rows of it, evaluated here once; K₀, V₀, K₁, V₁, … of the L layers that are not left out. The text's positions
begin at 0, unlike PEFT's. Gates of each layer at ``<attention>.prefix_tuning.prefix_gates.<adapter>.``: ``weight``
[1, d], or [2, d] without ``shared_gating``, keys first, on the attention's input. Source: ``adapters`` 1.3.0,
``methods/prefix_tuning.py``, with attention computed as ``eager``; with ``sdpa`` the library masks prefixes wrongly.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.hub_common import Context, Member, MemberSettings, piece_of
from weft.adapters_store.parts import Gate, KVPrefix
from weft.adapters_store.sites import LayerInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

PREFIX_TUNING = "PREFIX_TUNING"
NOTE = "prefixes as with the library's attn_implementation=eager: its sdpa masks them out, or shifts the causal mask"

SERVES = (
    Served(
        "Prefix tuning",
        "2101.00190",
        "kv_prefix",
        "AdapterHub PrefixTuningConfig",
        True,
        "families reached through the library's interface, and heads that are not hidden_size / heads wide",
    ),
)

TUNINGS, GATES = "prefix_tunings", "prefix_gates"
TRAINING_ONLY = ("init_weights_seed", "dropout", "encoder_prefix", "cross_prefix")


def read(settings: MemberSettings, context: Context) -> Member:
    """One prefix per layer."""
    if not context.places.prefixes:
        family = context.catalogue.family
        raise expected("config", "another method", "prefix tuning", f"AdapterHub has none for {family}")
    settings.ignore(*TRAINING_ONLY)
    layers = context.layers(settings.layers_left_out())
    count, flat = settings.integer("prefix_length"), settings.truth("flat", False)
    narrow, act = settings.integer("bottleneck_size"), settings.activation("tanh")
    gated, shared = settings.truth("use_gating", False), settings.truth("shared_gating", True)
    settings.finish(PREFIX_TUNING)
    if not layers:
        raise expected("config.leave_out", "a layer that is not left out", "none")
    tuning = _Tuning(context, count, len(layers), layers[0][1])
    parts = []
    for place, (number, layer) in enumerate(layers):
        rows = tuning.flat(place) if flat else tuning.made(place, narrow, act)
        keys, values = (Computed(rows.name, (count, tuning.width), _column(i), (rows,)) for i in range(2))
        parts.append(KVPrefix(number, keys, values, shifts=False, gate=_gate(context, layer, gated, shared)))
    return Member(PREFIX_TUNING, parts=tuple(parts), notes=(NOTE,))


class _Tuning:
    """The rows of all layers: ``count`` per layer, of ``width`` numbers for keys and as many for values."""

    def __init__(self, context: Context, count: int, layers: int, layer: LayerInfo) -> None:
        if layer.key_size != layer.value_size:
            raise expected("config", "another method", "prefix tuning", "keys and values have unequal sizes here")
        self.count, self.layers, self.width = count, layers, layer.kv_heads * layer.key_size
        self._features = layer.features
        self._why = f"{count} tokens, {layers} layers, {layer.kv_heads} heads of {layer.key_size}"
        self._context, self._taken = context, dict[str, TensorRef]()

    def flat(self, place: int) -> Computed:
        """Keys and values [count, 2, width] of the layer at this place, as they are stored."""
        count, layers, width = self.count, self.layers, self.width
        whole = self._take("control_trans", (count * layers * 2 * width,))

        def formula(t: "Tensor") -> "Tensor":
            return t.view(count, layers, 2, width)[:, place]

        return Computed(whole.name, (count, 2, width), formula, (whole,))

    def made(self, place: int, narrow: int, act: str) -> Computed:
        """The same as the MLP makes them; only this layer's rows of its last map are read."""
        features, wide, count, width = self._features, self.layers * 2 * self.width, self.count, self.width
        shapes = {
            "wte.weight": (count, features),
            "control_trans.0.weight": (narrow, features),
            "control_trans.0.bias": (narrow,),
            "control_trans.2.weight": (wide, narrow),
            "control_trans.2.bias": (wide,),
        }
        taken = [self._take(role, shape) for role, shape in shapes.items()]
        own = (2 * place * width, 2 * (place + 1) * width)
        sources = (*taken[:3], *(piece_of(tensor, *own) for tensor in taken[3:]))

        def formula(tokens: "Tensor", w1: "Tensor", b1: "Tensor", w2: "Tensor", b2: "Tensor") -> "Tensor":
            from weft.kernels.activation import NAMES, activate

            hidden = activate(tokens @ w1.T + b1, NAMES.index(act))
            return (hidden @ w2.T + b2).view(count, 2, width)

        return Computed(taken[3].name, (count, 2, width), formula, sources)

    def _take(self, role: str, shape: tuple[int, ...]) -> TensorRef:
        if role not in self._taken:
            shelf = self._context.shelf
            module = f"{shelf.base}.prefix_tuning"
            self._taken[role] = shelf.take(module, TUNINGS, f"self_prefix.{role}", shape, self._why)
        return self._taken[role]


def _column(i: int) -> "Callable[[Tensor], Tensor]":
    def formula(rows: "Tensor") -> "Tensor":
        return rows[:, i]

    return formula


def _gate(context: Context, layer: LayerInfo, gated: bool, shared: bool) -> Gate | None:
    if not gated:
        return None
    module = f"{layer.attention}.prefix_tuning"
    return context.shelf.gate(module, GATES, 1 if shared else 2, layer.features, role="")
