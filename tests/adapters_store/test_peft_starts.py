"""LoRA that starts inside the backbone's weights: what is taken out of them, how exactly, and PEFT's own conversion."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.adapters_store.native_blocks import TOLERANCE, compare, compiled
from tests.adapters_store.peft_models import ModelSites, adapt, build, save, sites_of
from tests.adapters_store.test_peft_beside import loaded
from weft.adapters_store.compile import compile_adapter
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.sites import SiteInfo
from weft.kernels.layout import unpack

# of the largest element of a weight
EXACT = 4e-7


def reference(weight: Tensor, model: PeftModel, path: str, start: str) -> Tensor:
    """The weight that was trained, in fp64, by the textbook's decompositions."""
    lora: Any = plain(model).get_submodule(path)
    a, b = lora.lora_A["default"].weight.double(), lora.lora_B["default"].weight.double()
    rank, scale = len(a), lora.scaling["default"]
    result: Tensor = _residual(weight, rank, scale, start) + scale * _scaled(lora, b, start) @ a
    return result


def plain(model: PeftModel) -> PreTrainedModel:
    """The backbone with peft's modules in it."""
    inside = model.base_model.model
    assert isinstance(inside, PreTrainedModel)
    return inside


def weight_at(sites: ModelSites, site: SiteInfo) -> Tensor:
    """The backbone's weight as [out, in], in fp64."""
    weight = sites.parameter(f"{site.path}.weight")
    assert weight is not None
    return weight.detach().double().T if site.kind == "conv1d" else weight.detach().double()


def _scaled(lora: Any, b: Tensor, start: str) -> Tensor:
    diagonal: Tensor | float = lora.lora_diag["default"].double() if start == "kasa" else 1.0
    return b * diagonal


def _residual(weight: Tensor, rank: int, scale: float, start: str) -> Tensor:
    left: Tensor
    values: Tensor
    right: Tensor
    if start == "olora":
        left, right = torch.linalg.qr(weight)
        return weight - scale * left[:, :rank] @ right[:rank]
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    kept = slice(len(values) - rank) if start == "kasa" else slice(rank, None)
    return (left[:, kept] * values[kept]) @ right[kept]


@pytest.mark.parametrize(
    ("start", "family", "config"),
    [
        ("pissa", "llama", LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules="all-linear")),
        ("pissa", "gpt2", LoraConfig(r=4, init_lora_weights="pissa", target_modules=["c_attn", "c_proj", "c_fc"])),
        ("pissa", "llama", LoraConfig(r=32, init_lora_weights="pissa", target_modules=["q_proj", "gate_proj"])),
        ("olora", "llama", LoraConfig(r=4, lora_alpha=8, init_lora_weights="olora", target_modules="all-linear")),
        ("kasa", "llama", LoraConfig(r=4, lora_alpha=8, kasa_config=KasaConfig(), target_modules="all-linear")),
    ],
)
def test_what_a_start_took_is_found_to_the_last_bits(start, family, config, tmp_path):
    model = adapt(family, config)
    sites = sites_of(build(family))
    image, report = compile_adapter(read_adapter(save(model, tmp_path), sites.info), sites, sites.geometry(), 1 << 30)
    terms = unpack(sites.geometry(), image)
    assert {sites.info.sites[i].path for i in terms} == {site.module for site in report.sites}
    for index, term in terms.items():
        site = sites.info.sites[index]
        weight = weight_at(sites, site)
        assert term.low_rank is not None
        a, b = (t.double() for t in term.low_rank)
        wanted = reference(weight, model, site.path, start)
        assert (weight + b @ a - wanted).abs().max() <= EXACT * wanted.abs().max()


def test_the_difference_is_taken_before_it_is_rounded(tmp_path):
    """A start that training has hardly moved: two factors rounded one by one would leave noise of the weight's size."""
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build("llama"), config).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=random))
    backbone = build("llama")
    nn.Module.to(backbone, torch.bfloat16)
    sites = sites_of(backbone, dtype=torch.bfloat16)
    parsed = read_adapter(save(model, tmp_path), sites.info)
    image, _ = compile_adapter(parsed, sites, sites.geometry(torch.bfloat16), 1 << 30)
    for index, term in unpack(sites.geometry(torch.bfloat16), image).items():
        site = sites.info.sites[index]
        weight = weight_at(sites, site)
        wanted = reference(weight, model, site.path, "pissa") - weight
        assert term.low_rank is not None
        a, b = (t.double() for t in term.low_rank)
        rounding = (b @ a - wanted).abs().max()
        assert rounding <= 2**-6 * wanted.abs().max()
        assert wanted.abs().max() <= 2**-6 * weight.abs().max(), "the test needs a small difference of large parts"


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_what_peft_converts_is_a_plain_lora_of_twice_the_rank(start, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=cast(Any, start), target_modules=["q_proj", "up_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), copy.deepcopy(config)).eval()
        said: Any = model.peft_config["default"]
        # as PEFT's guide says: the start is saved as if it were harmless
        said.init_lora_weights = True
        model.save_pretrained(str(tmp_path / "start"))
        said.init_lora_weights = start
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
        model.save_pretrained(
            str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    block = compiled("llama", tmp_path / "converted")
    assert {site.operators for site in block.report.sites} == {("low_rank r=8",)}
    found = compare(block, loaded(tmp_path / "converted", "llama"))
    assert found.error <= TOLERANCE
    assert found.change >= 100 * TOLERANCE
    # and that is what was trained
    trained = compare(block, plain(model))
    assert trained.error <= 5 * TOLERANCE


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga"])
def test_a_start_that_is_not_in_the_files_is_refused_with_the_way_out(start, tmp_path):
    folder = _said(start, tmp_path)
    with pytest.raises(AdapterInvalid, match="save it again as a plain LoRA, by save_pretrained with path_initial"):
        read_adapter(folder, sites_of(build("llama")).info)


def test_loftq_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(AdapterInvalid, match="serve those, and save with init_lora_weights=true"):
        read_adapter(_said("loftq", tmp_path), sites_of(build("llama")).info)


@pytest.mark.parametrize(
    ("settings", "why"), [({"init_lora_weights": "olora"}, "olora"), ({"kasa_config": {}}, "kasa")]
)
def test_what_peft_has_no_conv1d_for_is_refused(settings, why, tmp_path):
    harmless = adapt("gpt2", LoraConfig(r=4, target_modules=["c_attn"]))
    folder = _changed(save(harmless, tmp_path), settings)
    with pytest.raises(AdapterInvalid, match=f"no {why}.* for Conv1D"):
        read_adapter(folder, sites_of(build("gpt2")).info)


def _said(start: str, folder: Path) -> Path:
    harmless = adapt("llama", LoraConfig(r=4, target_modules=["q_proj"]))
    return _changed(save(harmless, folder), {"init_lora_weights": start})


def _changed(folder: Path, settings: dict[str, object]) -> Path:
    """The same files with other settings."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder
