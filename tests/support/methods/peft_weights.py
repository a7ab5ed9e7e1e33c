"""PEFT's methods whose change of a weight is a formula of the whole weight, made by peft and judged by it."""

import peft

from tests.support.methods.case import GEMMA, LLAMA, Case, by_peft, noise
from tests.support.methods.peft_other import plain

# gpt2's one nn.Linear has 101 outputs, which form no pairs and no blocks
FAMILIES = (LLAMA, GEMMA)

CASES: tuple[Case, ...] = (
    by_peft("road", plain(peft.RoadConfig, group_size=16), noise(0.4, ["road_alpha"]), FAMILIES),
    by_peft("miss_bat", plain(peft.MissConfig, r=4, init_weights="bat"), families=FAMILIES),
)
