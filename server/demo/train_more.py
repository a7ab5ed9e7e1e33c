"""Trains one demonstration adapter for each further method that peft can train: how each is configured.

Run as ``python -m weft.server.demo.train_more [--only NAME ...]``; half a minute to two minutes per adapter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import (
    AdaLoraConfig,
    HRAConfig,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
)

from weft.server.demo import tasks
from weft.server.demo.train_adapters import ATTENTION, MLP, SEED, Recipe, train_adapter

CAUSAL = "CAUSAL_LM"
VIRTUAL_TOKENS = 8
BATCH_SIZE = 48
STEPS, STEPS_LONG = 500, 800


def recipes() -> dict[str, Recipe]:
    """The recipe of every adapter."""
    return {
        "reverse-dora": Recipe(
            LoraConfig(task_type=CAUSAL, r=4, lora_alpha=8, target_modules=ATTENTION, use_dora=True),
            5e-3,
            STEPS,
            BATCH_SIZE,
        ),
        "sort-adalora": Recipe(
            AdaLoraConfig(
                task_type=CAUSAL,
                init_r=8,
                target_r=4,
                lora_alpha=16,
                target_modules=ATTENTION + MLP,
                total_step=STEPS,
                tinit=100,
                tfinal=200,
                deltaT=10,
            ),
            1e-2,
            STEPS,
            BATCH_SIZE,
        ),
        "rotate-vera": Recipe(
            VeraConfig(task_type=CAUSAL, r=64, target_modules=ATTENTION + MLP, projection_prng_key=7),
            5e-2,
            STEPS_LONG,
            BATCH_SIZE,
        ),
        "swap-loha": Recipe(
            LoHaConfig(task_type=CAUSAL, r=4, alpha=8, target_modules=ATTENTION + MLP), 1e-2, STEPS, BATCH_SIZE
        ),
        "double-hra": Recipe(HRAConfig(task_type=CAUSAL, r=8, target_modules=ATTENTION + MLP), 1e-2, STEPS, BATCH_SIZE),
        "upper-norms": Recipe(
            LNTuningConfig(
                task_type=CAUSAL, target_modules=["input_layernorm", "post_attention_layernorm", "model.norm"]
            ),
            3e-2,
            STEPS_LONG,
            BATCH_SIZE,
        ),
        "skip-prompt": Recipe(
            PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=VIRTUAL_TOKENS), 5e-2, STEPS_LONG, BATCH_SIZE
        ),
        "atbash-prefix": Recipe(
            PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=VIRTUAL_TOKENS), 3e-2, STEPS_LONG, BATCH_SIZE
        ),
    }


def main() -> None:
    """Train all adapters of the table, or those named."""
    table = recipes()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, default=tasks.ASSETS_DIR / "backbone", help="backbone folder")
    parser.add_argument("--out", type=Path, default=tasks.ASSETS_DIR / "adapters", help="folder to write to")
    parser.add_argument("--only", nargs="+", choices=list(table), default=list(table), help="train just these")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the weights and the words")
    options = parser.parse_args()
    for name in options.only:
        adapter = tasks.DemoAdapter(name, name.partition("-")[0], "")
        train_adapter(adapter, table[name], options.backbone, options.out, options.seed)


if __name__ == "__main__":
    main()
