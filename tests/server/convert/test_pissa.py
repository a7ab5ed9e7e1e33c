"""LoRA that began as a part of the backbone: converted as peft converts it, bit for bit, and to the same logits."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.adapters_store.native_blocks import applied, compiled
from tests.server.convert.models import logits
from tests.support.adapters import LINEARS
from tests.support.backbones import build
from weft.server import cli

PROMPT = [5, 17, 40, 3, 88, 9]
KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "patterns": {"init_lora_weights": "pissa", "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
}


def trained(folder: Path, family: str = "llama", **settings: Any) -> PeftModel:
    """An adapter as it is before training in ``first``, and in ``last`` after; returns it as it is trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = LINEARS.get(family, LINEARS["llama"])
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)
        torch.manual_seed(0)
        model = get_peft_model(build(family), config)
        # as PEFT's guide says: the beginning is saved as one that changes nothing when it is loaded again
        config.init_lora_weights = True
        model.save_pretrained(str(folder / "first"))
        config.init_lora_weights = settings["init_lora_weights"]
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
        model.save_pretrained(str(folder / "last"))
        model.eval()
        return model


def convert(folder: Path, out: str = "out") -> int:
    """Run the command."""
    words = [str(folder / name) for name in ("last", "first", out)]
    return cli.main(["convert", "pissa", *words])


def change(folder: Path, **settings: Any) -> None:
    """Other settings in a folder."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_and_settings_are_those_that_peft_writes(kind, tmp_path, capsys):
    model = trained(tmp_path, **KINDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(tmp_path / "peft"), path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    assert convert(tmp_path) == 0
    assert "note: exact up to how the backbone was rounded" in capsys.readouterr().err
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    settings = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "peft")]
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"):
        assert settings[0][key] == settings[1][key], key


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("patterned", [False, True])
def test_the_converted_adapter_on_the_untouched_backbone_computes_what_was_trained(family, patterned, tmp_path):
    name = "q_proj" if family == "llama" else "c_attn"
    settings: dict[str, Any] = {"init_lora_weights": "pissa_niter_4"}
    if patterned:
        # what peft itself refuses to convert: its rule for patterns is not rsLoRA's
        settings |= {"use_rslora": True, "rank_pattern": {name: 6}, "alpha_pattern": {name: 11}}
    wanted = logits(trained(tmp_path, family, **settings), PROMPT)
    assert convert(tmp_path) == 0
    got = logits(applied(compiled(family, tmp_path / "out"), family), PROMPT)
    size = wanted.abs().max()
    assert (got - wanted).abs().max() <= 1e-4 * size
    assert (logits(build(family), PROMPT) - wanted).abs().max() >= 1e-2 * size
    # the control: as a plain LoRA it computes something else
    change(tmp_path / "last", init_lora_weights=True)
    naive = logits(applied(compiled(family, tmp_path / "last"), family), PROMPT)
    assert (naive - wanted).abs().max() >= 1e-2 * size


SAID: dict[str, tuple[str, dict[str, Any], str]] = {
    "loftq": ("last", {"init_lora_weights": "loftq"}, 'got "loftq" (its backbone became quantised weights'),
    "gaussian": ("last", {"init_lora_weights": "gaussian"}, "left the backbone as it is and needs no conversion"),
    "another method": ("last", {"peft_type": "LOKR"}, 'last: peft_type: expected LORA, got "LOKR"'),
    "dora": ("last", {"use_dora": True}, "last: use_dora: expected null or false, got true"),
    "kasa": ("first", {"kasa_config": {"beta": 1}}, "first: kasa_config: expected null or false"),
    "no rank": ("last", {"r": None}, "last: r: expected a number, got null"),
    "another rank": ("first", {"r": 8}, "first: r: expected 4, as after training, got 8"),
    "another pattern": ("first", {"rank_pattern": {"q": 1}}, "first: rank_pattern: expected {}, as after training"),
}


@pytest.mark.parametrize("kind", SAID)
def test_other_settings_are_refused(kind, tmp_path, capsys):
    trained(tmp_path, init_lora_weights="olora")
    which, settings, wanted = SAID[kind]
    change(tmp_path / which, **settings)
    assert convert(tmp_path) == 1
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_tensors_are_refused(tmp_path, capsys):
    trained(tmp_path, init_lora_weights="olora")
    file = tmp_path / "last" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2)}, file)
    assert convert(tmp_path) == 1
    assert "base_model.model.lm_head.weight: expected lora_A and lora_B alone" in capsys.readouterr().err
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    assert convert(tmp_path) == 1
    assert f"first: {name}: expected the tensors that the trained adapter has" in capsys.readouterr().err
    save_file({**tensors, name: tensors[name][:2].contiguous()}, file)
    assert convert(tmp_path) == 1
    assert f"first: {name}: expected shape [2, " in capsys.readouterr().err
    file.unlink()
    assert convert(tmp_path) == 1
    assert "adapter_model.safetensors: expected a file, got nothing there" in capsys.readouterr().err
    file.write_bytes(b"no such thing")
    assert convert(tmp_path) == 1
    assert "adapter_model.safetensors: expected a safetensors file, got " in capsys.readouterr().err
