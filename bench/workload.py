"""The workload that benchmarks make for themselves: a random backbone of a real shape, adapters on it, and prompts."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from weft.adapters_store.sites import CatalogueInfo, SiteInfo

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# large enough to change every logit, small enough that thirty random layers stay finite
SPREAD = 0.05


def shape(name: str) -> PreTrainedConfig:
    """The configuration called ``smollm2-135m``, or that of a local folder or hub name."""
    if name == "smollm2-135m":
        return LlamaConfig(**SMOLLM2_135M)
    config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    return config


def random_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape with seeded random weights; the same weights at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


def prompts(count: int, tokens: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Random token ids, none of them special in common vocabularies."""
    source = random.Random(0)
    return [tuple(source.randrange(3, vocabulary) for _ in range(tokens)) for _ in range(count)]


def write_low_rank(folder: Path, sites: Sequence[SiteInfo], rank: int, seed: int) -> Path:
    """A PEFT LORA folder with this rank on all these sites."""
    noise = _noise(seed)
    tensors = {}
    for site in sites:
        tensors[f"base_model.model.{site.path}.lora_A.weight"] = noise(rank, site.in_features)
        tensors[f"base_model.model.{site.path}.lora_B.weight"] = noise(site.out_features, rank)
    return _write(folder, tensors, {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}, sites)


def write_kron(folder: Path, sites: Sequence[SiteInfo], seed: int) -> Path:
    """A PEFT LOKR folder with two full factors on all these sites, as balanced as the widths allow."""
    noise = _noise(seed)
    tensors, largest = {}, 1
    for site in sites:
        (o1, o2), (i1, i2) = _halves(site.out_features), _halves(site.in_features)
        tensors[f"base_model.model.{site.path}.lokr_w1"] = noise(o1, i1)
        tensors[f"base_model.model.{site.path}.lokr_w2"] = noise(o2, i2)
        largest = max(largest, o2, i2)
    return _write(folder, tensors, {"peft_type": "LOKR", "r": largest, "alpha": largest}, sites)


def write_scale(folder: Path, sites: Sequence[SiteInfo], seed: int) -> Path:
    """A PEFT IA3 folder: output scales on keys and values, an input scale on the last linear of each MLP."""
    noise = _noise(seed)
    tensors: dict[str, Tensor] = {}
    outputs = [site for site in sites if site.path.endswith(("k_proj", "v_proj"))]
    inputs = [site for site in sites if site.path.endswith("down_proj")]
    chosen = [*outputs, *inputs] or list(sites)
    for site in chosen:
        size = (1, site.in_features) if site in inputs else (site.out_features, 1)
        tensors[f"base_model.model.{site.path}.ia3_l"] = 1 + noise(*size)
    feedforward = sorted({site.path.rpartition(".")[2] for site in inputs})
    return _write(folder, tensors, {"peft_type": "IA3", "feedforward_modules": feedforward}, chosen)


def body_sites(catalogue: CatalogueInfo) -> list[SiteInfo]:
    """All sites but the output head."""
    return [site for site in catalogue.sites if site.kind != "lm_head"]


def _noise(seed: int):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator) * SPREAD


def _halves(width: int) -> tuple[int, int]:
    """The factor pair of ``width`` nearest to a square, the smaller one first."""
    small = next(n for n in range(math.isqrt(width), 0, -1) if width % n == 0)
    return small, width // small


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, object], sites: Sequence[SiteInfo]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({site.path for site in sites})
    full = {**config, "target_modules": targets, "task_type": "CAUSAL_LM", "base_model_name_or_path": "random"}
    (folder / "adapter_config.json").write_text(json.dumps(full, indent=1))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
