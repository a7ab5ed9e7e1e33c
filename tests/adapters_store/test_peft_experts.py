"""target_parameters of PEFT's LORA: what its files compile to, beside peft itself, and what is said of broken ones."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.adapters_store.native_blocks import TOLERANCE
from tests.support.backbones import build
from tests.support.methods.peft_experts import CASES, DOWN, MIXTRAL, UP, transposed
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.composition import joined
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.merge import Member, merge
from weft.adapters_store.operators import ParsedAdapter
from weft.kernels.extras import Kind
from weft.kernels.layout import unpack_records
from weft.server.backbone.model import Backbone

BOTH, ONE, _ = CASES
COUNT = 4
EXPERTS = "base_model.model.model.layers.0.mlp.experts"
OUTER_A, INNER_A = f"{EXPERTS}.lora_A.weight", f"{EXPERTS}.base_layer.lora_A.weight"
OUTER_B, INNER_B = f"{EXPERTS}.lora_B.weight", f"{EXPERTS}.base_layer.lora_B.weight"

Deltas = Mapping[tuple[int, int], Tensor]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(build(MIXTRAL))


def deltas_of(backbone: Backbone, parsed: ParsedAdapter) -> tuple[Deltas, int]:
    """[experts, out, in] by (module, parameter) out of a block, and the bytes of the factors they were made of."""
    image, report = compile_adapter(parsed, backbone, backbone.geometry, 1 << 30)
    assert report.device_bytes == image.numel() == block_bytes(parsed, backbone.geometry, backbone)
    found, nbytes = {}, 0
    for record in unpack_records(backbone.geometry, image):
        assert record.kind is Kind.EXPERTS
        a, b = record.tensors
        assert a is not None
        assert b is not None
        left, right = b.double().view(COUNT, -1, b.shape[1]), a.double().view(COUNT, -1, a.shape[1])
        found[record.place, record.options[0]] = left.transpose(1, 2) @ right
        nbytes += a.nbytes + b.nbytes
    return found, nbytes


def by_peft(folder: Path, base: PreTrainedModel) -> Deltas:
    """The same, as peft says them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, str(folder))
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            layer, parameter = int(name.split("layers.")[1][0]), module.parameter_name
            found[layer, ("gate_up_proj", "down_proj").index(parameter)] = module.get_delta_weight("default").double()
    return found


@pytest.mark.parametrize("case", [BOTH, ONE], ids=lambda case: case.name)
def test_deltas_are_those_of_peft(backbone, case, tmp_path):
    folder = case.make(MIXTRAL, tmp_path, 3)
    (got, nbytes), want = deltas_of(backbone, read_adapter(folder, backbone.info)), by_peft(folder, build(MIXTRAL))
    assert got.keys() == want.keys()
    for key, delta in want.items():
        assert (got[key] - delta).abs().max() <= TOLERANCE * delta.abs().max()
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    assert nbytes == sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)


def test_parameters_that_lie_the_other_way_change_nothing_in_the_files(tmp_path):
    backbone, folder = Backbone(transposed()), BOTH.make(MIXTRAL, tmp_path, 3)
    got, _ = deltas_of(backbone, read_adapter(folder, backbone.info))
    for key, delta in by_peft(folder, transposed()).items():
        want = delta.transpose(1, 2)
        assert (got[key] - want).abs().max() <= TOLERANCE * want.abs().max()


def test_the_report_says_what_was_found(backbone, tmp_path):
    parsed = read_adapter(BOTH.make(MIXTRAL, tmp_path, 3), backbone.info)
    report = compile_adapter(parsed, backbone, backbone.geometry, 1 << 30)[1]
    said = {(site.module, site.operators) for site in report.sites}
    path = "model.layers.1.mlp.experts"
    assert (path, ("low_rank r=2 of 4 experts in gate_up_proj",)) in said
    assert (path, ("low_rank r=4 of 4 experts in down_proj",)) in said


