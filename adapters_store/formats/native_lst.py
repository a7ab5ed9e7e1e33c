"""Our own ``X_LST``: a ladder-side network, which reads the backbone's layers and speaks in its place.

    g_i = sigmoid(α_i / temperature)
    z ← g_i z + (1 − g_i) · (h_i Down_iᵀ + bias);  z ← block_i(z)        for each layer i, h_i its output
    at first z = x Firstᵀ + bias, x the first layer's input;  logits = head((norm(z) Upᵀ + bias) · d^-½)

Tensors, with d the backbone's width and r the setting ``reduction``: ``side.first_down.weight`` [d/r, d] and ``.bias``,
per layer ``side.down.<i>.weight`` [d/r, d] and ``.bias``, ``side.gate_alpha.<i>`` one number and ``side.block.<i>.*``,
``side.final_norm.*``, ``side.up.weight`` [d, d/r] and ``.bias``. A block is a decoder layer of the backbone's own class
and configuration whose widths of hidden states, of the MLP and of each head are r times smaller; its parameters, and
those of the norm, are named and lie as in such a layer. It attends to the tokens that the text's layer i attends to,
at the same positions. Settings: ``reduction``, ``gate_temperature``, ``layers``, numbers of the backbone's layers,
ascending; ``residual_after``, ``merge_last`` false; and those of ``native_common``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import DIALECT, read_common
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.tensors import require_kind, require_shape
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import SideNet
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SideInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "X_LST"

# settings of the method's own code that change what it computes, and why they are not served
UNSERVED = {
    "residual_after": "a side network reads what comes out of a layer, its residual stream included",
    "merge_last": "the head reads the side network alone, not its sum with the backbone",
    "side_config": "a side layer is the backbone's own, `reduction` times narrower",
}

SERVES = (
    Served(
        "Ladder-side tuning",
        "2206.06522",
        "side_network",
        "weft X_LST",
        survey=True,
        refuses="residual_after, merge_last, side layers of another kind",
    ),
)


@dataclass(frozen=True, slots=True)
class _Config:
    side: SideInfo
    layers: tuple[int, ...]
    temperature: float


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    for key, why in UNSERVED.items():
        settings.refuse(key, why)
    config = _config(settings, catalogue)
    settings.finish(METHOD)
    return ParsedAdapter(METHOD, DIALECT, {}, parts=(_net(config, _tensors(config, header)),))


def _config(settings: Settings, catalogue: CatalogueInfo) -> _Config:
    reduction, temperature = settings.integer("reduction", 2), settings.number("gate_temperature")
    if temperature == 0:
        raise expected("gate_temperature", "a number above 0", "0", "alphas are divided by it")
    sides = {side.reduction: side for side in catalogue.sides}
    if not sides:
        why = "its kind of layers cannot be built and proven at a smaller width"
        raise expected("peft_type", "a backbone that a side network can stand beside", catalogue.family, why)
    if reduction not in sides:
        wanted = f"one of {', '.join(map(str, sides))}, which divide this backbone's widths"
        raise expected("reduction", wanted, reduction)
    layers, count = settings.integers("layers"), len(catalogue.layers)
    if not layers or layers[-1] >= count or any(a >= b for a, b in pairwise(layers)):
        wanted = f"numbers of decoder layers from 0 to {count - 1}, ascending"
        raise expected("layers", wanted, show(None if layers is None else list(layers)))
    return _Config(sides[reduction], layers, temperature)


def _tensors(config: _Config, header: Header) -> dict[str, TensorRef]:
    """All tensors by the names below ``side.``, each there, and each of its shape."""
    narrow = config.side.features
    wide = narrow * config.side.reduction
    shapes = {"first_down.weight": (narrow, wide), "first_down.bias": (narrow,)}
    shapes |= {"up.weight": (wide, narrow), "up.bias": (wide,)}
    wanted: dict[str, tuple[int, ...]] = {**shapes, **{f"final_norm.{name}": shape for name, shape in config.side.norm}}
    for layer in config.layers:
        wanted |= {f"down.{layer}.weight": (narrow, wide), f"down.{layer}.bias": (narrow,), f"gate_alpha.{layer}": ()}
        wanted |= {f"block.{layer}.{name}": shape for name, shape in config.side.block}
    for name in header.tensors:
        if name.removeprefix("side.") not in wanted or not name.startswith("side."):
            raise expected(name, f"a tensor of {METHOD}: {_names(config)}", "another")
    for name, shape in wanted.items():
        tensor = header.tensors.get(f"side.{name}")
        if tensor is None:
            raise expected(f"side.{name}", "this tensor", "none", f"layers are {show(list(config.layers))}")
        require_kind(tensor)
        if shape:
            require_shape(tensor, shape, f"the backbone is {wide} wide, the side network {narrow}")
        elif tensor.elements != 1:
            raise expected(tensor.name, "one number", list(tensor.shape))
    return {name: header.tensors[f"side.{name}"] for name in wanted}


def _names(config: _Config) -> str:
    whole = "side.first_down, side.up, side.final_norm"
    numbers = ", ".join(map(str, config.layers))
    block = ", ".join(name for name, _ in config.side.block)
    return f"{whole}, or side.down, side.gate_alpha or side.block of layers {numbers}, whose blocks have {block}"


def _net(config: _Config, tensors: dict[str, TensorRef]) -> SideNet:
    side, layers = config.side, config.layers
    alphas = tuple(tensors[f"gate_alpha.{layer}"] for layer in layers)
    up = tensors["up.weight"], tensors["up.bias"]
    shrink = math.sqrt(up[0].shape[0])
    return SideNet(
        side.reduction,
        layers,
        Computed(alphas[0].name, (len(alphas),), _gates(config.temperature), alphas),
        (tensors["first_down.weight"], tensors["first_down.bias"]),
        (_over(up[0], shrink), _over(up[1], shrink)),
        tuple(tensors[f"final_norm.{name}"] for name, _ in side.norm),
        tuple(_down(config, layer, tensors) for layer in layers),
        tuple(tuple(tensors[f"block.{layer}.{name}"] for name, _ in side.block) for layer in layers),
    )


def _over(value: TensorRef, number: float) -> Computed:
    return Computed(value.name, value.shape, lambda t: t / number, (value,))


def _down(config: _Config, layer: int, tensors: dict[str, TensorRef]) -> tuple[Computed, Computed]:
    """A layer's map down with 1 − g folded in."""
    alpha, gates = tensors[f"gate_alpha.{layer}"], _gates(config.temperature)

    def closed(value: "Tensor", alpha: "Tensor") -> "Tensor":
        # 1 − sigmoid(x) = sigmoid(−x), without cancellation
        return value * gates(-alpha)

    weight, bias = (tensors[f"down.{layer}.{end}"] for end in ("weight", "bias"))
    return (
        Computed(weight.name, weight.shape, closed, (weight, alpha)),
        Computed(bias.name, bias.shape, closed, (bias, alpha)),
    )


def _gates(temperature: float) -> "Callable[..., Tensor]":
    def formula(*alphas: "Tensor") -> "Tensor":
        import torch

        return torch.sigmoid(torch.cat([alpha.flatten() for alpha in alphas]) / temperature)

    return formula
