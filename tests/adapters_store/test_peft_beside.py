"""What PEFT files bring beside their method: biases, whole modules and rows of the embedding, against PEFT itself."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.adapters_store.native_blocks import TOLERANCE, Compiled, compare, compiled
from tests.adapters_store.peft_models import build
from weft.kernels.extras import Kind

Q, CONV = ["q_proj"], ["c_attn"]

# by name: family, config, and the paths that the adapter changes beside its own targets
BESIDE: dict[str, tuple[str, LoraConfig, set[str]]] = {
    "head": ("llama", LoraConfig(r=2, target_modules=Q, modules_to_save=["lm_head"]), {"lm_head"}),
    "tied_head": ("gpt2", LoraConfig(r=2, target_modules=CONV, modules_to_save=["lm_head"]), {"lm_head"}),
    "embedding": ("llama", LoraConfig(r=2, target_modules=Q, modules_to_save=["embed_tokens"]), {"embedding"}),
    "scaled_embedding": ("gemma3", LoraConfig(r=2, target_modules=Q, modules_to_save=["embed_tokens"]), {"embedding"}),
    "tied_embedding": (
        "gemma3",
        LoraConfig(r=2, target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        {"embedding", "lm_head"},
    ),
    # PEFT ties by name, and the name is not wte
    "embedding_of_gpt2": (
        "gpt2",
        LoraConfig(r=2, target_modules=CONV, modules_to_save=["wte"], ensure_weight_tying=True),
        {"embedding"},
    ),
    "last_norm": ("gpt2", LoraConfig(r=2, target_modules=CONV, modules_to_save=["ln_f"]), {"transformer.ln_f"}),
    # any ending will do: the heads' norms and all four of each layer
    "all_norms": ("gemma3", LoraConfig(r=2, target_modules=Q, modules_to_save=["norm"]), {"every norm"}),
    "head_and_norm": (
        "llama",
        LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head", "model.norm", "embed_tokens"]),
        {"lm_head", "model.norm", "embedding"},
    ),
    "tokens": ("llama", LoraConfig(r=2, target_modules=Q, trainable_token_indices=[7, 3, 100]), {"embedding"}),
    "tokens_tied": (
        "gpt2",
        LoraConfig(r=2, target_modules=CONV, trainable_token_indices=[7, 3, 100]),
        {"embedding", "lm_head"},
    ),
    "tokens_scaled_and_tied": (
        "gemma3",
        LoraConfig(r=2, target_modules=Q, trainable_token_indices=[0, 9]),
        {"embedding", "lm_head"},
    ),
    "tokens_by_name": (
        "gemma3",
        LoraConfig(r=2, target_modules=Q, trainable_token_indices={"embed_tokens": [4, 9], "lm_head": [4, 9]}),
        {"embedding", "lm_head"},
    ),
    "tokens_apart": (
        "gemma3",
        LoraConfig(r=2, target_modules=Q, trainable_token_indices={"embed_tokens": [4, 9], "lm_head": [9, 2, 1]}),
        {"embedding", "lm_head"},
    ),
    "tokens_of_both": (
        "llama",
        LoraConfig(r=2, target_modules=Q, trainable_token_indices={"embed_tokens": [4], "lm_head": [4]}),
        {"embedding", "lm_head"},
    ),
    "tokens_of_the_head": (
        "gpt2",
        LoraConfig(r=2, target_modules=CONV, trainable_token_indices={"lm_head": [9, 2, 1]}),
        {"lm_head"},
    ),
    "embedding_lora": ("llama", LoraConfig(r=2, lora_alpha=3, target_modules=[*Q, "embed_tokens"]), {"embedding"}),
    "embedding_lora_pattern": (
        "gpt2",
        LoraConfig(
            r=2, use_rslora=True, target_modules=[*CONV, "wte"], rank_pattern={"wte": 5}, alpha_pattern={"wte": 1}
        ),
        {"embedding"},
    ),
    "embedding_lora_scaled": ("gemma3", LoraConfig(r=2, target_modules=[*Q, "embed_tokens"]), {"embedding"}),
    "embedding_lora_tied": (
        "gemma3",
        LoraConfig(r=2, lora_alpha=3, target_modules=[*Q, "embed_tokens"], ensure_weight_tying=True),
        {"embedding", "lm_head"},
    ),
    "embedding_lora_alone": ("llama", LoraConfig(r=2, target_modules=["embed_tokens"]), {"embedding"}),
    "embedding_dora": ("llama", LoraConfig(r=2, use_dora=True, target_modules=[*Q, "embed_tokens"]), {"embedding"}),
    "embedding_dora_scaled": ("gemma3", LoraConfig(r=2, use_dora=True, target_modules=["embed_tokens"]), {"embedding"}),
    "biases": ("gpt2", LoraConfig(r=2, target_modules=CONV, bias="all"), {"every bias"}),
    "biases_and_a_norm": (
        "gpt2",
        LoraConfig(r=2, target_modules=CONV, bias="all", modules_to_save=["ln_f"]),
        {"every bias"},
    ),
    "biases_and_dora": ("gpt2", LoraConfig(r=2, use_dora=True, target_modules=CONV, bias="all"), {"every bias"}),
    "own_biases": ("gpt2", LoraConfig(r=2, target_modules=CONV, bias="lora_only"), set()),
    "adalora": (
        "gpt2",
        AdaLoraConfig(init_r=4, total_step=9, target_modules=CONV, bias="all", modules_to_save=["ln_f", "wte"]),
        {"every bias", "embedding"},
    ),
    "adalora_tokens": (
        "llama",
        AdaLoraConfig(init_r=4, total_step=9, target_modules=Q, trainable_token_indices=[3, 1]),
        {"embedding"},
    ),
}


def trained(family: str, config: PeftConfig, seed: int = 3) -> PeftModel:
    """A model of PEFT's in which everything that it would train has been moved by noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(family), config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return model


