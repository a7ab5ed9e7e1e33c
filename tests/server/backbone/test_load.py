"""Loading a backbone: which device and dtype are chosen, and what is said of files that are no backbone."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.backbones import build
from weft.server.backbone import load
from weft.server.backbone.errors import BackboneDamaged, BackboneNotFound, BackboneTooLarge
from weft.server.backbone.load import choose_device, choose_dtype, load_model, moved

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
KEY = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    build("llama").save_pretrained(tmp_path)
    return tmp_path


def changed(folder, **tensors):
    """Write weights again with some of them changed, or left out where None."""
    path = folder / "model.safetensors"
    found = load_file(path) | tensors
    save_file({key: tensor for key, tensor in found.items() if tensor is not None}, path, metadata={"format": "pt"})


def refused(folder, kind=BackboneDamaged):
    with pytest.raises(kind) as refusal:
        load_model(str(folder), torch.float32, CPU)
    assert str(folder) in str(refusal.value)
    return str(refusal.value)


def test_a_parameter_that_is_not_there_is_named(folder):
    changed(folder, **{KEY: None})
    assert f"expected every parameter in *.safetensors, got none for {KEY}" in refused(folder)


def test_many_parameters_that_are_not_there_are_counted(folder):
    path = folder / "model.safetensors"
    save_file({"lm_head.weight": load_file(path)["lm_head.weight"]}, path, metadata={"format": "pt"})
    assert refused(folder).endswith(" and 16 more")


def test_a_parameter_of_another_shape_is_named_with_both(folder):
    changed(folder, **{KEY: torch.zeros(3, 4)})
    assert f"{KEY} [3, 4] where its config wants [48, 32]" in refused(folder)


@pytest.mark.parametrize("damage", ["cut", "head", "empty"])
def test_weights_that_are_cut_or_damaged_are_no_traceback(damage, folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-100], "head": b"\xff" * 8 + raw[8:], "empty": b""}[damage])
    assert "expected whole *.safetensors" in refused(folder)


@pytest.mark.parametrize("settings", [{"hidden_size": "x"}, {"num_attention_heads": 0}], ids=str)
def test_a_config_that_makes_no_model_is_no_traceback(settings, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert "expected a config.json that its family can be built from" in refused(folder)


def test_a_config_that_is_no_json_is_not_a_backbone(folder):
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(folder, BackboneNotFound)


def test_tied_weights_are_not_missing(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    changed(folder, **{"lm_head.weight": None})
    assert load_model(str(folder), torch.float32, CPU).lm_head.weight.shape == (101, 32)


def test_a_device_without_room_names_the_option_and_the_size():
    class Large(nn.Linear):
        def to(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(BackboneTooLarge, match="device: expected room for 80 bytes of parameters on cuda:1"):
        moved(Large(4, 4), CUDA)


@pytest.fixture
def cuda(monkeypatch):
    """A machine with two devices; ``bfloat16``: whether they multiply it."""
    found = SimpleNamespace(bfloat16=True, asked=[])

    def is_bf16_supported(including_emulation=True):
        return including_emulation or found.bfloat16

    def on(device):
        found.asked.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    return found


def test_devices_by_name(cuda, monkeypatch):
    assert [choose_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        torch.device("cuda"), torch.device("cuda"), CUDA, CPU,
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(ValueError, match="device: expected a CUDA device for 'cuda:1', got none on this machine"):
        choose_device("cuda:1")


@pytest.mark.parametrize("name", ["cuda:7", "cuda:2", "cpu:1", "cuda:x", "cuda:", "tpu", ""])
def test_a_device_that_is_not_there_is_no_traceback(name, cuda):
    with pytest.raises(ValueError, match=f"^device: expected .*, got '{name}'$"):
        choose_device(name)


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_gets_bfloat16_where_it_multiplies_it_in_hardware(supported, expected, cuda):
    cuda.bfloat16 = supported
    assert choose_dtype("auto", CUDA) is expected
    assert cuda.asked == [CUDA]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags: fpu avx512_bf16", torch.bfloat16),
        ("flags: amx_bf16", torch.bfloat16),
        ("flags: fpu avx2", torch.float32),
        (None, torch.float32),
    ],
)
def test_a_processor_gets_bfloat16_where_it_multiplies_it(flags, expected, monkeypatch):
    def read_text(path):
        if flags is None:
            raise FileNotFoundError(path)
        return flags

    monkeypatch.setattr(Path, "read_text", read_text)
    assert choose_dtype("auto", CPU) is expected


def test_a_dtype_by_name_is_taken_as_it_is():
    assert [choose_dtype(name, CPU) for name in load.DTYPES] == list(load.DTYPES.values())
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16, float16 or auto, got 'int8'"):
        choose_dtype("int8", CPU)
