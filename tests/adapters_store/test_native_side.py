"""X_LST: what its files compile to, and what is said of one that breaks a rule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters_store.native_blocks import TOLERANCE
from tests.support.backbones import build
from tests.support.methods.native_files import read, write
from tests.support.methods.native_side import CASES, TEMPERATURE, WIDTH
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.merge import Member, merge
from weft.kernels.extras import Extra, Kind
from weft.kernels.layout import unpack_records
from weft.server.backbone.model import Backbone

BY_NAME = {case.name: case for case in CASES}
Q = "side.block.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def backbones() -> Callable[[str], Backbone]:
    made: dict[str, Backbone] = {}
    return lambda family: made.setdefault(family, Backbone(build(family)))


def record_of(backbone: Backbone, folder: Path) -> Extra:
    parsed = read_adapter(folder, backbone.info)
    image, report = compile_adapter(parsed, backbone, backbone.geometry, 1 << 30)
    assert report.device_bytes == image.numel() == block_bytes(parsed, backbone.geometry, backbone)
    assert report.traits.side_reduction == read(folder)[0]["reduction"]
    assert not report.traits.cacheable
    (record,) = unpack_records(backbone.geometry, image)
    assert record.kind is Kind.SIDE
    return record


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("name", BY_NAME)
def test_gates_are_folded_and_everything_else_is_as_it_was(backbones, name, family, tmp_path):
    folder = BY_NAME[name].make(family, tmp_path, 3)
    record, (config, tensors) = record_of(backbones(family), folder), read(folder)
    (side,) = [s for s in backbones(family).info.sides if s.reduction == config["reduction"]]
    layers = config["layers"]
    assert record.options == (config["reduction"], *layers)
    gates = {i: torch.sigmoid(tensors[f"side.gate_alpha.{i}"].double().reshape(()) / TEMPERATURE) for i in layers}
    expected = [torch.stack([gates[i] for i in layers])]
    expected += [tensors[f"side.first_down.{end}"] for end in ("weight", "bias")]
    expected += [tensors[f"side.up.{end}"] * WIDTH**-0.5 for end in ("weight", "bias")]
    expected += [tensors[f"side.final_norm.{n}"] for n, _ in side.norm]
    for i in layers:
        expected += [(1 - gates[i]) * tensors[f"side.down.{i}.{end}"].double() for end in ("weight", "bias")]
        expected += [tensors[f"side.block.{i}.{n}"] for n, _ in side.block]
    for value, stored in zip(expected, record.tensors, strict=True):
        assert stored is not None
        error = (stored.double().reshape(value.shape) - value.double()).abs().max()
        assert error <= TOLERANCE * value.abs().max()


def test_a_block_takes_no_more_than_its_tensors(backbones, tmp_path):
    """But for the ends of rows, which are padded, and the block's head."""
    backbone, folder = backbones("llama"), BY_NAME["lst"].make("llama", tmp_path, 3)
    record = record_of(backbone, folder)
    stored = sum(tensor.numel() for tensor in record.tensors if tensor is not None)
    assert stored == sum(tensor.numel() for tensor in read(folder)[1].values())


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


# by name: changed settings, changed tensors, the field that is named, words of the message
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str, str]] = {
    "residual_after": ({"residual_after": True}, {}, "residual_after", "its residual stream included"),
    "merge_last": ({"merge_last": True}, {}, "merge_last", "the head reads the side network alone"),
    "side_config": ({"side_config": {"heads": 2}}, {}, "side_config", "the backbone's own, `reduction` times narrower"),
    "reduction": ({"reduction": 3}, {}, "reduction", "one of 2, 4, which divide this backbone's widths, got 3"),
    "no_reduction": ({"reduction": ...}, {}, "reduction", "got none"),
    "temperature": ({"gate_temperature": 0}, {}, "gate_temperature", "a number above 0"),
    "no_temperature": ({"gate_temperature": ...}, {}, "gate_temperature", "got none"),
    "no_layers": ({"layers": ...}, {}, "layers", "decoder layers from 0 to 1, ascending, got null"),
    "empty_layers": ({"layers": []}, {}, "layers", "got []"),
    "layers_twice": ({"layers": [1, 1]}, {}, "layers", "got [1, 1]"),
    "layers_beyond": ({"layers": [0, 2]}, {}, "layers", "got [0, 2]"),
    "other_layer": ({"layers": [0]}, {}, "side.block.1.input_layernorm.weight", "of layers 0, whose blocks have"),
    "unknown_key": ({"sauce": 1}, {}, "sauce", "settings of X_LST"),
    "missing": ({}, {Q: None}, Q, "this tensor, got none (layers are [0, 1])"),
    "shape": ({}, {Q: ones(16, 32)}, Q, "shape [16, 16], got [16, 32] (the backbone is 32 wide, the side network 16)"),
    "down": ({}, {"side.down.0.weight": ones(32, 16)}, "side.down.0.weight", "shape [16, 32], got [32, 16]"),
    "alpha": ({}, {"side.gate_alpha.0": ones(2)}, "side.gate_alpha.0", "one number, got [2]"),
    "integers": ({}, {Q: ones(16, 16).int()}, Q, "dtype F32 or F16 or BF16, got I32"),
    "nan": ({}, {Q: ones(16, 16) * float("nan")}, Q, "finite values"),
    "nan_alpha": ({}, {"side.gate_alpha.1": ones(1) * float("inf")}, "side.gate_alpha.1", "finite values"),
    "stray": ({}, {"side.lm_head.weight": ones(101, 16)}, "side.lm_head.weight", "a tensor of X_LST: side.first_down"),
    "no_prefix": ({}, {"up.weight": ones(32, 16)}, "up.weight", "a tensor of X_LST"),
    "bias": ({}, {"side.block.0.self_attn.q_proj.bias": ones(16)}, "side.block.0.self_attn.q_proj.bias", "another"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_breaks_a_rule_is_refused_by_name(backbones, name, tmp_path):
    settings, changed, field, words = REFUSED[name]
    config, tensors = read(BY_NAME["lst"].make("llama", tmp_path / "right", 3))
    said = {**config, **settings}
    kept = {n: t for n, t in {**tensors, **changed}.items() if t is not None}
    folder = write(tmp_path / "wrong", said.pop("peft_type"), kept, **said)
    with pytest.raises(AdapterInvalid) as refusal:
        record_of(backbones("llama"), folder)
    assert words in refusal.value.message
    assert refusal.value.field == field


def test_one_request_has_one_side_network_and_no_weight_of_it(backbones, tmp_path):
    parsed = read_adapter(BY_NAME["lst"].make("llama", tmp_path, 3), backbones("llama").info)
    with pytest.raises(AdapterInvalid, match="b: expected a side network in one adapter, got another beside that of a"):
        merge([Member("a", parsed), Member("b", parsed)], "COMPOSED", "weft")
    with pytest.raises(AdapterInvalid, match=r"weight of a: expected 1, got 0.5 \(a side network has no weight\)"):
        merge([Member("a", parsed, 0.5)], "COMPOSED", "weft")
