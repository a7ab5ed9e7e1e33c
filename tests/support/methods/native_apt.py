"""X_APT whose gates read one token of a call, the first or the last, in the place of all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tests.support.backbones import build
from tests.support.methods.case import Case, Oracle
from tests.support.methods.native_files import Tensors, drawing, read, write
from tests.support.methods.native_hooks import StepByStep, layer_paths
from tests.support.methods.native_prefixes import ATTENTIONS, NAME, PREFIXES, attend, kv_sizes

COUNT = 3
TOKENS = {"first_token": 0, "last_token": -1}


def _case(gate_input: str) -> Case:
    def make(family: str, folder: Path, seed: int) -> Path:
        model, draw = build(family), drawing(seed)
        (heads, size), layers = kv_sizes(model), len(layer_paths(family, model))
        tensors = {"prompt_embeddings": draw(COUNT, 2 * layers * heads * size, scale=1.5)}
        for layer in range(layers):
            tensors[f"layers.{layer}.gate.weight"] = draw(COUNT, model.config.hidden_size, scale=1.0)
            tensors[f"layers.{layer}.lambda"] = draw(around=1.5)
        return write(folder, "X_APT", tensors, gate_input=gate_input, gate_scope="per_call", applies_to="kv")

    def oracle(family: str, folder: Path) -> Oracle:
        model, (config, tensors) = build(family), read(folder)
        AttentionInterface.register(NAME, attend)
        model.config._attn_implementation = NAME
        for number, layer in enumerate(layer_paths(family, model)):
            attention = model.get_submodule(f"{layer}.{ATTENTIONS[family]}")
            _gate(attention, number, TOKENS[config["gate_input"]], tensors, kv_sizes(model))
        return StepByStep(model, shift=COUNT)

    return Case(f"apt_{gate_input}", make, oracle)


def _gate(attention: nn.Module, layer: int, token: int, tensors: Tensors, sizes: tuple[int, int]) -> None:
    """Before each call, scale the prefix by what one of its tokens says."""
    table = tensors["prompt_embeddings"].view(COUNT, -1, *sizes)
    weight, strength = tensors[f"layers.{layer}.gate.weight"].double(), tensors[f"layers.{layer}.lambda"]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        alpha = torch.sigmoid(weight @ x[0, token].double())
        gated = (strength * alpha)[:, None, None, None] * table
        PREFIXES[module] = gated[:, 2 * layer].transpose(0, 1)[None], gated[:, 2 * layer + 1].transpose(0, 1)[None]

    attention.register_forward_pre_hook(before, with_kwargs=True)


CASES: Sequence[Case] = tuple(_case(gate_input) for gate_input in TOKENS)
