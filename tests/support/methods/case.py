"""What a method brings to the tests of the whole model: how to make an adapter, and who says what is right."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.support.backbones import build
from tests.support.peft_saving import write

LLAMA, GPT2, GEMMA = "llama", "gpt2", "gemma3"
ALL = (LLAMA, GPT2, GEMMA)

Fill = Callable[[str, Tensor, torch.Generator], Tensor | None]


class Oracle(Protocol):
    """Says which logits precede each of ``tokens`` when they follow the prompt: [len(tokens), vocabulary], fp32."""

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class Case:
    """One method, or one of its variants.

    families:  of ``tests.support.backbones`` that it is tried on: all three where the method applies
    make:      (family, folder, seed) writes an adapter far from identity and returns its folder
    oracle:    (family, folder) who knows what it computes
    invokes:   tokens that a prompt must have for the adapter to act at all
    """

    name: str
    make: Callable[[str, Path, int], Path]
    oracle: Callable[[str, Path], Oracle]
    families: tuple[str, ...] = ALL
    invokes: tuple[int, ...] = ()

    def prompt(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """A prompt that this adapter acts on, from its middle on where something must invoke it."""
        half = len(tokens) // 2
        return (*tokens[:half], *self.invokes, *tokens[half:])


@dataclass(frozen=True)
class WholePass:
    """An oracle that computes everything in one pass; ``extra`` rows of its answer stand before the text."""

    model: nn.Module
    extra: int = 0

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        start = self.extra + len(prompt) - 1
        return found[start : start + len(tokens)].float()


def noise(scale: float = 0.4, near_one: Sequence[str] = ()) -> Fill:
    """Fills every trainable parameter with noise, around 1 where its name contains one of ``near_one``."""

    def fill(name: str, value: Tensor, random: torch.Generator) -> Tensor:
        drawn = torch.randn(value.shape, generator=random) * scale
        return 1 + drawn if any(part in name for part in near_one) else drawn

    return fill


def by_peft(
    name: str,
    config: Callable[[str], PeftConfig],
    fill: Fill | None = None,
    families: tuple[str, ...] = ALL,
    extra: int = 0,
) -> Case:
    """A case whose adapter and oracle are peft's own.

    config:  per family
    fill:    (name, value, generator) → the new value of a trainable parameter, None to leave it; noise by default
    """
    change = fill or noise()

    def make(family: str, folder: Path, seed: int) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns about tied embeddings and corrects settings aloud
            model = get_peft_model(build(family), config(family))
            random = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        filled = change(parameter_name, parameter, random)
                        if filled is not None:
                            parameter.copy_(filled)
            write(model, folder)
        return folder

    def oracle(family: str, folder: Path) -> Oracle:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return WholePass(PeftModel.from_pretrained(build(family), str(folder)).eval(), extra)

    return Case(name, make, oracle, families)
