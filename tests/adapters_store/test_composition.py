"""Derived versions: what names them, and that they compute what PEFT computes with several adapters at once."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import BeftConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftMixedModel

from tests.adapters_store.files import Files, lora
from tests.adapters_store.peft_models import ATTENTION, GPT2, ModelSites, adapt, build, save, several, sites_of
from tests.adapters_store.stores import Store
from tests.adapters_store.test_fold_parity import difference
from weft.adapters_store.compile import compile_adapter
from weft.adapters_store.composition import derive, label_of, read_composed
from weft.adapters_store.errors import AdapterCorrupt, AdapterIncompatible, AdapterInvalid
from weft.kernels.layout import SiteTerms, unpack

TOLERANCE = 2e-6
A, B, C = ("abc"[i] * 64 for i in range(3))


# names


digests = st.sampled_from([A, B, C])
members = st.lists(st.tuples(digests, st.floats(-4, 4, width=32)), max_size=4)


@given(members, members)
def test_one_list_is_one_version_and_another_list_another(one, other):
    assert derive(one) == derive(list(one))
    kept, others = ([(d, w) for d, w in said if w != 0] for said in (one, other))
    assert (derive(one)[0] == derive(other)[0]) == (kept == others)


@given(members)
def test_a_weight_of_zero_leaves_an_adapter_out(said):
    assert derive([(C, 0.0), *said, (A, -0.0)]) == derive(said)
    assert derive([(A, 1.0), (B, 0.0)]) == (A, ())
    assert derive([(A, 0.0)]) == (None, ())


def test_the_name_is_a_sha256_of_rules_digests_and_exact_weights():
    digest, kept = derive([(A, 1.0), (B, 0.1)])
    said = f"weft composition 1\n{A} 0x1.0000000000000p+0\n{B} 0x1.999999999999ap-4"
    assert digest == hashlib.sha256(said.encode()).hexdigest()
    assert kept == ((A, 1.0), (B, 0.1))
    assert derive([(B, 0.1), (A, 1.0)])[0] != digest


# what they compute


def stored(folder: Path) -> Files:
    """The files of an adapter as they are sent."""
    config, weights = ((folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    return Files({}, {}, config, weights)


class Composer:
    """A store over a family's sites; compositions of what it is given."""

    def __init__(self, family: str, root: Path):
        self.sites: ModelSites = sites_of(build(family))
        self.store = Store(root, self.sites)

    def terms(self, said: Sequence[tuple[Path, float]]) -> dict[int, SiteTerms]:
        """What these folders with these weights compile to."""
        entries = [(self.store.register(folder.name, stored(folder), True).digest, weight) for folder, weight in said]
        digest, kept = derive(entries)
        assert digest is not None
        parsed = read_composed(self.store.root, kept, self.sites.info)
        return unpack(self.sites.geometry(), compile_adapter(parsed, self.sites, self.sites.geometry(), 1 << 30)[0])


@pytest.fixture
def composer(tmp_path):
    made: list[Composer] = []

    def start(family: str) -> Composer:
        made.append(Composer(family, tmp_path / "store"))
        return made[0]

    yield start
    for each in made:
        each.store.__exit__(None, None, None)


def lora_config(family: str, rank: int, **values: Any) -> PeftConfig:
    targets = GPT2 if family == "gpt2" else ATTENTION
    return LoraConfig(r=rank, lora_alpha=6, target_modules=targets, fan_in_fan_out=family == "gpt2", **values)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (-1.5, 0.75)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_low_rank_pairs_with_weights_equal_pefts_own_concatenation(family, weights, composer, tmp_path):
    model = several(family, {"a": lora_config(family, 3), "b": lora_config(family, 5)}, tmp_path)
    model.base_model.add_weighted_adapter(["a", "b"], list(weights), "both", combination_type="cat")
    model.base_model.set_adapter("both")
    compose = composer(family)
    terms = compose.terms([(tmp_path / "a", weights[0]), (tmp_path / "b", weights[1])])
    error, change = difference(compose.sites, terms, model)
    assert error <= TOLERANCE
    assert change >= 100 * TOLERANCE
    swapped = compose.terms([(tmp_path / "b", weights[0] + 1), (tmp_path / "a", weights[1])])
    assert difference(compose.sites, swapped, model)[0] >= 100 * TOLERANCE


# family, the adapters, and the order in which peft has them active
TOGETHER: dict[str, tuple[str, dict[str, PeftConfig], str]] = {
    "ia3_ia3": (
        "llama",
        {
            "a": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "b": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        },
        "ab",
    ),
    "ia3_ia3_biased": (
        "gpt2",
        {name: IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]) for name in "ab"},
        "ab",
    ),
    "dora_after_lora": ("gpt2", {"a": lora_config("gpt2", 3), "b": lora_config("gpt2", 2, use_dora=True)}, "ab"),
    "lora_after_dora": ("gpt2", {"a": lora_config("gpt2", 3), "b": lora_config("gpt2", 2, use_dora=True)}, "ba"),
    "dora_dora": ("gpt2", {name: lora_config("gpt2", 3, use_dora=True) for name in "ab"}, "ab"),
    "dora_lora_dora": (
        "llama",
        {name: lora_config("llama", 3, use_dora=name != "b") for name in "abc"},
        "abc",
    ),
    "lora_bias_lora_bias": ("gpt2", {name: lora_config("gpt2", 3, lora_bias=True) for name in "ab"}, "ab"),
    "beft_beft": ("llama_biased", {name: BeftConfig(target_modules=["q_proj", "v_proj"]) for name in "ab"}, "ab"),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_active_together_they_compute_what_peft_computes(case, composer, tmp_path):
    family, configs, order = TOGETHER[case]
    model = several(family, configs, tmp_path)
    model.base_model.set_adapter(list(order))
    compose = composer(family)
    terms = compose.terms([(tmp_path / name, 1.0) for name in order])
    error, change = difference(compose.sites, terms, model)
    assert error <= TOLERANCE
    assert change >= 100 * TOLERANCE
    alone = compose.terms([(tmp_path / order[0], 1.0), (tmp_path / order[0], 0.0)] * 2)
    assert difference(compose.sites, alone, model)[0] >= 100 * TOLERANCE


