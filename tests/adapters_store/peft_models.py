"""Adapters as the `peft` library makes them, on tiny random models, beside the sites of these models."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.adapters_store.peft_lora_variants import NOT_POOLED, VARIANTS, pool, prune
from tests.support.backbones import COMMON
from tests.support.backbones import build as build_plain
from tests.support.catalogues import ModelSites, sites_of
from tests.support.peft_saving import write

__all__ = ["ModelSites", "sites_of"]


def build(family: str) -> PreTrainedModel:
    """A tiny model; ``llama_biased`` has biases on its attention and none on its norms."""
    if family != "llama_biased":
        return build_plain(family)
    torch.manual_seed(0)
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**COMMON, num_hidden_layers=2, attention_bias=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GPT2 = ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]

# what is served, by a name for the test: family, config
SERVED: Mapping[str, tuple[str, PeftConfig]] = {
    "lora": ("llama", LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")),
    "lora_all_linear": ("llama", LoraConfig(r=3, lora_alpha=7, target_modules="all-linear")),
    "lora_regex": ("llama", LoraConfig(r=3, target_modules=r".*layers\.[01]\.mlp\.(gate|up)_proj")),
    "lora_rank_1": ("llama", LoraConfig(r=1, lora_alpha=3, target_modules=["down_proj"])),
    "lora_rank_above_width": ("llama", LoraConfig(r=40, lora_alpha=3, target_modules=["q_proj"])),
    "lora_rslora": ("llama", LoraConfig(r=5, lora_alpha=8, use_rslora=True, target_modules=ATTENTION)),
    "lora_patterns": (
        "llama",
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=ATTENTION,
            rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 7, r"layers\.\d+\.self_attn\.v_proj": 3},
            alpha_pattern={"^model.layers.0.self_attn.k_proj": 5, "self_attn.k_proj": 9, "o_proj": 1},
        ),
    ),
    # the first pattern wins: both match layer 1
    "lora_pattern_order": (
        "llama",
        LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"layers.1.*": 2, "layers.1.self_attn.q_proj": 6}),
    ),
    "lora_layers": ("llama", LoraConfig(r=2, lora_alpha=6, target_modules=ATTENTION, layers_to_transform=[1])),
    "lora_layers_pattern": (
        "llama",
        LoraConfig(r=2, target_modules=ATTENTION, layers_to_transform=0, layers_pattern="layers"),
    ),
    "lora_excluded": (
        "llama",
        LoraConfig(r=2, target_modules=ATTENTION, exclude_modules=["layers.0.self_attn.q_proj", "k_proj"]),
    ),
    "lora_excluded_regex": (
        "llama",
        LoraConfig(r=2, target_modules=ATTENTION, exclude_modules=r".*\.0\..*"),
    ),
    "lora_full_path": ("llama", LoraConfig(r=2, target_modules=["model.layers.1.self_attn.v_proj"])),
    "lora_head": ("llama", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"])),
    "lora_gpt2": ("gpt2", LoraConfig(r=4, lora_alpha=8, target_modules=GPT2, fan_in_fan_out=True)),
    "lora_bias": ("gpt2", LoraConfig(r=4, lora_alpha=8, lora_bias=True, target_modules=["c_attn"])),
    "lora_bias_without_base_bias": ("llama", LoraConfig(r=4, lora_alpha=8, lora_bias=True, target_modules=["q_proj"])),
    "lora_only": ("gpt2", LoraConfig(r=4, bias="lora_only", target_modules=["c_attn", "mlp.c_fc"])),
    "lora_all_biases": ("llama_biased", LoraConfig(r=4, bias="all", target_modules=["q_proj", "down_proj"])),
    "lora_gaussian": ("llama", LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["q_proj"])),
    "lora_qwen3": ("qwen3", LoraConfig(r=4, target_modules="all-linear")),
    "lokr_low_rank_w2": ("llama", LoKrConfig(r=2, alpha=3, target_modules=ATTENTION)),
    "lokr_full": ("llama", LoKrConfig(r=64, alpha=96, target_modules="all-linear")),
    "lokr_both": ("llama", LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=[*ATTENTION, "up_proj"])),
    "lokr_factor": ("llama", LoKrConfig(r=3, alpha=2, decompose_factor=2, target_modules=ATTENTION)),
    # w1 is one number, so the low-rank w2 takes fewer bytes as a pair
    "lokr_as_low_rank": ("llama", LoKrConfig(r=2, alpha=3, decompose_factor=1, target_modules=["q_proj", "down_proj"])),
    "lokr_patterns": (
        "llama",
        LoKrConfig(
            r=2, alpha=3, target_modules=ATTENTION, rank_pattern={"q_proj": 3}, alpha_pattern={"1.self_attn.v_proj": 8}
        ),
    ),
    "ia3": ("llama", IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3_square": ("llama", IA3Config(target_modules=["q_proj", "o_proj"], feedforward_modules=["o_proj"])),
    # PEFT matches feedforward names as plain endings
    "ia3_ending": ("llama", IA3Config(target_modules=r".*\.(gate|up)_proj", feedforward_modules=["p_proj"])),
    "ia3_regex": ("llama", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=r".*down.*")),
    "ia3_gpt2": ("gpt2", IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3_default": ("llama", IA3Config()),
    **VARIANTS,
}


def adapt(family: str, config: PeftConfig, seed: int = 0) -> PeftModel:
    """A model of the family with this adapter, filled with noise so that no factor is near its initial value."""
    with warnings.catch_warnings():
        # about biases that merging cannot keep, and fan_in_fan_out that is corrected
        warnings.simplefilter("ignore")
        model = get_peft_model(build(family), copy.deepcopy(config)).eval()
    if isinstance(config, LoraConfig) and config.use_qalora and config.qalora_group_size != NOT_POOLED:
        pool(model, config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if ".ia3_l" in name or "lora_magnitude" in name:
                parameter.copy_(1 + 0.5 * noise)
            elif "lora_" in name or "lokr_" in name:
                parameter.copy_(0.4 * noise)
            elif name.endswith(".bias") and getattr(config, "bias", "none") != "none" and parameter.requires_grad:
                parameter.copy_(parameter + 0.4 * noise)
    if isinstance(config, AdaLoraConfig) and config.rank_pattern is not None:
        prune(model)
    return model


def save(model: PeftModel, folder: Path) -> Path:
    """Write the adapter as PEFT does and return its folder."""
    with warnings.catch_warnings():
        # about embeddings that it saves along
        warnings.simplefilter("ignore")
        write(model, folder)
    return folder


def several(family: str, configs: dict[str, PeftConfig], folder: Path, mixed: bool = False) -> Any:
    """A model of the family with these adapters, all far from identity and all active; each also in a folder."""
    with warnings.catch_warnings():
        # about the corrected fan_in_fan_out, and several adapters at once
        warnings.simplefilter("ignore")
        (first, config), *rest = configs.items()
        model: Any = get_peft_model(build(family), config, first, mixed=mixed)
        model.eval()
        for name, other in rest:
            model.add_adapter(name, other)
        model.base_model.set_adapter(list(configs))
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if set(path.split(".")) & set(configs):
                    noise = torch.randn(parameter.shape, generator=random)
                    near_one = ".ia3_l" in path or "magnitude" in path
                    parameter.copy_(parameter * (1 + 0.3 * noise) if near_one else 0.4 * noise)
        if not mixed:
            write(model, folder)
    return model
