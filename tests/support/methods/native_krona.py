"""Weft's own KronA at linears: X_KRONA."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.support.methods.case import Case
from tests.support.methods.native_files import Config, Content, Draw, Tensors, by_hand, linears

SCALE = 1.5


def _factors(terms: int, split: Callable[[int], int]) -> Content:
    """Factors A [a1, a2] and B [b1, b2] of every linear's [in, out]; ``terms`` of each, 0 for a pair alone."""

    def content(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
        tensors: Tensors = {}
        front = (terms,) if terms else ()
        for linear in linears(model):
            tall, wide = linear.weight.shape
            a1, a2 = split(wide), split(tall)
            tensors[f"{linear.path}.krona_A"] = draw(*front, a1, a2)
            tensors[f"{linear.path}.krona_B"] = draw(*front, wide // a1, tall // a2)
        return tensors, {"scale": SCALE}

    return content


def add_products(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """y + scale x (A ⊗ B), summed over terms."""
    for linear in linears(model):
        wide, tall = linear.weight.shape[1], linear.weight.shape[0]
        a, b = (tensors[f"{linear.path}.krona_{side}"] for side in "AB")
        pairs = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
        whole = sum((torch.kron(one, other).double() for one, other in pairs), torch.zeros(wide, tall).double())
        linear.weight.add_((config["scale"] * whole.T).float())


CASES: Sequence[Case] = (
    by_hand("krona", "X_KRONA", _factors(0, lambda size: 4), add_products),
    by_hand("krona_narrow", "X_KRONA", _factors(0, lambda size: size // 2), add_products),
    by_hand("krona_terms", "X_KRONA", _factors(3, lambda size: 8), add_products),
)
