"""Weft's own X_APT: prefixes of keys and values that each call opens and closes by gates on the attention's input."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tests.support.backbones import build
from tests.support.methods.case import ALL, Case, Oracle
from tests.support.methods.native_files import Tensors, drawing, read, write
from tests.support.methods.native_hooks import StepByStep, layer_paths

NAME = "written_out_with_a_prefix"
# of each attention, for the call that it is in
PREFIXES: dict[nn.Module, tuple[Tensor, Tensor]] = {}
ATTENTIONS = {"llama": "self_attn", "gpt2": "attn", "gemma3": "self_attn"}


def kv_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Heads of keys and values, and their size."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _case(count: int, bias: bool) -> Case:
    def make(family: str, folder: Path, seed: int) -> Path:
        model, draw = build(family), drawing(seed)
        (heads, size), layers = kv_sizes(model), len(layer_paths(family, model))
        tensors = {"prompt_embeddings": draw(count, 2 * layers * heads * size, scale=1.5)}
        for layer in range(layers):
            tensors[f"layers.{layer}.gate.weight"] = draw(count, model.config.hidden_size)
            tensors[f"layers.{layer}.lambda"] = draw(around=1.5)
            if bias:
                tensors[f"layers.{layer}.gate.bias"] = draw(count)
        return write(folder, "X_APT", tensors, gate_input="mean", gate_scope="per_call", applies_to="kv")

    def oracle(family: str, folder: Path) -> Oracle:
        model, (_, tensors) = build(family), read(folder)
        AttentionInterface.register(NAME, attend)
        model.config._attn_implementation = NAME
        for number, layer in enumerate(layer_paths(family, model)):
            _gate(model.get_submodule(f"{layer}.{ATTENTIONS[family]}"), number, tensors, kv_sizes(model))
        return StepByStep(model, shift=count)

    return Case(f"apt_{count}", make, oracle, ALL)


def _gate(attention: nn.Module, layer: int, tensors: Tensors, sizes: tuple[int, int]) -> None:
    """Before each call, put keys and values of the gated prefix, [1, heads, p, size], where ``attend`` finds them."""
    rows = tensors["prompt_embeddings"]
    # as PEFT sees them: [p, 2L, heads, size], keys and values of a layer side by side
    table = rows.view(len(rows), -1, *sizes)
    weight, strength = tensors[f"layers.{layer}.gate.weight"], tensors[f"layers.{layer}.lambda"]
    bias = tensors.get(f"layers.{layer}.gate.bias", torch.zeros(len(rows)))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        alpha = torch.sigmoid(x[0].double() @ weight.double().T + bias.double()).mean(dim=0)
        gated = (strength * alpha)[:, None, None, None] * table
        PREFIXES[module] = gated[:, 2 * layer].transpose(0, 1)[None], gated[:, 2 * layer + 1].transpose(0, 1)[None]

    attention.register_forward_pre_hook(before, with_kwargs=True)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **said: Any
) -> tuple[Tensor, None]:
    """softmax(q [P; K]ᵀ) [P; V] over everything before the query and, in local layers, within their window, in fp64."""
    prefix_key, prefix_value = PREFIXES[module]
    key = torch.cat([prefix_key, key.double()], dim=2)
    value = torch.cat([prefix_value, value.double()], dim=2)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = said.get("scaling") or query.shape[-1] ** -0.5
    scores = query.double() @ key.transpose(2, 3) * scaling
    last = key.shape[2]
    distance = torch.arange(last - query.shape[2], last)[:, None] - torch.arange(last)[None]
    hidden = distance < 0
    if said.get("sliding_window"):
        hidden = hidden | (distance >= said["sliding_window"])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).float(), None


CASES: Sequence[Case] = (_case(4, bias=True), _case(2, bias=False))
