"""GLoRA with matrix products, X_GLORA: both readings of what stands beside the weight."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from tests.support.methods.case import Case
from tests.support.methods.native_files import Config, Content, Draw, Tensors, by_hand, linears

RANKS = {"A": 2, "B": 3}


def _content(dialect: str) -> Content:
    """All five at every linear of the layers, D where there is a bias."""

    def content(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
        tensors: Tensors = {}
        for linear in linears(model):
            tall, wide = linear.weight.shape
            side = wide if dialect == "product" else tall
            for letter, (rows, columns) in {"A": (side, side), "B": (tall, wide)}.items():
                tensors[f"{linear.path}.glora_{letter}.Xd"] = draw(rows, RANKS[letter], scale=0.2)
                tensors[f"{linear.path}.glora_{letter}.Xu"] = draw(RANKS[letter], columns, scale=0.2)
            tensors[f"{linear.path}.glora_C.X"] = draw(wide)
            tensors[f"{linear.path}.glora_E.X"] = draw(tall)
            if linear.bias is not None:
                tensors[f"{linear.path}.glora_D.X"] = draw(tall)
        return tensors, {"dialect": dialect}

    return content


def change(model: PreTrainedModel, config: Config, tensors: Tensors) -> None:
    """The paper's equation, W + W A + B and W C + D ⊙ b + E + b, in fp64; or A W, as the survey lists it."""
    for linear in linears(model):
        own = {n.removeprefix(f"{linear.path}.glora_"): t.double() for n, t in tensors.items() if linear.path in n}
        weight = linear.weight.double()
        a, b = (own[f"{letter}.Xd"] @ own[f"{letter}.Xu"] for letter in "AB")
        beside = weight @ a if config["dialect"] == "product" else a @ weight
        extra = weight @ own["C.X"] + own["E.X"]
        if linear.bias is not None:
            extra += own["D.X"] * linear.bias.double()
        linear.weight.copy_(weight + beside + b)
        linear.add_bias(extra.float())


CASES: Sequence[Case] = tuple(
    by_hand(f"glora_{dialect}", "X_GLORA", _content(dialect), change) for dialect in ("product", "left_product")
)
