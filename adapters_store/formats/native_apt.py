"""Our own ``X_APT``: adaptive prefix tuning, prefixes of keys and values that a layer's input opens and closes.

    P_l ← λ_l · sigmoid(W_l x + b_l) ⊙ P_l

Tensor ``prompt_embeddings`` [p, 2·L·h·s] as PEFT's prefix tuning has it, K₀, V₀, K₁, V₁, … side by side, and per layer
``layers.<i>.gate.weight`` W [p, d], where wanted ``layers.<i>.gate.bias`` [p], and ``layers.<i>.lambda``, one number.
x is what the layer's attention is given; a call is the whole prompt, then each token alone. The text's positions begin
at p. Settings: ``gate_input``, of a call's tokens the ``first_token``, the ``last_token``, or the ``mean`` of what each
makes; ``gate_scope`` ``per_call``, ``applies_to`` ``kv``, and those of ``native_common``.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import DIALECT, read_common
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.tensors import require_kind, require_shape
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import GATE_INPUTS, Gate, KVPrefix
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, LayerInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "X_APT"

ROWS, GATE, GATE_BIAS, LAMBDA = "prompt_embeddings", "gate.weight", "gate.bias", "lambda"
# the one value of each setting that is served, and why others are not
CHOICES = {
    "gate_scope": ("per_call", "a gate that stays what the prompt made it is not served"),
    "applies_to": ("kv", "a gate acts on keys and values"),
}
_OF_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(gate\.weight|gate\.bias|lambda)")

SERVES = (
    Served(
        "Adaptive prefix tuning",
        "2305.15212",
        "kv_prefix, gate",
        "weft X_APT",
        survey=True,
        refuses="gate_input per_query, gate_scope other than per_call",
    ),
)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    gate_input = settings.text("gate_input", required=True)
    if gate_input not in GATE_INPUTS:
        why = "a gate is one of a call, not one of each of its tokens"
        raise expected("gate_input", f"one of {', '.join(GATE_INPUTS)}", show(gate_input), why)
    for key, (served, why) in CHOICES.items():
        said = settings.text(key, required=True)
        if said != served:
            raise expected(key, served, show(said), why)
    settings.finish(METHOD)
    tensors = _tensors(header, len(catalogue.layers))
    rows = tensors.get(ROWS)
    if rows is None:
        raise expected(ROWS, "this tensor", "none")
    sizes = [size for layer in catalogue.layers for size in _widths(layer)]
    if len(rows.shape) != 2 or rows.shape[1] != sum(sizes):
        why = f"keys and values of {len(catalogue.layers)} layers"
        raise expected(rows.name, f"shape [p, {sum(sizes)}]", list(rows.shape), why)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return ParsedAdapter(
        METHOD,
        DIALECT,
        {},
        parts=tuple(
            replace(_prefix(number, layer, rows, starts[2 * number], tensors), gate_input=gate_input)
            for number, layer in enumerate(catalogue.layers)
        ),
    )


def _tensors(header: Header, layers: int) -> dict[str, TensorRef]:
    for name, tensor in header.tensors.items():
        found = _OF_LAYER.fullmatch(name)
        if name != ROWS and found is None:
            wanted = f"{ROWS} or layers.<number>. with {GATE}, {GATE_BIAS} or {LAMBDA}"
            raise expected(name, f"a tensor of {METHOD}: {wanted}", "another")
        if found is not None and int(found[1]) >= layers:
            raise expected(name, f"a layer from 0 to {layers - 1}", found[1])
        require_kind(tensor)
    return header.tensors


def _widths(layer: LayerInfo) -> tuple[int, int]:
    """Of the keys and of the values of one layer."""
    return layer.kv_heads * layer.key_size, layer.kv_heads * layer.value_size


def _prefix(number: int, layer: LayerInfo, rows: TensorRef, start: int, tensors: dict[str, TensorRef]) -> KVPrefix:
    gate, bias, strength = (tensors.get(f"layers.{number}.{role}") for role in (GATE, GATE_BIAS, LAMBDA))
    if gate is None or strength is None:
        role = GATE if gate is None else LAMBDA
        raise expected(f"layers.{number}.{role}", "this tensor", "none", f"{layer.path} is layer {number}")
    if not layer.features:
        raise expected(gate.name, "a layer whose attention weft knows the input of", layer.attention)
    count = rows.shape[0]
    why = f"{count} prefix tokens, {layer.attention} takes {layer.features} features"
    require_shape(gate, (count, layer.features), why)
    if bias is not None:
        require_shape(bias, (count,), why)
    if strength.elements != 1:
        raise expected(strength.name, "one number", list(strength.shape))
    wide, tall = _widths(layer)
    keys, values = (
        Computed(rows.name, (count, size), _columns(first, size), (rows, strength))
        for first, size in ((start, wide), (start + wide, tall))
    )
    return KVPrefix(number, keys, values, shifts=True, gate=Gate(gate, bias), gate_per_token=True)


def _columns(start: int, size: int) -> "Callable[[Tensor, Tensor], Tensor]":
    """Some of all columns, times the layer's number."""

    def formula(rows: "Tensor", strength: "Tensor") -> "Tensor":
        return rows[:, start : start + size] * strength.reshape(())

    return formula
