"""Weft's own formats that change biases and norms: X_BITFIT and X_NORM."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tests.support.methods.case import GPT2, Case
from tests.support.methods.native_files import Config, Draw, Tensors, by_hand, linears, norms


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


CASES: Sequence[Case] = (
    by_hand("bitfit_delta", "X_BITFIT", _bias_deltas, change_biases),
    by_hand("bitfit_value", "X_BITFIT", _bias_values, change_biases, families=(GPT2,)),
    by_hand("norm", "X_NORM", _norms, change_norms),
)