def test_the_order_of_dora_and_lora_is_the_lists(composer, tmp_path):
    family, configs, _ = TOGETHER["dora_after_lora"]
    model = several(family, configs, tmp_path)
    compose = composer(family)
    terms = compose.terms([(tmp_path / name, 1.0) for name in "ba"])
    assert difference(compose.sites, terms, model)[0] >= 1e-2


def test_methods_of_several_kinds_add_up_as_in_pefts_mixed_model(composer, tmp_path):
    configs: dict[str, PeftConfig] = {
        "a": LoraConfig(r=3, lora_alpha=6, target_modules=ATTENTION),
        "b": LoKrConfig(r=64, alpha=96, target_modules=ATTENTION),
        "c": LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "o_proj"]),
        "d": LoKrConfig(r=3, alpha=2, decompose_factor=2, target_modules=["q_proj"]),
    }
    model = several("llama", configs, tmp_path, mixed=True)
    assert isinstance(model, PeftMixedModel)
    for name, config in configs.items():
        # a mixed model cannot be saved: each of its adapters goes through a model of its own
        own = adapt("llama", config)
        # layers of other methods stand between, in a mixed model
        values = {
            path.replace(".base_layer", "").replace(f".{name}", ".default"): value
            for path, value in model.named_parameters()
            if name in path.split(".")
        }
        with torch.no_grad():
            for path, parameter in own.named_parameters():
                if path in values:
                    parameter.copy_(values.pop(path))
        assert not values
        save(own, tmp_path / name)
    compose = composer("llama")
    error, change = difference(compose.sites, compose.terms([(tmp_path / name, 1.0) for name in configs]), model)
    assert error <= TOLERANCE
    assert change >= 100 * TOLERANCE


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_scale_and_a_pair_compute_what_pefts_layers_compute_around_each_other(order, composer, tmp_path):
    """PEFT has no model with both; its layers can be put around each other, the later one outside."""
    scaled = IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
    models: dict[str, Any] = {"a": adapt("gpt2", lora_config("gpt2", 3), seed=1), "b": adapt("gpt2", scaled, seed=2)}
    for name, model in models.items():
        save(model, tmp_path / name)
    inner, outer = (models[name].base_model.model for name in order)
    compose = composer("gpt2")
    for site in compose.sites.info.sites:
        one, other = inner.get_submodule(site.path), outer.get_submodule(site.path)
        if hasattr(other, "base_layer"):
            other.base_layer = one
        elif hasattr(one, "base_layer"):
            parent, _, name = site.path.rpartition(".")
            setattr(outer.get_submodule(parent), name, one)
    terms = compose.terms([(tmp_path / name, 1.0) for name in order])
    error, change = difference(compose.sites, terms, models[order[1]])
    assert error <= TOLERANCE
    assert change >= 100 * TOLERANCE


# what can go wrong


def test_refusals_name_both_versions(composer, tmp_path):
    compose = composer("llama")
    model = several("llama", {"a": TOGETHER["ia3_ia3"][1]["a"]}, tmp_path)
    del model
    with pytest.raises(AdapterInvalid) as refusal:
        compose.terms([(tmp_path / "a", 0.5)])
    digest = compose.store.catalog.get("a").digest
    assert str(refusal.value).startswith(f"weight of {label_of(digest)}: expected 1, got 0.5 (it scales the output of ")


def test_values_that_do_not_fit_name_their_version_and_tensor(llama, tmp_path):
    sites = replace(llama, info=replace(llama.info, dtype="float16"))
    with Store(tmp_path / "store", sites, dtype=torch.float16) as store:
        entry = store.register("a", lora())
        digest, kept = derive([(entry.digest, 2.0**20), (entry.digest, 1.0)])
        assert digest is not None
        with pytest.raises(
            AdapterInvalid, match=rf"^{label_of(entry.digest)}: base_model.*lora_B.weight: expected values"
        ):
            compile_adapter(read_composed(store.root, kept, sites.info), sites, sites.geometry(torch.float16), 1 << 30)


def test_a_member_that_was_damaged_is_named(llama, tmp_path):
    with Store(tmp_path / "store", llama) as store:
        first, second = store.register("a", lora(seed=1)), store.register("b", lora(seed=2))
        weights = store.root / "objects" / second.digest / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        kept = ((first.digest, 1.0), (second.digest, 1.0))
        with pytest.raises(AdapterCorrupt, match=f"^{label_of(second.digest)}: version: expected the bytes"):
            read_composed(store.root, kept, llama.info)
        # headers alone are still whole
        assert read_composed(store.root, kept, llama.info, data=False).sites


def test_a_member_of_another_backbone_is_named(llama, gpt2, tmp_path):
    with Store(tmp_path / "store", llama) as store:
        digest = store.register("a", lora()).digest
        with pytest.raises(AdapterIncompatible, match=f"^{label_of(digest)}: "):
            read_composed(store.root, ((digest, 1.0), (digest, 1.0)), gpt2.info)
