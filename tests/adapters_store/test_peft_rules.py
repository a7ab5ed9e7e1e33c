"""Rules of LORA and ADALORA that need a backbone of another kind than the corpus of malformed files has, and bytes."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model

from tests.adapters_store.conftest import sites
from tests.adapters_store.files import Files, Tensor, lora
from tests.adapters_store.native_blocks import compiled
from tests.adapters_store.peft_lora_variants import VARIANTS
from tests.adapters_store.peft_models import adapt, save
from tests.adapters_store.test_peft_beside import trained
from tests.support.backbones import build
from weft.adapters_store.compile import compile_adapter
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.report import AdapterReport

Q0 = "model.layers.0.self_attn.q_proj"


def written(family: str, config: PeftConfig, folder: Path, **settings: Any) -> Path:
    """PEFT's files, with some settings changed behind its back."""
    save(trained(family, config), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def report_of(kind: str, folder: Path) -> AdapterReport:
    """The report of a variant."""
    family, config = VARIANTS[kind]
    model = sites(family)
    parsed = read_adapter(save(adapt(family, config), folder), model.info)
    return compile_adapter(parsed, model, model.geometry(), 1 << 30)[1]


@pytest.mark.parametrize(
    ("config", "settings", "field", "words"),
    [
        (
            LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
            {"ensure_weight_tying": True},
            "target_modules",
            "model.embed_tokens beside lm_head",
        ),
        (
            LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
            {"ensure_weight_tying": True},
            "modules_to_save",
            "model.embed_tokens as well",
        ),
        (
            LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}),
            {"ensure_weight_tying": True},
            "trainable_token_indices",
            "the same ids for model.embed_tokens and lm_head",
        ),
        (
            LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]),
            {"target_modules": ["q_proj", "lm_head"]},
            "base_model.model.lm_head.lora_A.weight",
            "target_modules names its module",
        ),
        (
            LoraConfig(r=2, target_modules=["lm_head"]),
            {"init_lora_weights": "pissa"},
            "target_modules",
            "the input embedding as well",
        ),
        (
            LoraConfig(r=2, target_modules=["lm_head"]),
            {"kasa_config": {}},
            "target_modules",
            "the input embedding as well",
        ),
    ],
)
def test_a_tied_head_has_rules_of_its_own(config, settings, field, words, tmp_path):
    folder = written("gemma3", config, tmp_path, **settings)
    with pytest.raises(AdapterInvalid, match=words) as refusal:
        read_adapter(folder, sites("gemma3").info)
    assert refusal.value.field == field


def test_rows_of_a_head_that_is_adapted_otherwise_are_refused(tmp_path):
    head = "base_model.model.lm_head"
    model = sites("gpt2")
    tensors = {
        f"{head}.lora_A.weight": _numbers(2, 32),
        f"{head}.lora_B.weight": _numbers(101, 2),
        "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta": _numbers(1, 32),
    }
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["lm_head"],
        "trainable_token_indices": [3],
    }
    with pytest.raises(AdapterInvalid, match="lm_head to have no bias and no other change") as refusal:
        read_adapter(Files(config, tensors).write(tmp_path), model.info)
    assert refusal.value.field == "trainable_token_indices"


def test_rows_of_a_head_with_a_bias_are_refused_because_peft_drops_the_bias(tmp_path):
    folder = written("gpt2", LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[3]), tmp_path)
    info = sites("gpt2").info
    biased = tuple(replace(site, has_bias=True) if site.kind == "lm_head" else site for site in info.sites)
    with pytest.raises(AdapterInvalid, match="lm_head to have no bias"):
        read_adapter(folder, replace(info, sites=biased))


