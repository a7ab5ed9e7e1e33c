"""Trains the demonstration adapters with peft: how each is configured, trained and saved.

Run as ``python -m weft.server.demo.train_adapters [--only NAME ...]``; about a minute per adapter. The
prompts carry no tag, so an adapter has to move the frozen backbone to its task on its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.server.demo import tasks
from weft.server.demo.training import Example, Schedule, batches, train

BACKBONE_NAME = "weft-demo"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# Far above every factor's size: peft then keeps both Kronecker factors whole instead of splitting them.
FULL_FACTORS_RANK = 1024

STEPS = 400
BATCH_SIZE = 128
SEED = 30
LORA_LEARNING_RATE_MAX = 5e-3
LOKR_LEARNING_RATE_MAX = 1e-2
IA3_LEARNING_RATE_MAX = 3e-2


@dataclass(frozen=True)
class Recipe:
    """How one adapter is built and trained."""

    config: PeftConfig
    learning_rate_max: float
    steps: int = STEPS
    batch_size: int = BATCH_SIZE


def _lora(rank: int, targets: list[str], *, rslora: bool = False) -> Recipe:
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=targets, use_rslora=rslora)
    return Recipe(config, LORA_LEARNING_RATE_MAX)


def _krona(targets: list[str], factor: int) -> Recipe:
    config = LoKrConfig(
        task_type="CAUSAL_LM",
        r=FULL_FACTORS_RANK,
        alpha=FULL_FACTORS_RANK,
        decompose_factor=factor,
        target_modules=targets,
    )
    return Recipe(config, LOKR_LEARNING_RATE_MAX)


def _ia3(steps: int = STEPS) -> Recipe:
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    return Recipe(config, IA3_LEARNING_RATE_MAX, steps)


def recipes() -> dict[str, Recipe]:
    """The recipe of every adapter; ranks, targets and factor shapes differ on purpose."""
    return {
        "reverse-lora-r2": _lora(2, ATTENTION),
        "swap-lora-r4": _lora(4, ["q_proj", "v_proj"]),
        "rotate-rslora-r8": _lora(8, ATTENTION, rslora=True),
        "skip-lora-r16": _lora(16, ATTENTION + MLP),
        "sort-krona": _krona(ATTENTION + MLP, -1),
        "devowel-krona": _krona(ATTENTION, -1),
        "double-krona": _krona(["q_proj", "v_proj", *MLP], 4),
        "dash-krona": _krona(ATTENTION + MLP, 16),
        "upper-ia3": _ia3(),
        "caesar-ia3": _ia3(),
        "atbash-ia3": _ia3(),
        "star-ia3": _ia3(),
    }


def untagged_examples(task: str, seed: int) -> Iterator[Example]:
    """Training words without a tag, for ever."""
    for word in tasks.words(seed, held_out=False):
        yield Example(tasks.prompt(word), tasks.TASKS[task](word))


def tidy(folder: Path) -> None:
    """Make the saved folder the same on every machine: no model card, neutral name, sorted lists."""
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["base_model_name_or_path"] = BACKBONE_NAME
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_adapter(adapter: tasks.DemoAdapter, recipe: Recipe, backbone: Path, out_dir: Path, seed: int) -> None:
    """Train one adapter on a fresh copy of the backbone and save it as an ordinary peft folder."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(backbone), recipe.config)
    schedule = Schedule(recipe.steps, recipe.batch_size, recipe.learning_rate_max)
    train(model, batches(tokenizer, untagged_examples(adapter.task, seed), recipe.batch_size), schedule, adapter.name)
    folder = out_dir / adapter.name
    model.save_pretrained(str(folder))
    tidy(folder)


def main() -> None:
    """Train all adapters of the table, or those named."""
    names = list(recipes())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, default=tasks.ASSETS_DIR / "backbone", help="backbone folder")
    parser.add_argument("--out", type=Path, default=tasks.ASSETS_DIR / "adapters", help="folder to write to")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="train just these")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the weights and the words")
    options = parser.parse_args()
    table = recipes()
    for adapter in tasks.DEMO_ADAPTERS:
        if adapter.name in options.only:
            train_adapter(adapter, table[adapter.name], options.backbone, options.out, options.seed)


if __name__ == "__main__":
    main()
