"""Weft's own X_SAID, dense and light, with and without a number per parameter."""

from collections.abc import Sequence
from math import ceil, log2, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.backbones import build
from tests.support.methods.case import ALL, Case, Oracle, WholePass
from tests.support.methods.native_deltas import is_tied, parameters
from tests.support.methods.native_files import Config, Tensors, drawing, edited, write

DIMENSIONS = 40


def _case(variant: str, strengths: bool) -> Case:
    def make(family: str, folder: Path, seed: int) -> Path:
        model, draw = build(family), drawing(seed)
        tensors = {"theta_d": draw(DIMENSIONS, scale=0.8)}
        names = []
        for name, parameter in parameters(model):
            names.append(name)
            # the sum of the sides, or their product
            count = sum(parameter.shape) if variant == "light_rank1" else parameter.numel()
            size = 2 ** ceil(log2(count))
            gaussian = draw(size, scale=1.0)
            tensors[f"proj.{name}.B"] = torch.where(draw(size) > 0, 1, -1).to(torch.int8)
            tensors[f"proj.{name}.Pi"] = draw(size).argsort().int()
            tensors[f"proj.{name}.G"] = gaussian
            tensors[f"proj.{name}.divisor"] = torch.sqrt(size * gaussian.square().sum())
        settings: dict[str, Any] = {"variant": variant, **({"tied": "shared"} if is_tied(model) else {})}
        if strengths:
            settings["order"] = names[::-1]
            tensors["lambda"] = draw(len(names), around=1.0)
        return write(folder, "X_SAID", tensors, **settings)

    def oracle(family: str, folder: Path) -> Oracle:
        return WholePass(edited(family, folder, change))

    return Case(f"said_{variant.split('_')[0]}{'_strengths' if strengths else ''}", make, oracle, ALL)


def _walsh_hadamard(x: Tensor) -> Tensor:
    """H x with H [1] = 1 and H [2n] = [[H, H], [H, -H]]."""
    if len(x) == 1:
        return x
    half = len(x) // 2
    left, right = _walsh_hadamard(x[:half]), _walsh_hadamard(x[half:])
    return torch.cat([left + right, left - right])


def ray(tensors: Tensors, name: str, count: int) -> Tensor:
    """H G Π H B θ, its first numbers, over divisor · √(count / N), in fp64."""
    signs, order, gaussian, divisor = (tensors[f"proj.{name}.{role}"].double() for role in ("B", "Pi", "G", "divisor"))
    theta = torch.zeros(len(signs), dtype=torch.float64)
    given = tensors["theta_d"][: len(signs)].double()
    theta[: len(given)] = given
    made = _walsh_hadamard(gaussian * _walsh_hadamard(signs * theta)[order.long()])
    return made[:count] / (divisor * sqrt(count / len(signs)))


def change(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """The parameters as t-few's light form and Aghajanyan's dense form make them."""
    for name, parameter in parameters(model):
        strength = tensors["lambda"][config["order"].index(name)].double() if "lambda" in tensors else 1.0
        if config["variant"] == "dense":
            delta = ray(tensors, name, parameter.numel()).view_as(parameter) * strength
        elif parameter.dim() == 2:
            made = ray(tensors, name, sum(parameter.shape))
            delta = torch.outer(strength * made[: len(parameter)], made[len(parameter) :])
        else:
            delta = ray(tensors, name, parameter.numel()) * strength
        parameter.add_(delta)


CASES: Sequence[Case] = (
    _case("light_rank1", strengths=True),
    _case("light_rank1", strengths=False),
    _case("dense", strengths=True),
)