def test_tensors_of_a_head_that_peft_would_not_tie_are_refused(tmp_path):
    """PEFT ties by the name embed_tokens when it loads, and by any name when it trains."""
    config = LoraConfig(r=2, target_modules=["c_attn", "lm_head"], ensure_weight_tying=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = save(get_peft_model(build("gpt2"), config), tmp_path)
    with pytest.raises(AdapterInvalid, match="tensors of the modules that the config targets") as refusal:
        read_adapter(folder, sites("gpt2").info)
    assert refusal.value.field == "base_model.model.lm_head.lora_A.weight"


def test_block_diagonal_factors_of_conv1d_are_refused(tmp_path):
    blocks = {"nblocks": 2, "target_modules_bd_a": ["c_attn"], "target_modules_bd_b": []}
    folder = written("gpt2", LoraConfig(r=2, target_modules=["c_attn"]), tmp_path, use_bdlora=blocks)
    with pytest.raises(AdapterInvalid, match="no use_bdlora for Conv1D"):
        read_adapter(folder, sites("gpt2").info)


def test_a_norm_without_its_bias_is_refused(tmp_path):
    folder = written("gpt2", LoraConfig(r=2, target_modules=["c_attn"], bias="all"), tmp_path, modules_to_save=["ln_f"])
    with pytest.raises(AdapterInvalid, match="modules_to_save names its module") as refusal:
        read_adapter(folder, sites("gpt2").info)
    assert refusal.value.field == "base_model.model.transformer.ln_f.weight"


def test_a_missing_bias_of_a_norm_is_named(tmp_path):
    folder = written("gpt2", LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only"), tmp_path, bias="all")
    with pytest.raises(AdapterInvalid, match="bias is all, and 10 more are missing"):
        read_adapter(folder, sites("gpt2").info)


def test_dora_that_makes_a_row_of_zeros_is_refused(llama, tmp_path):
    weight = llama.parameter(f"{Q0}.weight")
    assert weight is not None
    a, b = torch.zeros(4, 32), torch.zeros(32, 4)
    a[0], b[5, 0] = -weight[5].detach(), 1.0
    files = lora().configured(use_dora=True, lora_alpha=4, target_modules=[Q0])
    site = f"base_model.model.{Q0}"
    tensors = {
        f"{site}.lora_A.weight": _of(a),
        f"{site}.lora_B.weight": _of(b),
        f"{site}.lora_magnitude_vector": _of(torch.ones(32)),
    }
    parsed = read_adapter(replace(files, tensors=tensors).write(tmp_path), llama.info)
    with pytest.raises(AdapterInvalid, match="an adapter that makes no row of zeros") as refusal:
        compile_adapter(parsed, llama, llama.geometry(), 1 << 30)
    assert refusal.value.field == f"{site}.lora_magnitude_vector"


def test_sites_that_pruning_left_nothing_of_are_named_and_absent(tmp_path):
    report = report_of("adalora_pruned", tmp_path)
    assert report.notes == (
        "pruned to rank 0, so left as they are: model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj",
    )
    assert not [site.module for site in report.sites if site.module.endswith("k_proj")]
    ranks = {site.module.rpartition(".")[2]: site.rank for site in report.sites}
    assert ranks == {"q_proj": 4, "v_proj": 6, "o_proj": 6}


def test_a_pruned_adapter_takes_no_bytes_where_nothing_is_left(tmp_path):
    whole = AdaLoraConfig(init_r=6, target_r=3, total_step=100, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    unpruned = compiled("llama", save(trained("llama", whole), tmp_path / "whole"))
    assert report_of("adalora_pruned", tmp_path / "pruned").device_bytes < unpruned.nbytes


@pytest.mark.parametrize(
    ("kind", "factors", "vectors"),
    [
        # one pair of rank r and c [out] in fp32
        ("dora", 4, 1),
        # and (1 - c) b where there is a bias
        ("dora_gpt2", 3, 2),
        ("qalora", 4, 0),
        ("bdlora", 4, 0),
        # what was taken out is one pair with the adapter
        ("pissa", 8, 0),
        ("kasa", 8, 0),
        ("adalora", 6, 0),
    ],
)
def test_device_bytes_are_those_of_the_form(kind, factors, vectors, tmp_path):
    """At most 1.1 times the pair and the vectors; rows of a block are padded to 16 bytes."""
    shapes = {site.path: site for site in sites(VARIANTS[kind][0]).info.sites}
    for site in report_of(kind, tmp_path).sites:
        shape = shapes[site.module]
        padded = -(-factors // 4) * 4
        form = 4 * (factors * shape.in_features + padded * shape.out_features + vectors * shape.out_features)
        assert site.bytes <= 1.1 * form


def _numbers(*shape: int) -> Tensor:
    return _of(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def _of(values: torch.Tensor) -> Tensor:
    return Tensor(tuple(values.shape), values.numpy().tobytes())
