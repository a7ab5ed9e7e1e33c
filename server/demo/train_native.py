"""Trains one demonstration adapter for each method that peft does not train (``methods``), in weft's own formats.

Run as ``python -m weft.server.demo.train_native [--only NAME ...]``; about a minute per adapter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from weft.server.demo import methods, tasks
from weft.server.demo.methods import Fisher, Method
from weft.server.demo.train_adapters import BACKBONE_NAME, SEED, untagged_examples
from weft.server.demo.training import Batch, Schedule, answer_loss, batches, train

BATCH_SIZE = 48
FISHER_BATCHES = 8


@dataclass(frozen=True)
class Recipe:
    """How one adapter is built and trained."""

    make: Callable[[LlamaForCausalLM, Fisher], Method]
    learning_rate_max: float
    steps: int = 500


RECIPES = {
    "reverse-houlsby": Recipe(methods.Houlsby, 1e-2),
    "sort-compacter": Recipe(methods.Compacter, 1e-2, 800),
    "caesar-bitfit": Recipe(methods.BitFit, 2e-2, 800),
    "dash-fishmask": Recipe(methods.FishMask, 1e-2),
    "devowel-far": Recipe(methods.Far, 1e-2),
    "star-difffit": Recipe(methods.DiffFit, 2e-2, 800),
}


def fisher_of(model: LlamaForCausalLM, stream: Iterator[Batch]) -> dict[str, Tensor]:
    """Squared gradients of the answer's loss, summed over a few batches, by parameter."""
    model.requires_grad_(True)
    found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for _, batch in zip(range(FISHER_BATCHES), stream, strict=False):
        model.zero_grad()
        answer_loss(model(input_ids=batch.input_ids, use_cache=False).logits, batch.labels).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] += parameter.grad.square()
    model.requires_grad_(False)
    return found


def train_native(name: str, recipe: Recipe, backbone: Path, out_dir: Path, seed: int) -> None:
    """Train one adapter on a fresh copy of the backbone and save it."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = LlamaForCausalLM.from_pretrained(backbone)
    stream = batches(tokenizer, untagged_examples(name.partition("-")[0], seed), BATCH_SIZE)
    method = recipe.make(model, fisher_of(model, stream))
    train(method, stream, Schedule(recipe.steps, BATCH_SIZE, recipe.learning_rate_max), name)
    folder = out_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format_version": 1, "base_model_name_or_path": BACKBONE_NAME, **method.settings()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(method.tensors(), folder / "adapter_model.safetensors", {"format": "pt"})


def main() -> None:
    """Train all adapters of the table, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, default=tasks.ASSETS_DIR / "backbone", help="backbone folder")
    parser.add_argument("--out", type=Path, default=tasks.ASSETS_DIR / "adapters", help="folder to write to")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="train just these")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the weights and the words")
    options = parser.parse_args()
    for name in options.only:
        train_native(name, RECIPES[name], options.backbone, options.out, options.seed)


if __name__ == "__main__":
    main()
