"""PEFT's LORA inside experts, by target_parameters, made by peft and judged by it."""

from collections.abc import Sequence

from peft import LoraConfig

from tests.support.methods.case import Case, by_peft

MIXTRAL = "mixtral"
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


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
