"""X_UNION: what members of several formats compute together, where they may be, and what two cannot both do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.adapters_store.native_blocks import TOLERANCE, compare, compiled
from tests.support import adapterhub
from tests.support.backbones import build
from tests.support.catalogues import sites_of
from tests.support.methods import native_unions
from tests.support.methods.case import ALL, WholePass
from tests.support.methods.native_files import PREFIX, write
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.parts import Bottleneck, KVPrefix

CASES = {case.name: case for case in native_unions.CASES}
# those whose oracle changes parameters only
PARAMETERS = ["union_deltas", "union_scaled_then_added", "union_added_then_scaled"]
UP = "model.layers.1.mlp.up_proj"
NATIVE = {"format_version": 1}
INFO = sites_of(build("llama")).info


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", PARAMETERS)
def test_members_act_one_after_the_other(name, family, tmp_path):
    case = CASES[name]
    oracle = case.oracle(family, case.make(family, tmp_path / "a", 3))
    assert isinstance(oracle, WholePass)
    found = compare(compiled(family, tmp_path / "a"), oracle.model)
    assert found.error <= TOLERANCE
    assert found.change >= 100 * TOLERANCE
    other = compare(compiled(family, case.make(family, tmp_path / "b", 4)), oracle.model)
    assert other.error > 1e-2


def test_a_member_with_layers_is_in_these_alone(tmp_path):
    parsed = read_adapter(CASES["union_s4"].make("gemma3", tmp_path, 3), sites_of(build("gemma3")).info)
    layers = [(type(part).__name__, part.layer) for part in parsed.parts if isinstance(part, Bottleneck | KVPrefix)]
    assert layers == [("Bottleneck", 0), ("Bottleneck", 2), ("KVPrefix", 1)]
    assert {path.split(".")[2] for path in parsed.sites} == {"0", "1"}
    assert list(parsed.sites) == sorted(parsed.sites, key=sites_of(build("gemma3")).info.index.__getitem__)


def test_a_union_of_one_is_its_member(tmp_path):
    tensors = {f"{PREFIX}{UP}.bias_delta": torch.randn(48)}
    alone = compiled("llama", write(tmp_path / "alone", "X_BITFIT", tensors))
    members = [{"peft_type": "X_BITFIT", **NATIVE}]
    union = compiled("llama", write(tmp_path / "union", "X_UNION", _named(tensors), members=members))
    assert union.report.sites == alone.report.sites
    assert union.nbytes == alone.nbytes


def test_a_member_may_be_an_adapterhub_file(tmp_path):
    tensors = _named(adapterhub.tensors("llama", "mam"))
    tensors[f"member.1.{PREFIX}{UP}.bias_delta"] = torch.ones(48)
    members = [adapterhub.config("llama", "mam"), {"peft_type": "X_BITFIT", **NATIVE}]
    parsed = read_adapter(write(tmp_path, "X_UNION", tensors, members=members), INFO)
    (tmp_path / "adapter_config.json").write_text(json.dumps(members[0]))
    save_file(adapterhub.tensors("llama", "mam"), str(tmp_path / "adapter_model.safetensors"))
    alone = read_adapter(tmp_path, INFO)
    assert [type(part) for part in parsed.parts] == [type(part) for part in alone.parts]
    assert list(parsed.sites) == [UP]
    assert (parsed.dialect, parsed.sites[UP].folds) == ("native, adapterhub", ())


def test_a_linear_says_in_which_dialect_it_was_read(tmp_path):
    tensors = _named(adapterhub.tensors("llama", "lora"))
    members = [adapterhub.config("llama", "lora"), {"peft_type": "X_BITFIT", **NATIVE}]
    other = UP.replace("mlp.up_proj", "self_attn.o_proj")
    beside = {f"member.1.{PREFIX}{other}.bias_delta": torch.ones(32)}
    parsed = read_adapter(write(tmp_path, "X_UNION", tensors | beside, members=members), INFO)
    said = {path: "read as adapterhub" in site.folds for path, site in parsed.sites.items()}
    assert said.pop(other) is False
    assert said
    assert all(said.values())


def _named(tensors: Mapping[str, Tensor], member: int = 0) -> dict[str, Tensor]:
    return {f"member.{member}.{name}": tensor for name, tensor in tensors.items()}


def refused(folder: Path, tensors: Mapping[str, Tensor], **settings: Any) -> AdapterInvalid:
    """Why these files are refused for the tiny llama."""
    with pytest.raises(AdapterInvalid) as refusal:
        read_adapter(write(folder, "X_UNION", tensors, **settings), INFO)
    return refusal.value


BITFIT = {"peft_type": "X_BITFIT", **NATIVE}
NORM = {"peft_type": "X_NORM", **NATIVE}
DENSE = {"peft_type": "X_SPARSE", **NATIVE}
IPT = {"peft_type": "X_IPT", "decoded": True, **NATIVE}
DELTA = {f"{PREFIX}{UP}.bias_delta": torch.ones(48)}
WEIGHT = {f"{PREFIX}model.norm.norm_weight": torch.ones(32)}
ABS = {f"{PREFIX}{UP}.weight.abs": torch.ones(48, 32)}
ROWS = {"prompt_embeddings": torch.ones(2, 32)}
TWO_NORMS = {**_named(WEIGHT), **_named(WEIGHT, 1)}
MASKED = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 1,
    "lora_alpha": 1,
    "target_modules": [UP],
    "alora_invocation_tokens": [3],
}
LORA = {f"{PREFIX}{UP}.lora_A.weight": torch.ones(1, 32), f"{PREFIX}{UP}.lora_B.weight": torch.ones(48, 1)}

# id → tensors, settings, the field that is named, words of the message
REFUSED: Mapping[str, tuple[Mapping[str, Tensor], dict[str, Any], str, str]] = {
    "no_members": (_named(DELTA), {}, "members", "expected a value, got none"),
    "members_no_list": (_named(DELTA), {"members": BITFIT}, "members", "a list of objects"),
    "members_of_text": (_named(DELTA), {"members": ["X_BITFIT"]}, "members", "a list of objects"),
    "members_empty": (_named(DELTA), {"members": []}, "members", "1 to 64 configs, got 0"),
    "members_many": (_named(DELTA), {"members": [BITFIT] * 65}, "members", "1 to 64 configs, got 65"),
    "unknown_key": (_named(DELTA), {"members": [BITFIT], "order": []}, "order", "settings of X_UNION"),
    "no_prefix": (DELTA, {"members": [BITFIT]}, f"{PREFIX}{UP}.bias_delta", "begins with member. and a number below 1"),
    "other_number": (_named(DELTA, 1), {"members": [BITFIT]}, f"member.1.{PREFIX}{UP}.bias_delta", "a number below 1"),
    "padded_number": (
        {f"member.00.{PREFIX}{UP}.bias_delta": torch.ones(48)},
        {"members": [BITFIT]},
        f"member.00.{PREFIX}{UP}.bias_delta",
        "a number below 1",
    ),
    "member_without_tensors": (
        _named(DELTA),
        {"members": [BITFIT, NORM]},
        "members[1]",
        "tensors named member.1., got none",
    ),
    "union_of_unions": (
        _named(DELTA),
        {"members": [{"peft_type": "X_UNION", "members": [BITFIT]}]},
        "members[0].peft_type",
        "list the members of both",
    ),
    "unknown_type": (
        _named(DELTA),
        {"members": [{"peft_type": "X_OTHER"}]},
        "members[0].peft_type",
        "members[0] (X_OTHER): peft_type: expected one of",
    ),
    "no_type": (_named(DELTA), {"members": [{}]}, "members[0].peft_type", "got null"),
    "member_setting": (
        _named(DELTA),
        {"members": [{**BITFIT, "mode": "both"}]},
        "members[0].mode",
        "members[0] (X_BITFIT): mode: expected one of delta, value",
    ),
    "member_unknown_key": (
        _named(DELTA),
        {"members": [{**BITFIT, "sauce": 1}]},
        "members[0].sauce",
        "settings of X_BITFIT",
    ),
    "member_tensor": (
        _named({f"{PREFIX}{UP}.bias_delta": torch.ones(47)}),
        {"members": [BITFIT]},
        f"member.0.{PREFIX}{UP}.bias_delta",
        "expected shape [48], got [47]",
    ),
    "member_missing_tensor": (
        _named({f"{PREFIX}{UP}.krona_A": torch.ones(4, 12)}),
        {"members": [{"peft_type": "X_KRONA", "scale": 1, **NATIVE}]},
        f"members[0].{PREFIX}{UP}.krona_B",
        "expected this tensor, got none",
    ),
    "layers_beyond": (
        _named(DELTA),
        {"members": [{**BITFIT, "layers": [0, 2]}]},
        "members[0].layers",
        "from 0 to 1, ascending, got [0, 2]",
    ),
    "layers_twice": (_named(DELTA), {"members": [{**BITFIT, "layers": [1, 1]}]}, "members[0].layers", "ascending"),
    "layers_empty": (_named(DELTA), {"members": [{**BITFIT, "layers": []}]}, "members[0].layers", "ascending, got []"),
    "layers_text": (_named(DELTA), {"members": [{**BITFIT, "layers": "all"}]}, "members[0].layers", "an integer"),
    "outside_its_layers": (
        _named(DELTA),
        {"members": [{**BITFIT, "layers": [0]}]},
        f"member.0.{PREFIX}{UP}.bias_delta",
        "a module of this backbone",
    ),
    "norm_outside_layers": (
        _named(WEIGHT),
        {"members": [{**NORM, "layers": [0]}]},
        f"member.0.{PREFIX}model.norm.norm_weight",
        "a module of this backbone",
    ),
    "prompt_in_layers": (
        _named(ROWS),
        {"members": [{**IPT, "layers": [0]}]},
        "member.0.prompt_embeddings",
        "a backbone whose input embedding weft knows",
    ),
    "mask_in_layers": (
        _named(LORA),
        {"members": [{**MASKED, "layers": [1]}]},
        "members[0].alora_invocation_tokens",
        "members[0] (LORA)",
    ),
    "two_norms": (
        TWO_NORMS,
        {"members": [NORM, NORM]},
        "members[1] (X_NORM)",
        "another beside that of members[0] (X_NORM)",
    ),
    "two_replacements": (
        {**_named(ABS), **_named(ABS, 1)},
        {"members": [DENSE, DENSE]},
        "members[1] (X_SPARSE)",
        f"one replacement of the weight of {UP}, got another beside that of members[0] (X_SPARSE)",
    ),
    "mask_of_one": (
        {**_named(LORA), **_named(DELTA, 1)},
        {"members": [MASKED, BITFIT]},
        "members[1] (X_BITFIT)",
        "the invocation tokens of members[0] (LORA)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_union_is_refused_with_the_name_of_its_member(name, tmp_path):
    tensors, settings, field, words = REFUSED[name]
    error = refused(tmp_path, tensors, **settings)
    assert words in error.message
    assert error.field == field


def test_two_soft_prompts_stand_one_behind_the_other(tmp_path):
    rows = torch.randn(2, 32), torch.randn(3, 32)
    tensors = {f"member.{k}.prompt_embeddings": each for k, each in enumerate(rows)}
    block = compiled("llama", write(tmp_path, "X_UNION", tensors, members=[IPT, IPT]))
    (record,) = block.records
    (found,) = record.tensors
    assert found is not None
    assert torch.equal(found, torch.cat(rows))


def test_values_are_refused_under_the_full_name_of_their_tensor(tmp_path):
    tensors = {**_named(DELTA), f"member.1.{PREFIX}{UP}.bias_delta": torch.full((48,), float("nan"))}
    with pytest.raises(AdapterInvalid, match="finite values") as refusal:
        compiled("llama", write(tmp_path, "X_UNION", tensors, members=[BITFIT, BITFIT]))
    assert refusal.value.field == f"member.1.{PREFIX}{UP}.bias_delta"