def loaded(folder: Path, family: str) -> PreTrainedModel:
    """What PEFT makes of the files: the backbone with their modules in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(build(family), str(folder)).eval().base_model.model
    assert isinstance(model, PreTrainedModel)
    return model


def save(model: PeftModel, folder: Path) -> Path:
    """Write the adapter as PEFT does and return its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return folder


def expected_paths(block: Compiled, targets: set[str], named: set[str]) -> set[str]:
    """The paths that an adapter with these targets must change, ``every`` written out."""
    info = block.sites.info
    biased = {site.path for site in info.sites if site.has_bias} | {norm.path for norm in info.norms if norm.has_bias}
    every = {"every norm": {norm.path for norm in info.norms}, "every bias": biased}
    return targets | {path for name in named for path in every.get(name, {name})}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_compiled_changes_what_peft_changes(kind, tmp_path):
    family, config, named = BESIDE[kind]
    block = compiled(family, save(trained(family, config), tmp_path))
    changed = loaded(tmp_path, family)
    found = compare(block, changed)
    assert found.error <= TOLERANCE
    assert found.change >= 100 * TOLERANCE
    assert config.target_modules is not None
    names = set(config.target_modules) - {"embed_tokens", "wte"}
    targets = {site.path for site in block.sites.info.sites if site.path.endswith(tuple(names) or ("?",))}
    if config.target_modules == "all-linear":
        targets = {site.path for site in block.sites.info.sites if site.kind != "lm_head"}
    assert found.changed == expected_paths(block, targets, named)


def test_another_adapter_of_the_same_shape_fails_the_comparison(tmp_path):
    family, config, _ = BESIDE["head_and_norm"]
    block = compiled(family, save(trained(family, config, seed=4), tmp_path / "one"))
    other = loaded(save(trained(family, config, seed=5), tmp_path / "other"), family)
    assert compare(block, other).error > 1e-2


@pytest.mark.parametrize(
    ("kind", "bytes_max"),
    [
        # V·d deltas or rows in fp32, and ids
        ("head", 101 * 32 * 4 * 1.1),
        ("embedding", 101 * 33 * 4 * 1.1),
        # a [V, r] and b [r, d]
        ("embedding_lora_alone", (101 * 4 + 2 * 32) * 4 * 1.1),
        ("tokens", 3 * 33 * 4 * 1.4),
    ],
)
def test_device_bytes_are_those_of_what_is_brought(kind, bytes_max, tmp_path):
    family, config, _ = BESIDE[kind]
    block = compiled(family, save(trained(family, config), tmp_path))
    brought = [site.bytes for site in block.report.sites if not site.module.endswith("q_proj")]
    assert sum(brought) <= bytes_max


def test_the_report_names_modules_of_every_kind(tmp_path):
    family, config, _ = BESIDE["head_and_norm"]
    block = compiled(family, save(trained(family, config), tmp_path))
    words = {site.module: site.operators for site in block.report.sites if "layers" not in site.module}
    assert words == {
        "lm_head": ("dense",),
        "model.norm": ("norm override",),
        "model.embed_tokens": ("rows n=101",),
    }


def test_an_activated_lora_says_where_it_begins(tmp_path):
    config = LoraConfig(r=2, target_modules=Q, alora_invocation_tokens=[5, 9], task_type="CAUSAL_LM")
    block = compiled("llama", save(trained("llama", config), tmp_path))
    mask = block.of(Kind.MASK)
    assert mask is not None
    assert mask.options == (5, 9)
    assert block.report.traits.token_mask == (5, 9)
