"""Real PEFT folders for tests: made by the `peft` library, filled with seeded noise so that none is near identity."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from peft import IA3Config, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.support.backbones import build
from tests.support.peft_saving import write

T = TypeVar("T")

LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
}
ATTENTION = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
SCALED = {"llama": (["k_proj", "v_proj"], ["down_proj"]), "gpt2": (["c_attn"], ["mlp.c_proj"])}


def _of(table: Mapping[str, T], family: str) -> T:
    return table.get(family, table["llama"])


def _lora(family: str) -> PeftConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=_of(LINEARS, family), task_type="CAUSAL_LM")


def _lora_patterns(family: str) -> PeftConfig:
    targets = _of(LINEARS, family)
    first = targets[0]
    return LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=targets, rank_pattern={first: 7}, alpha_pattern={first: 11}
    )


def _lora_some_layers(family: str) -> PeftConfig:
    return LoraConfig(r=2, lora_alpha=6, target_modules=_of(ATTENTION, family), layers_to_transform=[1])


def _lora_head(family: str) -> PeftConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=[*_of(ATTENTION, family), "lm_head"])


def _lokr_full(family: str) -> PeftConfig:
    # peft has no LoKr for Conv1D, so on gpt2 the one nn.Linear carries it
    targets = ["lm_head"] if family == "gpt2" else _of(LINEARS, family)
    return LoKrConfig(r=128, alpha=192, target_modules=targets)


def _lokr_factored(family: str) -> PeftConfig:
    targets = ["lm_head"] if family == "gpt2" else _of(ATTENTION, family)
    return LoKrConfig(r=2, alpha=3, target_modules=targets)


def _ia3(family: str) -> PeftConfig:
    outputs, inputs = _of(SCALED, family)
    return IA3Config(target_modules=[*outputs, *inputs], feedforward_modules=inputs)


def _ia3_input_of_one(family: str) -> PeftConfig:
    """Scales the input of one site of a fused group only."""
    target = "q_proj" if family != "gpt2" else "c_attn"
    return IA3Config(target_modules=[target], feedforward_modules=[target])


KINDS: dict[str, Callable[[str], PeftConfig]] = {
    "lora": _lora,
    "lora_patterns": _lora_patterns,
    "lora_some_layers": _lora_some_layers,
    "lora_head": _lora_head,
    "lokr_full": _lokr_full,
    "lokr_factored": _lokr_factored,
    "ia3": _ia3,
    "ia3_input_of_one": _ia3_input_of_one,
}


def make(kind: str, family: str, folder: Path, seed: int) -> Path:
    """Write an adapter of this kind for the family's tiny model and return its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about tied embeddings and corrects fan_in_fan_out aloud
        model = get_peft_model(build(family), KINDS[kind](family))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".ia3_l" in name:
                    parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
                elif ".lora_" in name or ".lokr_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        write(model, folder)
    return folder


def oracle(family: str, folder: Path | None) -> PreTrainedModel | PeftModel:
    """The family's tiny model with this adapter on it, by peft; the bare model without one."""
    model = build(family)
    if folder is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(folder)).eval()
