"""PEFT's LORA inside experts, by target_parameters, made by peft and judged by it."""

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from tests.support.backbones import build
from tests.support.methods.case import Case, by_peft

MIXTRAL = "mixtral"
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def transposed() -> PreTrainedModel:
    """The same model, whose experts' parameters lie as [experts, in, out]."""
    model = build(MIXTRAL)
    for path, found in model.named_modules():
        if path.endswith(".experts"):
            module: Any = found
            for name in ("gate_up_proj", "down_proj"):
                setattr(module, name, nn.Parameter(getattr(module, name).detach().transpose(1, 2).contiguous()))
            module.is_transposed = True
    # the one written out in the class reads them the other way
    model.set_experts_implementation("batched_mm")
    return model


def both(family: str) -> LoraConfig:
    """Both parameters of all layers, at two ranks, and the attention beside them."""
    return LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        target_parameters=[DOWN, UP],
        rank_pattern={UP: 2},
        alpha_pattern={DOWN: 3},
    )


def one(family: str) -> LoraConfig:
    """What goes down, in one layer, and nothing else."""
    name = "layers.1.mlp.experts.down_proj"
    return LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=[], target_parameters=[name])


def attention(family: str) -> LoraConfig:
    """Nothing of it inside experts."""
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"])


CASES: Sequence[Case] = (
    by_peft("lora_experts", both, families=(MIXTRAL,)),
    by_peft("lora_experts_one", one, families=(MIXTRAL,)),
    by_peft("lora_beside_experts", attention, families=(MIXTRAL,)),
)
