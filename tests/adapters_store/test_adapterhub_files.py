"""What AdapterHub's files may say: the library's own rules for older ones, and every refusal by field and words."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.adapters_store.test_adapterhub import sites
from tests.support import adapterhub
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.operators import LowRank, ParsedAdapter
from weft.adapters_store.parts import Bottleneck

Config = dict[str, Any]
Tensors = dict[str, Tensor]
Change = Callable[[Config, Tensors], None]


def read(of: str, kind: str, change: Change, folder: Path, **info: Any) -> ParsedAdapter:
    """A golden adapter of a family, changed, as a store would hold it, read for its backbone, changed by ``info``."""
    config, tensors = adapterhub.config(of, kind), adapterhub.tensors(of, kind)
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return read_adapter(folder, replace(sites(of).info, **info))


def inner(**settings: Any) -> Change:
    """With these settings of the method; ``...`` removes one."""

    def change(config: Config, _: Tensors) -> None:
        merge(config["config"], settings)

    return change


def outer(**settings: Any) -> Change:
    """With these settings beside the method's."""

    def change(config: Config, _: Tensors) -> None:
        merge(config, settings)

    return change


def merge(config: Config, settings: Config) -> None:
    for key, value in settings.items():
        config[key] = value
        if value is ...:
            del config[key]


def member(number: int, **settings: Any) -> Change:
    """With these settings of one member of a union."""

    def change(config: Config, _: Tensors) -> None:
        merge(config["config"]["configs"][number], settings)

    return change