def test_several_add_up_with_their_weights(backbone, tmp_path):
    read = [read_adapter(case.make(MIXTRAL, tmp_path / case.name, 3), backbone.info) for case in (BOTH, ONE)]
    one, other = (deltas_of(backbone, parsed)[0] for parsed in read)
    merged = merge(joined([Member("a", read[0], 0.5), Member("b", read[1], 3.0)]), "COMPOSED", "weft")
    together = deltas_of(backbone, merged)[0]
    assert together.keys() == one.keys()
    for key, delta in together.items():
        want = 0.5 * one[key] + 3.0 * other.get(key, torch.zeros(()))
        assert (delta - want).abs().max() <= TOLERANCE * want.abs().max()


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


# by name: changed settings, changed tensors, the field that is named, words of the message
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str, str]] = {
    "router": (
        {"target_parameters": [UP, DOWN, "gate.weight"]},
        {},
        "target_parameters",
        "parameters of experts, like",
    ),
    "part_of_a_name": ({"target_parameters": ["proj"]}, {}, "target_parameters", "no others are served"),
    "text": ({"target_parameters": UP}, {}, "target_parameters", "a list of names"),
    "dora": ({"use_dora": True}, {}, "use_dora", "PEFT has none together with target_parameters"),
    "lora_bias": ({"lora_bias": True}, {}, "lora_bias", "PEFT has none together with target_parameters"),
    "dropout": ({"lora_dropout": 0.1}, {}, "lora_dropout", "expected null, false or 0, got 0.1"),
    "kasa": ({"kasa_config": {}}, {}, "kasa_config", "PEFT has none together with target_parameters"),
    "qalora": ({"use_qalora": True, "qalora_group_size": 2}, {}, "use_qalora", "PEFT has none together"),
    "alora": ({"alora_invocation_tokens": [3]}, {}, "alora_invocation_tokens", "PEFT has none together"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights", "PEFT has none together"),
    "experts_as_a_module": ({"target_modules": ["experts"]}, {}, "target_modules", "linear modules or"),
    "exclude": ({"target_modules": [], "exclude_modules": ["experts"]}, {}, "exclude_modules", "among modules"),
    "layers": ({"target_modules": None, "layers_to_transform": [1]}, {}, "layers_to_transform", "among modules"),
    "other_rank": ({"rank_pattern": {}}, {}, INNER_A, "shape [16, 32], got [8, 32] (r is 4 here"),
    "missing": ({}, {INNER_B: None}, INNER_B, "target_parameters names parameters of its module"),
    "missing_outer": ({}, {OUTER_A: None}, OUTER_A, "target_parameters names parameters of its module"),
    "one_too_many": ({"target_parameters": [DOWN]}, {}, INNER_A, "tensors of the modules that the config targets"),
    "not_said": ({"target_parameters": []}, {}, OUTER_A, "tensors of the modules that the config targets"),
    "swapped": ({}, {OUTER_A: ones(8, 32), INNER_A: ones(16, 48)}, INNER_A, "shape [8, 32], got [16, 48]"),
    "not_by_expert": ({}, {OUTER_B: ones(4, 32, 4)}, OUTER_B, "shape [32, 16], got [4, 32, 4]"),
    "integers": ({}, {OUTER_B: ones(32, 16).int()}, OUTER_B, "dtype F32 or F16 or BF16"),
    "nan": ({}, {INNER_B: ones(96, 8) * float("nan")}, INNER_B, "finite values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_breaks_a_rule_is_refused_by_name(backbone, name, tmp_path):
    settings, changed, field, words = REFUSED[name]
    folder = BOTH.make(MIXTRAL, tmp_path, 3)
    config, weights = folder / "adapter_config.json", str(folder / "adapter_model.safetensors")
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    tensors = {**load_file(weights), **changed}
    save_file({n: t for n, t in tensors.items() if t is not None}, weights)
    with pytest.raises(AdapterInvalid) as refusal:
        compile_adapter(read_adapter(folder, backbone.info), backbone, backbone.geometry, 1 << 30)
    assert words in refusal.value.message
    assert refusal.value.field == field


def test_a_backbone_without_experts_says_so(tmp_path):
    folder = ONE.make(MIXTRAL, tmp_path, 3)
    with pytest.raises(AdapterInvalid, match=r"target_parameters: expected null, got .*llama has no experts"):
        read_adapter(folder, Backbone(build("llama")).info)
