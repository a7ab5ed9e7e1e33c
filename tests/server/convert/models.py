"""Pairs of tiny models on disk: the base that tests build, and the same after some kind of fine-tuning."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from tests.support.backbones import build

# what a kind of fine-tuning does to a parameter; None leaves it
Change = Callable[[str, Tensor, Generator], Tensor | None]
# position embeddings, which no adapter changes
FIXED = ("wpe", "embed_positions")


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """A transformers folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def tuned(family: str, change: Change, seed: int = 1) -> PreTrainedModel:
    """The family's model with every parameter changed that ``change`` has something for."""
    model, random = build(family), Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            delta = None if any(part in name for part in FIXED) else change(name, parameter, random)
            if delta is not None:
                parameter.add_(delta)
    return model


def pair(family: str, change: Change, folder: Path, seed: int = 1) -> tuple[Path, Path, PreTrainedModel]:
    """(base folder, tuned folder, tuned model)."""
    model = tuned(family, change, seed)
    return save(build(family), folder / "base"), save(model, folder / "tuned"), model


def noise(parameter: Tensor, random: Generator) -> Tensor:
    """Noise of the parameter's shape."""
    return torch.randn(parameter.shape, generator=random)


def is_embedding(name: str) -> bool:
    """Whether a parameter is an input embedding."""
    return "embed_tokens" in name or "wte" in name


def few_entries(name: str, parameter: Tensor, random: Generator) -> Tensor | None:
    """DiffPruning: one entry of twenty, everywhere."""
    chosen = torch.rand(parameter.shape, generator=random) < 0.05
    return chosen * noise(parameter, random)


def few_rows(name: str, parameter: Tensor, random: Generator) -> Tensor | None:
    """FAR: three outputs of each linear."""
    if parameter.dim() != 2 or is_embedding(name):
        return None
    delta = torch.zeros_like(parameter)
    # a Conv1D stores [in, out]
    part = delta[:, 3:6] if "c_" in name else delta[3:6]
    part.copy_(noise(part, random))
    return delta


def few_columns(name: str, parameter: Tensor, random: Generator) -> Tensor | None:
    """Three inputs of each linear."""
    if parameter.dim() != 2 or is_embedding(name):
        return None
    delta = torch.zeros_like(parameter)
    part = delta[3:6] if "c_" in name else delta[:, 3:6]
    part.copy_(noise(part, random))
    return delta


def product(name: str, parameter: Tensor, random: Generator) -> Tensor | None:
    """A LoRA of rank 2, merged into the linears of every layer."""
    if parameter.dim() != 2 or is_embedding(name) or "lm_head" in name:
        return None
    tall, wide = parameter.shape
    return torch.randn(tall, 2, generator=random) @ torch.randn(2, wide, generator=random) * 0.3


def everything(name: str, parameter: Tensor, random: Generator) -> Tensor | None:
    """Full fine-tuning."""
    return noise(parameter, random) * 0.1


def vectors(name: str, parameter: Tensor, random: Generator) -> Tensor | None:
    """Biases and norms."""
    return noise(parameter, random) * 0.3 if parameter.dim() == 1 else None


def mixture(name: str, parameter: Tensor, random: Generator) -> Tensor | None:
    """A different kind for each of neighbouring parameters, so that no format says all of it."""
    kinds = (few_entries, few_rows, few_columns, product)
    if parameter.dim() == 1:
        return vectors(name, parameter, random)
    if is_embedding(name):
        return few_tokens(name, parameter, random)
    return kinds[len(name) % len(kinds)](name, parameter, random)


def few_tokens(name: str, parameter: Tensor, random: Generator) -> Tensor | None:
    """Two rows of the input embedding."""
    if not is_embedding(name):
        return None
    delta = torch.zeros_like(parameter)
    delta[5], delta[40] = noise(delta[5], random), noise(delta[40], random)
    return delta


def logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Of one unpadded request."""
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found.float()
