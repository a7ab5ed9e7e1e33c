"""Weft's own X_UNION: members of several formats, in all layers or in some, one after the other at a linear."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from tests.support.backbones import build
from tests.support.methods.case import ALL, Case, Oracle, WholePass
from tests.support.methods.native_deltas import change_entries, change_rows
from tests.support.methods.native_files import (
    PREFIX,
    Config,
    Draw,
    Edit,
    Tensors,
    drawing,
    linears,
    norms,
    read,
    write,
)
from tests.support.methods.native_hooks import StepByStep, change_sublayer, layer_paths
from tests.support.methods.native_places import bottleneck
from tests.support.methods.native_prefixes import ATTENTIONS, NAME, PREFIXES, attend, kv_sizes
from tests.support.methods.native_vectors import change_biases, change_norms

RANK, ALPHA, COUNT = 3, 6, 4
VALUES = {"llama": "v_proj", "gpt2": "c_attn", "gemma3": "v_proj"}
NATIVE = {"format_version": 1}


@dataclass(frozen=True)
class Place:
    """What a member's maker is told: the model, the decoder layers that it may touch, and where numbers come from."""

    family: str
    model: PreTrainedModel
    layers: Sequence[str]
    draw: Draw

    @property
    def width(self) -> int:
        """Of the residual stream."""
        width: int = self.model.config.hidden_size
        return width

    def linears(self, *ends: str) -> list[tuple[str, int, int]]:
        """Path, outputs and inputs of the linears in these layers: all, or those with these names."""
        found = [
            (each.path, *each.weight.shape)
            for each in linears(self.model)
            if each.path.startswith(tuple(f"{layer}." for layer in self.layers))
        ]
        return [row for row in found if not ends or row[0].endswith(ends)]


Made = tuple[dict[str, Any], Tensors]
Maker = Callable[[Place], Made]


def _lora(place: Place) -> Made:
    name = VALUES[place.family]
    tensors: Tensors = {}
    for path, tall, wide in place.linears(name):
        tensors[f"{path}.lora_A.weight"] = place.draw(RANK, wide)
        tensors[f"{path}.lora_B.weight"] = place.draw(tall, RANK)
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [name]}, tensors


def _ia3(place: Place) -> Made:
    name = VALUES[place.family]
    config = {"peft_type": "IA3", "target_modules": [name], "feedforward_modules": []}
    return config, {f"{path}.ia3_l": place.draw(tall, 1, around=1.0) for path, tall, _ in place.linears(name)}


def _bitfit(place: Place) -> Made:
    tensors = {f"{path}.bias_delta": place.draw(tall) for path, tall, _ in place.linears()}
    return {"peft_type": "X_BITFIT", **NATIVE}, tensors


def _norm(place: Place) -> Made:
    tensors = {f"{path}.norm_weight": place.draw(len(weight), around=1.0) for path, weight, _ in norms(place.model)}
    return {"peft_type": "X_NORM", **NATIVE}, tensors


def _sparse(place: Place) -> Made:
    tensors: Tensors = {}
    for path, tall, wide in place.linears():
        index = place.draw(tall * wide).argsort()[:50].sort().values.int()
        tensors |= {f"{path}.weight.sparse_indices": index, f"{path}.weight.sparse_values": place.draw(50)}
    return {"peft_type": "X_SPARSE", **NATIVE}, tensors


def _rows(place: Place) -> Made:
    tensors: Tensors = {}
    for path, tall, wide in place.linears():
        tensors[f"{path}.row_indices"] = place.draw(tall).argsort()[:5].int()
        tensors[f"{path}.rows_delta"] = place.draw(5, wide)
    return {"peft_type": "X_ROWS", "axis": "out", **NATIVE}, tensors


def _parallel(place: Place) -> Made:
    tensors: Tensors = {}
    for layer in place.layers:
        tensors |= {
            f"{layer}.mlp.down.weight": place.draw(RANK, place.width),
            f"{layer}.mlp.down.bias": place.draw(RANK),
        }
        tensors |= {f"{layer}.mlp.up.weight": place.draw(place.width, RANK)}
    return {"peft_type": "X_BOTTLENECK", "tap": "x_res", "act": "relu", "scale": 1.5, **NATIVE}, tensors


def _prefix(place: Place) -> Made:
    heads, size = kv_sizes(place.model)
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": COUNT,
        "num_transformer_submodules": 1,
        "num_layers": len(place.layers),
        "num_attention_heads": heads,
        "token_dim": heads * size,
    }
    return config, {"prompt_embeddings": place.draw(COUNT, 2 * len(place.layers) * heads * size, scale=1.5)}


