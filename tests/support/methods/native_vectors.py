"""Weft's own formats that change biases, norms and the scales of sublayers: X_BITFIT, X_NORM and X_DIFFFIT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.backbones import build
from tests.support.methods.case import ALL, GPT2, Case, Oracle, WholePass
from tests.support.methods.native_files import (
    Config,
    Draw,
    Tensors,
    by_hand,
    drawing,
    edited,
    linears,
    norms,
    prefixed,
    read,
    write,
)
from tests.support.methods.native_hooks import AFTER, change_sublayer, layer_paths


def _bias_deltas(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
    """Every linear takes one, whether it has a bias or not, and every norm that has a bias."""
    tensors = {f"{linear.path}.bias_delta": draw(linear.weight.shape[0]) for linear in linears(model, head=True)}
    for path, _, bias in norms(model):
        if bias is not None:
            tensors[f"{path}.bias_delta"] = draw(len(bias))
    return tensors, {"mode": "delta"}


def _bias_values(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
    """All the biases that the model has, as a full fine-tuning of them would leave them."""
    named = dict(model.named_parameters())
    return {
        f"{n.removesuffix('.bias')}.bias_value": draw(*p.shape) for n, p in named.items() if n.endswith(".bias")
    }, {}


def change_biases(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """bias_delta is added, bias_value replaces."""
    by_path = {linear.path: linear for linear in linears(model, head=True)}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        if kind == "bias_value":
            module.bias.copy_(tensor)  # type: ignore[operator]
        elif kind == "bias_delta" and path in by_path:
            by_path[path].add_bias(tensor)
        elif kind == "bias_delta":
            module.bias.add_(tensor)  # type: ignore[operator]


def _norms(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    for path, weight, bias in norms(model):
        tensors[f"{path}.norm_weight"] = draw(len(weight), around=1.0)
        if bias is not None:
            tensors[f"{path}.norm_bias"] = draw(len(bias))
    return tensors, {"base_model_name_or_path": "tiny", "target_modules": ["norm"]}


def change_norms(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """norm_weight and norm_bias replace the module's own."""
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind in ("norm_weight", "norm_bias"):
            parameter = getattr(model.get_submodule(path), kind.removeprefix("norm_"))
            assert isinstance(parameter, Tensor)
            parameter.copy_(tensor)


def _difffit(whole_embedding: bool, wide: bool) -> Case:
    """γ of every sublayer, [d] or one number; norms, biases, and some or all rows of the embedding."""

    def make(family: str, folder: Path, seed: int) -> Path:
        model, draw = build(family), drawing(seed)
        width, path = model.config.hidden_size, _embedding_path(model)
        tensors = {**_norms(model, draw)[0], **_bias_deltas(model, draw)[0]}
        # a norm's bias is said once
        tensors = {name: t for name, t in tensors.items() if name.replace("bias_delta", "norm_bias") not in tensors}
        for layer in layer_paths(family, model):
            for name in ("gamma_attn", "gamma_mlp"):
                tensors[f"{layer}.{name}"] = draw(width if wide else 1, around=1.0)
        if whole_embedding:
            tensors[f"{path}.embed_rows"] = draw(model.config.vocab_size, width)
        else:
            tensors[f"{path}.embed_ids"] = torch.arange(5, 95, 4).int()
            tensors[f"{path}.embed_rows"] = draw(23, width)
        tied = {"tied": "shared"} if model.get_output_embeddings().weight is model.get_input_embeddings().weight else {}
        return write(folder, "X_DIFFFIT", prefixed(tensors), **tied)

    def oracle(family: str, folder: Path) -> Oracle:
        model = edited(family, folder, change_vectors)
        _, tensors = read(folder)
        for layer in layer_paths(family, model):
            for after, name in zip(AFTER, ("gamma_attn", "gamma_mlp"), strict=True):
                gamma = tensors[f"{layer}.{name}"]
                change_sublayer(family, model, layer, after, lambda h, x_res, ln_x, gamma=gamma: gamma * h)  # type: ignore[misc]
        return WholePass(model)

    return Case(f"difffit_{'all' if whole_embedding else 'some'}_rows", make, oracle, ALL)


def _embedding_path(model: PreTrainedModel) -> str:
    names = {module: name for name, module in model.named_modules()}
    return str(names[model.get_input_embeddings()])


def change_vectors(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """Everything of DiffFit but γ. The output embedding follows where it is the same parameter."""
    change_biases(model, config, tensors)
    change_norms(model, config, tensors)
    path, weight = _embedding_path(model), model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    rows, ids = tensors.get(f"{path}.embed_rows"), tensors.get(f"{path}.embed_ids")
    if rows is not None:
        weight[slice(None) if ids is None else ids.long()] = rows


CASES: Sequence[Case] = (
    by_hand("bitfit_delta", "X_BITFIT", _bias_deltas, change_biases),
    by_hand("bitfit_value", "X_BITFIT", _bias_values, change_biases, families=(GPT2,)),
    by_hand("norm", "X_NORM", _norms, change_norms),
    _difffit(whole_embedding=True, wide=True),
    _difffit(whole_embedding=False, wide=False),
)
