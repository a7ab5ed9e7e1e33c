"""Soft prompts and prefixes, made by peft and judged by it."""

import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from torch import Tensor

from tests.support.methods.case import Case, Oracle, by_peft, noise

TASK = "CAUSAL_LM"
TOKENS = 5


def _prompt_tuning(family: str) -> PeftConfig:
    return PromptTuningConfig(task_type=TASK, num_virtual_tokens=TOKENS)


def _p_tuning(family: str) -> PeftConfig:
    return PromptEncoderConfig(task_type=TASK, num_virtual_tokens=TOKENS, encoder_hidden_size=16)


def _cpt(family: str) -> PeftConfig:
    """May move far from the tokens that it begins with."""
    return CPTConfig(
        task_type=TASK,
        cpt_token_ids=[7, 8, 9],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3],
        opt_projection_epsilon=40.0,
        opt_projection_format_epsilon=40.0,
    )


def _multitask(family: str) -> PeftConfig:
    return MultitaskPromptTuningConfig(task_type=TASK, num_virtual_tokens=TOKENS, num_tasks=1, num_ranks=2)


def _prefix(family: str) -> PeftConfig:
    return PrefixTuningConfig(task_type=TASK, num_virtual_tokens=TOKENS)


def _prefix_by_mlp(family: str) -> PeftConfig:
    return PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16)


def _prefix_beyond_window(family: str) -> PeftConfig:
    """Longer than the window of the family's local layers, where it has such."""
    return PrefixTuningConfig(task_type=TASK, num_virtual_tokens=11)


def _cartridge(family: str) -> PeftConfig:
    return CartridgeConfig(task_type=TASK, num_virtual_tokens=TOKENS, num_frozen_tokens=1)


class _OneTask:
    """peft asks with every call which task it is about."""

    def __init__(self, oracle: Oracle):
        self.oracle = oracle
        get_prompt = oracle.model.get_prompt  # type: ignore[attr-defined]

        def of_the_first_task(batch_size: int, task_ids: Tensor | None = None) -> Tensor:
            prompt: Tensor = get_prompt(batch_size, torch.zeros(batch_size, dtype=torch.long))
            return prompt

        oracle.model.get_prompt = of_the_first_task  # type: ignore[attr-defined]

    def logits(self, prompt, tokens):
        return self.oracle.logits(prompt, tokens)


def _with_task(case: Case) -> Case:
    return Case(case.name, case.make, lambda family, folder: _OneTask(case.oracle(family, folder)), case.families)


WIDE = noise(1.0)
CASES: tuple[Case, ...] = (
    by_peft("prompt_tuning", _prompt_tuning, WIDE, extra=TOKENS),
    by_peft("p_tuning", _p_tuning, WIDE, extra=TOKENS),
    by_peft("cpt", _cpt, WIDE, extra=3),
    _with_task(by_peft("multitask_prompt_tuning", _multitask, WIDE, extra=TOKENS)),
    by_peft("prefix_tuning", _prefix, WIDE),
    by_peft("prefix_tuning_mlp", _prefix_by_mlp, WIDE),
    by_peft("prefix_tuning_beyond_window", _prefix_beyond_window, WIDE),
    by_peft("cartridge", _cartridge, WIDE),
)
