"""Adapters in weft's own formats, written by hand from seeded noise, and oracles: plain models changed by hand.

Nothing here reads what weft's parsers read: the walks over modules, the folds and the layouts are written again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.support.backbones import build
from tests.support.methods.case import ALL, Case, Oracle, WholePass

PREFIX = "base_model.model."
Tensors = dict[str, Tensor]
Draw = Callable[..., Tensor]
Config = Mapping[str, Any]


def write(folder: Path, peft_type: str, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    """Both files of an adapter; tensors under the names given, no setting that is ``...``."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": peft_type, "format_version": 1, **settings}
    config = {key: value for key, value in said.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, str(folder / "adapter_model.safetensors"))
    return folder


def read(folder: Path) -> tuple[Config, Tensors]:
    """What ``write`` wrote, without the prefix of the names."""
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def drawing(seed: int) -> Draw:
    """Normal values times a scale, the next ones at every call."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.4, around: float = 0.0) -> Tensor:
        return around + scale * torch.randn(shape, generator=random)

    return draw


def prefixed(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors under the names that files have."""
    return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Linear:
    """A linear of a plain model, whichever class it is of."""

    path: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """As [out, in], a view."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if there is one."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias

    def add_bias(self, delta: Tensor) -> None:
        """Add to the bias, or give the linear one."""
        if self.bias is None:
            self.module.bias = nn.Parameter(torch.zeros(self.weight.shape[0]))
        assert self.bias is not None
        self.bias.add_(delta)


def linears(model: nn.Module, head: bool = False) -> Iterator[Linear]:
    """Every linear of the decoder layers, and the output embedding where that is asked."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and (head or path != "lm_head"):
            yield Linear(path, module)


def norms(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Path, weight and bias of every norm that has a weight."""
    for path, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
            yield path, weight, bias


Edit = Callable[[PreTrainedModel, Config, Tensors], None]
Content = Callable[[PreTrainedModel, Draw], tuple[Tensors, dict[str, Any]]]


def edited(family: str, folder: Path, edit: Edit) -> PreTrainedModel:
    """A plain model that an edit has changed in place, as the adapter's files say."""
    model = build(family)
    with torch.no_grad():
        edit(model, *read(folder))
    return model


def by_hand(
    name: str, peft_type: str, content: Content, edit: Edit, families: tuple[str, ...] = ALL, extra: int = 0
) -> Case:
    """A case of one pass over a model that was edited.

    content:  tensors without the prefix of their names, and settings
    """

    def make(family: str, folder: Path, seed: int) -> Path:
        tensors, settings = content(build(family), drawing(seed))
        return write(folder, peft_type, prefixed(tensors), **settings)

    def oracle(family: str, folder: Path) -> Oracle:
        return WholePass(edited(family, folder, edit), extra)

    return Case(name, make, oracle, families)
