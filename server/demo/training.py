"""What both training scripts share: batches of worked examples, the answer loss, the one-cycle loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
REPORT_EVERY_STEPS = 50
WARMUP_SHARE = 0.2
GRADIENT_NORM_MAX = 1.0
ADAM_BETAS = (0.9, 0.98)

CONSOLE = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Example:
    """A prompt and the answer expected after it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids and the labels of the answer tokens; everything else is ignored."""

    input_ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """How long to train and how hard."""

    steps: int
    batch_size: int
    learning_rate_max: float
    weight_decay: float = 0.0


def encode_batch(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> Batch:
    """Pack the examples; right padding needs no mask, since no real token ever looks to its right."""
    prompts: list[list[int]] = tokenizer([example.prompt for example in examples])["input_ids"]
    answers: list[list[int]] = tokenizer([example.answer for example in examples], add_special_tokens=False)[
        "input_ids"
    ]
    width = max(len(left) + len(right) + 1 for left, right in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(examples), width), int(tokenizer.pad_token_id))
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, (left, right) in enumerate(zip(prompts, answers, strict=True)):
        ended = torch.tensor([*right, tokenizer.eos_token_id])
        stop = len(left) + len(ended)
        input_ids[row, : len(left)] = torch.tensor(left)
        input_ids[row, len(left) : stop] = ended
        labels[row, len(left) : stop] = ended
    return Batch(input_ids, labels)


def batches(tokenizer: PreTrainedTokenizerBase, examples: Iterator[Example], batch_size: int) -> Iterator[Batch]:
    """An endless stream of batches cut from an endless stream of examples."""
    while True:
        yield encode_batch(tokenizer, [next(examples) for _ in range(batch_size)])


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answer tokens, each predicted from the position before it.

    Logits that stand in front, those of a soft prompt, are no answer's.
    """
    logits = logits[:, -labels.shape[1] :]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: torch.nn.Module, stream: Iterable[Batch], schedule: Schedule, label: str) -> None:
    """Run the one-cycle schedule over the trainable parameters, with a progress line now and then."""
    parameters = _trainable(model)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=schedule.learning_rate_max,
        betas=ADAM_BETAS,
        weight_decay=schedule.weight_decay,
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate_max, total_steps=schedule.steps, pct_start=WARMUP_SHARE
    )
    started = time.monotonic()
    model.train()
    for step, batch in zip(range(1, schedule.steps + 1), stream, strict=False):
        loss = answer_loss(model(input_ids=batch.input_ids, use_cache=False).logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM_MAX)
        optimizer.step()
        cycle.step()
        if step % REPORT_EVERY_STEPS == 0 or step == schedule.steps:
            seconds = time.monotonic() - started
            CONSOLE.print(f"{label}: step {step}/{schedule.steps} loss {loss.item():.4f} {seconds:.0f} s")
    model.eval()
