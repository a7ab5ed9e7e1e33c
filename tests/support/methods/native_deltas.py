"""Weft's own formats that change weights: X_SPARSE, X_ROWS and X_DENSE."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support.methods.case import GEMMA, GPT2, Case
from tests.support.methods.native_files import Config, Content, Draw, Tensors, by_hand, linears, norms

SPARSE_SHARE = 0.08


def parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Those that an adapter may change, as the model lists them: one that is tied comes once."""
    places = {linear.path for linear in linears(model, head=True)} | {path for path, _, _ in norms(model)}
    embedding = model.get_input_embeddings()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in places or parameter is embedding.weight:
            yield name, parameter


def is_tied(model: PreTrainedModel) -> bool:
    """Whether both embeddings have one weight."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _is_embedding(model: PreTrainedModel, name: str) -> bool:
    return model.get_submodule(name.rpartition(".")[0]) is model.get_input_embeddings()


def _drawn_index(draw: Draw, size: int) -> Tensor:
    order = draw(size).argsort()
    return order[: max(2, int(size * SPARSE_SHARE))].sort().values.int()


def _sparse(tied: str | None) -> Content:
    """Some entries of every parameter; with ``independent``, of an embedding that the output no longer shares."""

    def content(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
        tensors: Tensors = {}
        settings: dict[str, Any] = {"density": SPARSE_SHARE}
        for name, parameter in parameters(model):
            index = _drawn_index(draw, parameter.numel())
            tensors[f"{name}.sparse_indices"] = index
            tensors[f"{name}.sparse_values"] = draw(len(index))
            if _is_embedding(model, name):
                settings["embedding_rows"] = len((index // parameter.shape[1]).unique())
        if is_tied(model):
            settings["tied"] = tied
        return tensors, settings

    return content


def _replaced(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
    """One tensor of every kind whole, the embedding among them; entries of the rest of the first layer."""
    tensors: Tensors = {}
    shapes: set[tuple[int, ...]] = set()
    for name, parameter in parameters(model):
        embedding = _is_embedding(model, name)
        if embedding or (tuple(parameter.shape) not in shapes and "lm_head" not in name):
            tensors[f"{name}.abs"] = parameter.detach() + draw(*parameter.shape)
            shapes.add(tuple(parameter.shape))
        elif ".0." in name:
            index = _drawn_index(draw, parameter.numel()).long()
            tensors |= {f"{name}.sparse_indices": index, f"{name}.sparse_values": draw(len(index))}
    return tensors, {"tied": "shared"} if is_tied(model) else {}


def _untie(model: PreTrainedModel, config: Config) -> None:
    if config.get("tied") == "independent":
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())


def change_entries(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """sparse_values are added at sparse_indices of the flat parameter, abs replaces it."""
    _untie(model, config)
    named = dict(model.named_parameters())
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "abs":
            named[path].copy_(tensor)
        elif kind == "sparse_values":
            flat = named[path].view(-1)
            for place, value in zip(tensors[f"{path}.sparse_indices"].tolist(), tensor.tolist(), strict=True):
                flat[place] += value


def _dense(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
    tensors = {f"{name}.delta": draw(*parameter.shape, scale=0.1) for name, parameter in parameters(model)}
    return tensors, {"origin": "full fine-tuning", **({"tied": "shared"} if is_tied(model) else {})}


def change_whole(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """delta is added to the parameter."""
    named = dict(model.named_parameters())
    for name, tensor in tensors.items():
        named[name.removesuffix(".delta")].add_(tensor)


def _in_mlp(model: PreTrainedModel) -> Iterator[Any]:
    return (linear for linear in linears(model) if ".mlp." in linear.path)


def _rows(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    for linear in _in_mlp(model):
        tall, wide = linear.weight.shape
        index = draw(tall).argsort()[: tall // 4]
        tensors[f"{linear.path}.row_indices"] = index.int()
        tensors[f"{linear.path}.rows_delta"] = draw(len(index), wide)
        tensors[f"{linear.path}.bias_rows_delta"] = draw(len(index))
    return tensors, {"axis": "out"}


def _columns(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    for linear in linears(model):
        tall, wide = linear.weight.shape
        index = draw(wide).argsort()[: wide // 4]
        tensors[f"{linear.path}.col_indices"] = index
        tensors[f"{linear.path}.cols_delta"] = draw(tall, len(index))
    return tensors, {"axis": "in"}


def change_rows(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """Rows or columns of the weight, seen as [out, in], and entries of the bias, are added to."""
    by_path = {linear.path: linear for linear in linears(model)}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        linear = by_path[path]
        if kind == "rows_delta":
            linear.weight[tensors[f"{path}.row_indices"].long()] += tensor
        elif kind == "cols_delta":
            linear.weight[:, tensors[f"{path}.col_indices"]] += tensor
        elif kind == "bias_rows_delta":
            whole = torch.zeros(linear.weight.shape[0])
            whole[tensors[f"{path}.row_indices"].long()] = tensor
            linear.add_bias(whole)


CASES: Sequence[Case] = (
    by_hand("sparse", "X_SPARSE", _sparse("shared"), change_entries),
    by_hand("sparse_untied", "X_SPARSE", _sparse("independent"), change_entries, families=(GPT2, GEMMA)),
    by_hand("sparse_abs", "X_SPARSE", _replaced, change_entries),
    by_hand("rows", "X_ROWS", _rows, change_rows),
    by_hand("columns", "X_ROWS", _columns, change_rows),
    by_hand("dense", "X_DENSE", _dense, change_whole),
)