def renamed(old: str, new: str) -> Change:
    """With this part of names changed."""

    def change(_: Config, tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def with_tensor(name: str, tensor: Tensor | None) -> Change:
    """With one more tensor, or without it."""

    def change(_: Config, tensors: Tensors) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return change


def again(config: Config, _: Tensors) -> None:
    """A union that names its bottleneck twice."""
    config["config"]["configs"].append(dict(config["config"]["configs"][1]))


@dataclass(frozen=True)
class Refused:
    """What is done to a golden adapter, and what is said about it."""

    family: str
    kind: str
    change: Change
    field: str
    words: str


LORA_A = "model.layers.0.self_attn.q_proj.loras.task.lora_A"
DOWN = "model.layers.0.output_adapters.adapters.task.adapter_down.0.weight"
POOL = "model.layers.1.self_attn.prefix_tuning.pool.prefix_tunings.task.self_prefix.wte.weight"


def _files() -> Iterator[tuple[str, Refused]]:
    yield (
        "family",
        Refused(
            "llama", "lora", outer(model_type="gpt2"), "model_type", 'expected this backbone\'s, llama, got "gpt2"'
        ),
    )
    yield "family_missing", Refused("llama", "lora", outer(model_type=...), "model_type", "expected a value")
    yield (
        "width",
        Refused("llama", "lora", outer(hidden_size=64), "hidden_size", "expected this backbone's, 32, got 64"),
    )
    yield "name_missing", Refused("llama", "lora", outer(name=...), "name", "expected a value")
    yield "name_dots", Refused("llama", "lora", outer(name="a.b"), "name", "without dots")
    yield (
        "name_other",
        Refused("llama", "lora", outer(name="other"), "model.layers.0.self_attn.q_proj.loras.other.lora_A", "got none"),
    )
    yield "version", Refused("llama", "lora", outer(version="adapters.x"), "version", "adapters.1.3.0")
    yield "key", Refused("llama", "lora", outer(secret=1), "secret", "settings of AdapterHub")
    yield "inner_key", Refused("llama", "lora", inner(secret=1), "config.secret", "settings of LORA")
    yield "union_key", Refused("llama", "mam", inner(secret=1), "config.secret", "settings of UNION")
    yield (
        "member_key",
        Refused("llama", "mam", member(1, secret=1), "config.configs.1.secret", "settings of BOTTLENECK"),
    )
    for name, words in (("reft", "single tokens"), ("mtl_lora", "a task"), ("prompt_tuning", "no prompt tuning")):
        yield name, Refused("llama", "lora", inner(architecture=name), "config.architecture", words)
    yield (
        "architecture",
        Refused(
            "llama", "lora", inner(architecture="new"), "config.architecture", "one of null, lora, prefix_tuning, union"
        ),
    )
    yield "architecture_list", Refused("llama", "lora", inner(architecture=[]), "config.architecture", "got []")
    yield (
        "union_in_union",
        Refused("llama", "mam", member(0, architecture="union"), "config.configs.0.architecture", "got"),
    )
    yield "union_empty", Refused("llama", "mam", inner(configs=[]), "config.configs", "a list of configs")
    yield (
        "union_twice",
        Refused("llama", "mam", again, DOWN, "one member of a union to have it, got two"),
    )
    yield "missing", Refused("llama", "lora", with_tensor(LORA_A, None), LORA_A, "expected this tensor, got none")
    yield "shape", Refused("llama", "lora", with_tensor(LORA_A, torch.ones(3, 32)), LORA_A, "r is 4")
    yield "integers", Refused("llama", "lora", with_tensor(LORA_A, torch.ones(4, 32, dtype=torch.int32)), LORA_A, "F32")
    yield (
        "extra",
        Refused("llama", "lora", with_tensor(f"{LORA_A}.more", torch.ones(1)), f"{LORA_A}.more", "got one more"),
    )
    other = "model.layers.0.self_attn.q_proj.loras.other.lora_A"
    yield "other_adapter", Refused("llama", "lora", with_tensor(other, torch.ones(1)), other, "no adapter called task")
    for name, words in (
        ("model.invertible_adapters.task.F.0.weight", "invertible adapters"),
        ("model.layers.0.reft_layer.refts.task.units.0.projection.weight", "ReFT"),
        ("model.layers.0.output_adapters.adapter_fusion_layer.task.query.weight", "AdapterFusion"),
        ("heads.task.0.weight", "prediction heads"),
    ):
        yield (
            name,
            Refused("llama", "lora", with_tensor(name, torch.ones(1)), name if name[0] == "m" else "heads", words),
        )
    yield "copy", Refused("llama", "prefix", with_tensor(POOL, torch.ones(5, 32)), "prefix", "stored once")


def _bottlenecks() -> Iterator[tuple[str, Refused]]:
    for key, value in (("inv_adapter", "nice"), ("invertible_adapter", {"block_type": "nice"})):
        yield key, Refused("llama", "pfeiffer", inner(**{key: value}), f"config.{key}", "invertible adapters")
    yield "ln_after", Refused("llama", "pfeiffer", inner(ln_after=True), "config.ln_after", "a norm behind")
    yield (
        "dropped",
        Refused("llama", "houlsby", inner(original_ln_after=False), "config.original_ln_after", "would be dropped"),
    )
    yield (
        "dropped_parallel",
        Refused("llama", "parallel", inner(original_ln_after=False), "config.original_ln_after", "would be dropped"),
    )
    yield (
        "twice",
        Refused("llama", "pfeiffer", inner(residual_before_ln=False), "config.residual_before_ln", "added twice"),
    )
    yield (
        "post_add",
        Refused(
            "llama", "pfeiffer", inner(residual_before_ln="post_add"), "config.residual_before_ln", "no norm between"
        ),
    )
    yield (
        "hooked",
        Refused("qwen3", "pfeiffer", inner(original_ln_after=False), "config.original_ln_after", "interface"),
    )
    yield (
        "hooked_twice",
        Refused("qwen3", "pfeiffer", inner(residual_before_ln=False), "config.residual_before_ln", "added twice"),
    )
    yield "nowhere", Refused("llama", "pfeiffer", inner(output_adapter=False), "config", "would do nothing")
    yield "flag", Refused("llama", "pfeiffer", inner(mh_adapter="yes"), "config.mh_adapter", "one of true, false")
    yield "reduction_0", Refused("llama", "parallel", inner(reduction_factor=0), "config.reduction_factor", "above 0")
    yield (
        "reduction_text",
        Refused("llama", "parallel", inner(reduction_factor="4"), "config.reduction_factor", "a number"),
    )
    yield (
        "reduction_map",
        Refused(
            "llama", "parallel", inner(reduction_factor={"0": 4}), "config.reduction_factor", "layer 1, or a default"
        ),
    )
    yield "reduction_other", Refused("llama", "parallel", inner(reduction_factor=2), DOWN, "makes 32 features 16")
    yield (
        "function",
        Refused("llama", "pfeiffer", inner(non_linearity="mish"), "config.non_linearity", "one of relu, swish"),
    )
    yield "function_none", Refused("llama", "pfeiffer", inner(non_linearity=...), "config.non_linearity", "a value")
    yield "scaling", Refused("llama", "pfeiffer", inner(scaling="large"), "config.scaling", "learned, channel")
    yield (
        "scaling_channel",
        Refused("llama", "compacter", inner_with(scaling="channel"), "config.scaling", "no Kronecker form"),
    )
    yield "phm_dim", Refused("llama", "compacter", inner(phm_dim=3), "config.phm_dim", "a divisor of 32 and 8")
    yield "gemma", Refused("gemma3", "lora", as_bottleneck, "config", "in front of the norm behind the sublayer")


def inner_with(**settings: Any) -> Change:
    """With these settings and a scale per channel to take."""

    def change(config: Config, tensors: Tensors) -> None:
        merge(config["config"], settings)
        for name in [name for name in tensors if name.endswith(".adapter_up.b")]:
            tensors[name.replace("adapter_up.b", "scaling")] = torch.ones(32)

    return change


def as_bottleneck(config: Config, _: Tensors) -> None:
    """The config of another adapter in the place of this one's."""
    config["config"] = adapterhub.config("llama", "pfeiffer")["config"]


def _linears() -> Iterator[tuple[str, Refused]]:
    yield (
        "matrices",
        Refused("llama", "lora", inner(attn_matrices=["q", "o"]), "config.attn_matrices", "wraps no other module"),
    )
    nothing = {"selfattn_lora": False, "intermediate_lora": False, "output_lora": False}
    yield "no_linear", Refused("llama", "lora", inner(**nothing), "config", "a linear to adapt")
    yield "r", Refused("llama", "lora", inner(r=0), "config.r", "at least 1")
    yield "alpha", Refused("llama", "lora", inner(alpha="8"), "config.alpha", "a number")
    yield (
        "mode",
        Refused("llama", "lora", inner(composition_mode="mul"), "config.composition_mode", "one of add, scale"),
    )
    yield "dora_fused", Refused("gpt2", "lora", inner(use_dora=True), "config", "plain linears only")
    yield "vera_fused", Refused("gpt2", "lora", inner(vera_d=0.1), "config", "plain linears only")
    yield (
        "vera_shapes",
        Refused("llama", "vera", inner(attn_matrices=["q", "k"]), "model.shared_parameters.task.lora_B", "[32, 4]"),
    )
    yield "ia3_gate", Refused("llama", "ia3", inner(use_gating=True), "config.use_gating", "depends on the input")
    yield "ia3_dora", Refused("llama", "ia3", inner(use_dora=True), "config.use_dora", "no vectors with DoRA")
    yield "ia3_rank", Refused("llama", "ia3", inner(r=2), "config.r", "r = 1 only")
    yield "gate_missing", Refused("llama", "lora", inner(use_gating=True), "gate", "use_gating is true")


def _prefixes() -> Iterator[tuple[str, Refused]]:
    yield "interface", Refused("qwen3", "lora", as_prefix, "config", "AdapterHub has none for qwen3")
    yield (
        "all_left_out",
        Refused("llama", "prefix", inner(leave_out=[0, 1]), "config.leave_out", "a layer that is not left out"),
    )
    yield "length", Refused("llama", "prefix", inner(prefix_length=6), "wte", "6 tokens, 2 layers, 2 heads of 8")
    yield "shared_gate", Refused("llama", "prefix_gated", inner(shared_gating=True), "prefix_gates", "shape [1, 32]")


def as_prefix(config: Config, _: Tensors) -> None:
    """The config of another adapter in the place of this one's."""
    config["config"] = adapterhub.config("llama", "prefix")["config"]


REFUSED = dict([*_files(), *_bottlenecks(), *_linears(), *_prefixes()])


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused_by_field_and_reason(case, tmp_path):
    with pytest.raises(AdapterInvalid) as caught:
        read(case.family, case.kind, case.change, tmp_path)
    assert case.field in caught.value.field
    assert case.words in caught.value.message


def test_a_backbone_that_adapterhub_does_not_know_has_none_of_its_adapters(tmp_path):
    with pytest.raises(AdapterInvalid) as caught:
        read("llama", "lora", lambda *_: None, tmp_path, family="olmo2")
    assert "a family that AdapterHub has built in and weft serves (gpt2, llama," in caught.value.message


def test_heads_of_another_width_have_no_prefixes(tmp_path):
    layers = tuple(replace(layer, key_size=16) for layer in sites("llama").info.layers)
    with pytest.raises(AdapterInvalid, match="unequal sizes"):
        read("llama", "prefix", lambda *_: None, tmp_path, layers=layers)
    layers = tuple(replace(layer, value_size=16) for layer in layers)
    with pytest.raises(AdapterInvalid, match="2 heads of 16"):
        read("llama", "prefix", lambda *_: None, tmp_path, layers=layers)


def test_two_members_of_one_method_may_have_different_layers(tmp_path):
    def change(config: Config, _: Tensors) -> None:
        pair = config["config"]["configs"][1]
        config["config"]["configs"][1:] = [{**pair, "leave_out": [1]}, {**pair, "leave_out": [0], "scaling": 2.0}]

    parsed = read("llama", "mam", change, tmp_path)
    assert [part.layer for part in parsed.parts if isinstance(part, Bottleneck)] == [0, 1]


@pytest.mark.parametrize(
    ("version", "alpha"),
    [("adapters.1.0.1", 4), ("adapters.0.2.0", 4), ("adapters.1.1.0.dev0", 4), ("adapters.1.1.0", 12), ("3.2.1", 12)],
)
def test_lora_before_1_1_was_trained_with_alpha_r(version, alpha, tmp_path):
    def change(config: Config, _: Tensors) -> None:
        config["version"], config["config"]["alpha"] = version, 12

    parsed = read("llama", "lora", change, tmp_path)
    scales = {o.scale for said in parsed.sites.values() for o in said.operators if isinstance(o, LowRank)}
    assert scales == {alpha / 4}
    assert bool(parsed.notes) == (alpha == 4)


@pytest.mark.parametrize(("version", "act"), [("adapters.1.3.0", "gelu"), ("2.1.0", "gelu"), (..., "gelu_tanh")])
def test_files_without_a_version_mean_another_gelu(version, act, tmp_path):
    def change(config: Config, _: Tensors) -> None:
        merge(config, {"version": version})
        config["config"]["non_linearity"] = "gelu"

    parsed = read("gpt2", "pfeiffer", change, tmp_path)
    assert {part.act for part in parsed.parts if isinstance(part, Bottleneck)} == {act}


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("lora", "model.", ""),
        ("prefix", "model.prefix_tuning", "model.layers.1.self_attn.prefix_tuning.pool"),
        ("pfeiffer_norm", "adapter_down.0.", "adapter_norm_before."),
        ("houlsby", ".adapters.", ".layer_text_task_adapters."),
    ],
)
def test_other_names_of_the_same_tensors_are_known(kind, old, new, tmp_path):
    parsed = read("llama", kind, renamed(old, new), tmp_path)
    assert parsed.sites or parsed.parts


def test_what_a_silent_file_means_is_what_the_library_takes(tmp_path):
    def change(config: Config, _: Tensors) -> None:
        for key in ("original_ln_after", "residual_before_ln", "leave_out", "use_gating", "phm_layer", "ln_before"):
            del config["config"][key]

    (first, *_) = read("llama", "pfeiffer", change, tmp_path).parts
    assert isinstance(first, Bottleneck)
    assert first.tap == "h+x_res"
