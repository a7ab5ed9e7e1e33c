"""Measures held-out exact match of the backbone and of every adapter, with plain transformers and peft.

Run as ``python -m weft.server.demo.evaluate [--count N]``; no code of the server takes part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from weft.server.demo import tasks
from weft.server.demo.training import CONSOLE

COUNT = 1000
SEED = 7
GENERATE_BATCH_SIZE = 250


def load_backbone(assets_dir: Path) -> PreTrainedModel:
    """A fresh backbone: peft changes the module tree, so every adapter gets its own."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(assets_dir / "backbone")
    model.train(False)
    return model


def load_tokenizer(assets_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left as batched generation wants it."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(assets_dir / "backbone", padding_side="left")
    return tokenizer


@torch.inference_mode()
def complete(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """The greedy completions of the prompts, in order."""
    answers: list[str] = []
    for start in range(0, len(prompts), GENERATE_BATCH_SIZE):
        batch = tokenizer(prompts[start : start + GENERATE_BATCH_SIZE], padding=True, return_tensors="pt")
        output = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=tasks.ANSWER_LENGTH_MAX + 1,
        )
        fresh = output[:, batch["input_ids"].shape[1] :]
        answers.extend(tokenizer.batch_decode(fresh, skip_special_tokens=True))
    return answers


def share_right(answers: list[str], expected: list[str]) -> float:
    """The share of answers that match exactly."""
    return sum(left == right for left, right in zip(answers, expected, strict=True)) / len(expected)


def backbone_table(assets_dir: Path, count: int, seed: int) -> Table:
    """For every task, how the backbone does with the tag and without it."""
    model, tokenizer = load_backbone(assets_dir), load_tokenizer(assets_dir)
    words = tasks.held_out_words(count, seed)
    untagged = complete(model, tokenizer, [tasks.prompt(word) for word in words])
    table = Table("task", "tagged", "untagged", title="backbone, no adapter")
    for name, task in tasks.TASKS.items():
        expected = [task(word) for word in words]
        tagged = complete(model, tokenizer, [tasks.tagged_prompt(name, word) for word in words])
        table.add_row(name, f"{share_right(tagged, expected):.1%}", f"{share_right(untagged, expected):.1%}")
    return table


def evaluate_adapter(assets_dir: Path, adapter: tasks.DemoAdapter, count: int, seed: int) -> float:
    """Held-out exact match of one adapter on untagged prompts."""
    tokenizer = load_tokenizer(assets_dir)
    model = PeftModel.from_pretrained(load_backbone(assets_dir), assets_dir / "adapters" / adapter.name).eval()
    pairs = tasks.held_out(adapter.task, count, seed)
    answers = complete(model, tokenizer, [prompt for prompt, _ in pairs])
    return share_right(answers, [answer for _, answer in pairs])


def adapter_table(assets_dir: Path, count: int, seed: int) -> Table:
    """How every shipped adapter that peft can load does on its task."""
    table = Table("adapter", "task", "method", "untagged", title="adapters")
    for adapter in (each for each in tasks.DEMO_ADAPTERS if each.peft):
        share = evaluate_adapter(assets_dir, adapter, count, seed)
        table.add_row(adapter.name, adapter.task, adapter.method, f"{share:.1%}")
    return table


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=tasks.ASSETS_DIR, help="folder with backbone/ and adapters/")
    parser.add_argument("--count", type=int, default=COUNT, help="held-out words per line of the table")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the held-out words")
    options = parser.parse_args()
    CONSOLE.print(backbone_table(options.assets, options.count, options.seed))
    CONSOLE.print(adapter_table(options.assets, options.count, options.seed))


if __name__ == "__main__":
    main()