def add_lora(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """W + alpha/r B A."""
    for linear in linears(model):
        if f"{linear.path}.lora_A.weight" in tensors:
            a, b = (tensors[f"{linear.path}.lora_{w}.weight"] for w in "AB")
            linear.weight.add_(config["lora_alpha"] / config["r"] * b @ a)


def scale_rows(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """Outputs times a vector, bias and what was added before included."""
    for linear in linears(model):
        if f"{linear.path}.ia3_l" in tensors:
            vector = tensors[f"{linear.path}.ia3_l"]
            linear.weight.mul_(vector)
            if linear.bias is not None:
                linear.bias.mul_(vector[:, 0])


EDITS: Mapping[str, Edit] = {
    "LORA": add_lora,
    "IA3": scale_rows,
    "X_BITFIT": change_biases,
    "X_NORM": change_norms,
    "X_SPARSE": change_entries,
    "X_ROWS": change_rows,
}


def hook_bottlenecks(family: str, model: PreTrainedModel, config: Config, tensors: Tensors, layers: list[str]) -> None:
    """The parallel adapters of these layers."""
    for layer in layers:
        own = {n.removeprefix(f"{layer}.mlp."): t for n, t in tensors.items() if n.startswith(f"{layer}.mlp.")}
        change_sublayer(family, model, layer, "mlp", bottleneck(config, own))


def hook_prefix(family: str, model: PreTrainedModel, config: Config, tensors: Tensors, layers: list[str]) -> None:
    """Prefixes of these layers; the others have one without tokens."""
    heads, size = kv_sizes(model)
    AttentionInterface.register(NAME, attend)
    model.config._attn_implementation = NAME
    seen = tensors["prompt_embeddings"].double().view(COUNT, -1, heads, size).permute(1, 2, 0, 3)[:, None]
    for layer in layer_paths(family, model):
        attention = model.get_submodule(f"{layer}.{ATTENTIONS[family]}")
        at = 2 * layers.index(layer) if layer in layers else None
        none = torch.zeros(1, heads, 0, size, dtype=torch.float64)
        PREFIXES[attention] = (none, none) if at is None else (seen[at], seen[at + 1])


def _case(name: str, *members: tuple[Maker, tuple[int, ...] | None]) -> Case:
    """members: who makes each, and the numbers of its layers; -1 is the last one."""

    def layers_of(family: str, model: PreTrainedModel, numbers: tuple[int, ...] | None) -> list[str]:
        paths = layer_paths(family, model)
        return paths if numbers is None else [paths[number] for number in numbers]

    def make(family: str, folder: Path, seed: int) -> Path:
        model, draw = build(family), drawing(seed)
        configs, tensors = [], {}
        for k, (maker, numbers) in enumerate(members):
            config, own = maker(Place(family, model, layers_of(family, model, numbers), draw))
            if numbers is not None:
                count = len(layer_paths(family, model))
                config["layers"] = [number % count for number in numbers]
            configs.append(config)
            for path, tensor in own.items():
                tensors[f"member.{k}.{'' if path == 'prompt_embeddings' else PREFIX}{path}"] = tensor
        return write(folder, "X_UNION", tensors, members=configs)

    def oracle(family: str, folder: Path) -> Oracle:
        model, (config, tensors) = build(family), read(folder)
        prefixed = False
        for k, said in enumerate(config["members"]):
            start = f"member.{k}."
            own = {n.removeprefix(start).removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(start)}
            layers = layers_of(family, model, said.get("layers"))
            with torch.no_grad():
                if said["peft_type"] in EDITS:
                    EDITS[said["peft_type"]](model, said, own)
                elif said["peft_type"] == "X_BOTTLENECK":
                    hook_bottlenecks(family, model, said, own, layers)
                else:
                    prefixed = True
                    hook_prefix(family, model, said, own, layers)
        return StepByStep(model, shift=COUNT) if prefixed else WholePass(model)

    return Case(f"union_{name}", make, oracle, ALL)


CASES: Sequence[Case] = (
    _case("mam", (_prefix, None), (_parallel, None)),
    _case("s4", (_parallel, (0, -1)), (_lora, (1,)), (_bitfit, (0, 1)), (_prefix, (1,))),
    _case("deltas", (_lora, None), (_sparse, None), (_rows, None), (_bitfit, None), (_norm, None)),
    _case("scaled_then_added", (_ia3, None), (_lora, None)),
    _case("added_then_scaled", (_lora, None), (_bitfit, None), (_ia3, None)),
)
