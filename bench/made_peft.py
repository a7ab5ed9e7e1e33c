"""What peft makes. Methods of whole weights change queries and values only: sixteen adapters have to fit.

Sizes are those that the methods' papers report as usual, at rank 16 where they name none.
"""

from functools import partial
from typing import Any

import peft
from peft.tuners.lora.config import BdLoraConfig

from weft.bench.made import Ground, Made, by_peft
from weft.bench.made_tensors import CAUSAL, RANK, VIRTUAL_TOKENS

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = LINEARS[:4]
PAIR = ["q_proj", "v_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
INVOCATION = (17, 4)
EVERY, DENSE = "r 16, all linears", "whole weights, queries and values"
TOKENS = f"{VIRTUAL_TOKENS} tokens"

_lora = partial(peft.LoraConfig, r=RANK, target_modules=LINEARS, task_type=CAUSAL)
_prompt: dict[str, Any] = {"num_virtual_tokens": VIRTUAL_TOKENS, "task_type": CAUSAL}


def _blocks(ground: Ground) -> peft.PeftConfig:
    rows, columns = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]
    return _lora(use_bdlora=BdLoraConfig(target_modules_bd_a=columns, target_modules_bd_b=rows, nblocks=2))


def _bank(ground: Ground) -> peft.PeftConfig:
    length = ground.divisor(256)
    return peft.VBLoRAConfig(vector_length=length, save_only_topk_weights=True, target_modules=LINEARS)


def _cpt(ground: Ground) -> peft.PeftConfig:
    ids = list(range(3, 3 + VIRTUAL_TOKENS))
    kinds = [1 + 4 * at // VIRTUAL_TOKENS for at in range(VIRTUAL_TOKENS)]
    return peft.CPTConfig(
        cpt_token_ids=ids, cpt_mask=[1] * VIRTUAL_TOKENS, cpt_tokens_type_mask=kinds, task_type=CAUSAL
    )


def _scaled(ground: Ground) -> peft.PeftConfig:
    return peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])


LOW_RANK = (
    by_peft("LoRA", EVERY, lambda _: _lora()),
    by_peft("DoRA", EVERY, lambda _: _lora(use_dora=True)),
    by_peft("BD-LoRA", f"{EVERY}, 2 blocks", _blocks),
    by_peft("aLoRA", EVERY, lambda _: _lora(alora_invocation_tokens=list(INVOCATION)), invokes=INVOCATION),
    by_peft("AdaLoRA", EVERY, lambda _: peft.AdaLoraConfig(init_r=RANK, target_modules=LINEARS, total_step=9)),
    by_peft("LoHa", "r 4, all linears", lambda _: peft.LoHaConfig(r=4, target_modules=LINEARS)),
    by_peft("VeRA", "r 64, all linears", lambda _: peft.VeraConfig(r=64, target_modules=LINEARS)),
    by_peft("PVeRA", "r 64, all linears", lambda _: peft.PveraConfig(r=64, target_modules=LINEARS)),
    by_peft("HRA", "r 8, attention", lambda _: peft.HRAConfig(r=8, target_modules=ATTENTION)),
    by_peft("DeLoRA", EVERY, lambda _: peft.DeloraConfig(r=RANK, target_modules=LINEARS)),
    by_peft("MiSS", EVERY, lambda _: peft.MissConfig(r=RANK, target_modules=LINEARS)),
    by_peft("GraLoRA", "r 16, 2 by 2, all linears", lambda _: peft.GraloraConfig(r=RANK, target_modules=LINEARS)),
    by_peft("DEFT, PaRa", "r 8, all linears", lambda _: peft.DeftConfig(r=8, target_modules=LINEARS)),
    by_peft("PEANuT", EVERY, lambda _: peft.PeanutConfig(r=RANK, target_modules=LINEARS)),
    by_peft("VB-LoRA", "r 4, 256 vectors, all linears", _bank),
    by_peft("Uni-LoRA", "r 4, 1024 numbers", lambda _: peft.UniLoraConfig(theta_d_length=1024, target_modules=LINEARS)),
    by_peft("TinyLoRA", "r 2, values", lambda _: peft.TinyLoraConfig(r=2, u=64, target_modules=["v_proj"])),
)

OF_WEIGHTS = (
    by_peft(
        "KronA", "full factors, all linears", lambda _: peft.LoKrConfig(r=4096, alpha=4096, target_modules=LINEARS)
    ),
    by_peft("LoKr", "r 8, all linears", lambda _: peft.LoKrConfig(r=8, target_modules=LINEARS)),
    by_peft("SHiRA", "r 8, all linears", lambda _: peft.ShiraConfig(r=8, target_modules=LINEARS)),
    by_peft(
        "Super-tuning, Supra",
        "0.5 % of the weights",
        lambda _: peft.SupertuningConfig(sparsity=0.995, target_modules=LINEARS),
    ),
    by_peft("RandLoRA", DENSE, lambda _: peft.RandLoraConfig(r=RANK, target_modules=PAIR)),
    by_peft("C3A", DENSE, lambda at: peft.C3AConfig(block_size=at.divisor(256), target_modules=PAIR)),
    by_peft("FourierFT", DENSE, lambda _: peft.FourierFTConfig(n_frequency=200, target_modules=PAIR)),
    by_peft("WaveFT", DENSE, lambda _: peft.WaveFTConfig(n_frequency=200, target_modules=PAIR)),
    by_peft("OFT", DENSE, lambda at: peft.OFTConfig(oft_block_size=at.divisor(32), target_modules=PAIR)),
    by_peft("BOFT", DENSE, lambda _: peft.BOFTConfig(boft_block_size=4, target_modules=PAIR)),
    by_peft("RoAd", DENSE, lambda at: peft.RoadConfig(group_size=at.divisor(64), target_modules=PAIR)),
    by_peft("HiRA", DENSE, lambda _: peft.HiraConfig(r=32, target_modules=PAIR)),
    by_peft("(IA)³", "keys, values, down", _scaled),
    by_peft("BEFT", "values", lambda _: peft.BeftConfig(target_modules=["v_proj"]), "BitFit"),
    by_peft("LN tuning", "all norms", lambda _: peft.LNTuningConfig(target_modules=NORMS, task_type=CAUSAL)),
)

IN_FRONT = (
    by_peft("Prompt tuning", TOKENS, lambda _: peft.PromptTuningConfig(**_prompt)),
    by_peft("P-tuning", TOKENS, lambda _: peft.PromptEncoderConfig(encoder_hidden_size=128, **_prompt)),
    by_peft("Multitask prompt tuning", TOKENS, lambda _: peft.MultitaskPromptTuningConfig(**_prompt)),
    by_peft("CPT", TOKENS, _cpt),
    by_peft("Prefix tuning", TOKENS, lambda _: peft.PrefixTuningConfig(**_prompt)),
    by_peft("Cartridges", "128 tokens", lambda _: peft.CartridgeConfig(num_virtual_tokens=128, task_type=CAUSAL)),
    by_peft(
        "Trainable tokens",
        "64 tokens",
        lambda _: peft.TrainableTokensConfig(token_indices=list(range(3, 67)), target_modules=["embed_tokens"]),
    ),
)

MADE: tuple[Made, ...] = (*LOW_RANK, *OF_WEIGHTS, *IN_FRONT)
