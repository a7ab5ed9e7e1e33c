"""PEFT's other methods on linears that have biases, and beside biases and modules that were trained along with them."""

import warnings
from typing import Any

import peft
import pytest
import torch

from tests.adapters_store.conftest import sites
from tests.adapters_store.peft_models import build, save
from tests.adapters_store.test_peft_other import TOLERANCE, compiled, difference
from tests.support.methods.case import noise
from weft.adapters_store.errors import AdapterInvalid

FAMILY = "llama_biased"
TARGETS = ["q_proj", "v_proj", "down_proj"]
ALONG = {"bias": "all", "modules_to_save": ["lm_head", "model.norm"]}


def glora(weights: str, column: str, biases: str) -> peft.PeftConfig:
    """One combination of GLoRA's forms."""
    forms: dict[str, Any] = {"config_A_B": weights, "config_C": column, "config_D_E": biases}
    return peft.GloraConfig(r=2, target_modules=TARGETS, init_weights=False, **forms)


def along(config: type, only: str, **settings: object) -> dict[str, peft.PeftConfig]:
    """A method beside all biases and two whole modules, and beside its own biases."""
    return {
        f"{only}_all": config(target_modules=TARGETS, **ALONG, **settings),
        f"{only}_only": config(target_modules=TARGETS, bias=f"{only}_only", **settings),
    }


CONFIGS: dict[str, peft.PeftConfig] = {
    "glora": glora("lora", "lora", "constant"),
    "glora_vector": glora("vector", "vector", "vector"),
    "glora_constant": glora("constant", "none", "constant"),
    "glora_scale_alone": glora("vector", "none", "none"),
    "glora_bias_alone": glora("none", "lora", "vector"),
    "glora_column_alone": glora("none", "vector", "none"),
    "beft": peft.BeftConfig(target_modules=TARGETS),
    "beft_saved": peft.BeftConfig(target_modules=TARGETS, modules_to_save=["lm_head", "model.norm"]),
    "shira": peft.ShiraConfig(r=1, target_modules=TARGETS),
    **along(peft.HRAConfig, "hra", r=2),
    **along(peft.DeloraConfig, "delora", r=2),
    **along(peft.MissConfig, "miss", r=4),
    **along(peft.GraloraConfig, "gralora", r=4, gralora_k=2),
    **along(peft.VBLoRAConfig, "vblora", r=2, num_vectors=9, vector_length=8),
    **along(peft.TinyLoraConfig, "tinylora", r=2, u=4),
    **along(peft.UniLoraConfig, "unilora", r=2, theta_d_length=20),
    **along(peft.DeftConfig, "deft", r=2),
    **along(peft.VeraConfig, "vera", r=4),
    **along(peft.RandLoraConfig, "randlora", r=8, randlora_alpha=1),
    **along(peft.C3AConfig, "c3a", block_size=8),
    **along(peft.FourierFTConfig, "fourierft", n_frequency=20),
    **along(peft.WaveFTConfig, "waveft", n_frequency=20),
    **along(peft.OFTConfig, "oft", oft_block_size=8, use_cayley_neumann=False),
    **along(peft.BOFTConfig, "boft", boft_block_size=4),
}


def made(config: peft.PeftConfig, seed: int = 0) -> peft.PeftModel:
    """The biased model with everything that peft would train filled with noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about biases that merging cannot keep
        model = peft.get_peft_model(build(FAMILY), config).eval()
    fill, random = noise(0.4, ["delora_lambda", "boft_s", "norm"]), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                filled = fill(name, parameter, random)
                assert filled is not None
                parameter.copy_(filled)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_computes_what_peft_computes_beside_biases(name, tmp_path):
    model = made(CONFIGS[name])
    folded = compiled(save(model, tmp_path), FAMILY)
    error, change = difference(folded, model.get_base_model(), FAMILY)
    assert error <= TOLERANCE
    assert change >= 100 * TOLERANCE
    touched = set(folded.touched())
    if name.endswith("_all"):
        assert {"lm_head", "model.norm", "model.layers.0.self_attn.k_proj"} <= touched
    if name.endswith("_only"):
        assert "model.layers.0.self_attn.k_proj" not in touched


def test_glora_is_not_served_with_biases_that_it_reads_itself(tmp_path):
    config = peft.GloraConfig(r=2, target_modules=TARGETS, bias="glora_only")
    with pytest.raises(AdapterInvalid, match="bias: expected one of none") as refusal:
        compiled(save(made(config), tmp_path), FAMILY)
    assert refusal.value.field == "bias"


def test_what_glora_leaves_out_takes_nothing(tmp_path):
    folded = compiled(save(made(CONFIGS["glora_bias_alone"]), tmp_path), FAMILY)
    down = sites(FAMILY).info.index["model.layers.0.mlp.down_proj"]
    assert down not in folded.terms, "a linear without a bias has nothing of C, D and E"
    assert not folded.records
