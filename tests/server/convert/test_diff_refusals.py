"""Two folders that are no base and tuned model: each reason is named, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.server.convert import models
from tests.server.convert.models import save
from tests.support.backbones import build
from weft.server import cli
from weft.server.convert.diff import Options, convert_diff
from weft.server.convert.problems import CannotConvert

Q = "model.layers.0.self_attn.q_proj.weight"
WHOLE = "model.safetensors"


def convert(folder: Path, *words: str) -> int:
    """Run the command on ``base`` and ``tuned`` of a folder."""
    pair = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned"), "--out", str(folder / "out")]
    return cli.main(["convert", "diff", *pair, *words])


def both(folder: Path, family: str = "llama") -> Path:
    """A folder with an equal base and tuned model."""
    for name in ("base", "tuned"):
        save(build(family), folder / name)
    return folder


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Other tensors in a model's folder."""
    tensors = load_file(folder / WHOLE)
    edit(tensors)
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})


def put(name: str, value: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], object]:
    """An edit that sets a tensor, or takes it away."""
    return lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value})


def setting(folder: Path, **values: object) -> None:
    """Other settings of a model."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without(path: Path) -> None:
    path.unlink()


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q][3, 3] = float("nan")


def sharded(folder: Path, text: str) -> int:
    (folder / WHOLE).unlink()
    return (folder / f"{WHOLE}.index.json").write_text(text)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "equal": (
        lambda f: None,
        "tuned: expected weights that differ from those of base, got the same in every parameter",
    ),
    "no config": (lambda f: without(f / "base" / "config.json"), "folder with config.json, got one without it"),
    "no weights": (lambda f: without(f / "base" / WHOLE), "model.safetensors.index.json, got one with neither"),
    "a pickle": (
        lambda f: (f / "tuned" / WHOLE).rename(f / "tuned" / "pytorch_model.bin"),
        "got one with pytorch_model.bin (load it and save it again: save_pretrained writes safetensors)",
    ),
    "damaged": (lambda f: (f / "tuned" / WHOLE).write_bytes(b"12345678junk"), "expected a safetensors file, got "),
    "no json": (lambda f: sharded(f / "tuned", "{"), "expected a JSON object with a weight_map, got something else"),
    "a path": (
        lambda f: sharded(f / "tuned", '{"weight_map": {"a": "../base/model.safetensors"}}'),
        "expected a weight_map from names to files of the same folder, got something else",
    ),
    "no shard": (
        lambda f: sharded(f / "tuned", '{"weight_map": {"a": "gone.safetensors"}}'),
        "expected all files that model.safetensors.index.json names, got no gone.safetensors",
    ),
    "no tensor": (
        lambda f: (
            sharded(f / "tuned", '{"weight_map": {"model.norm.weight": "x.safetensors"}}'),
            save_file({"other": torch.ones(2)}, f / "tuned" / "x.safetensors"),
        ),
        "x.safetensors: expected a tensor model.norm.weight, got ",
    ),
    "other shape": (
        lambda f: change(f / "tuned", put(Q, torch.ones(32, 16))),
        f"tuned: {Q}: expected shape [32, 32], as its config.json says, got [32, 16]",
    ),
    "other architecture": (
        lambda f: setting(f / "tuned", vocab_size=7),
        "tuned: lm_head.weight: expected the architecture of base, where this is [101, 32], got [7, 32]",
    ),
    "a parameter less": (
        lambda f: change(f / "tuned", put(Q, None)),
        f"tuned: {Q}: expected this parameter, which the other folder has, got none",
    ),
    "a parameter more": (
        lambda f: change(f / "tuned", put("score.weight", torch.ones(2, 32))),
        "tuned: score.weight: expected parameters of the model in its config.json, got others",
    ),
    "quantised": (
        lambda f: change(f / "tuned", put(Q, torch.ones(32, 32, dtype=torch.int8))),
        f"tuned: {Q}: expected floats, got torch.int8 (quantised weights cannot be compared",
    ),
    "not finite": (lambda f: change(f / "tuned", nan), f"tuned: {Q}: expected finite numbers, got NaN or infinity"),
    "no model": (
        lambda f: (f / "tuned" / "config.json").write_text('{"model_type": "t5"}'),
        "expected a causal language model of transformers (",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_other_folders_are_refused(kind, tmp_path, capsys):
    both(tmp_path)
    spoil, wanted = CASES[kind]
    spoil(tmp_path)
    assert convert(tmp_path) == 1
    assert wanted in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_parameters_that_no_adapter_changes_are_refused(tmp_path, capsys):
    both(tmp_path, "gpt2")
    change(tmp_path / "tuned", put("transformer.wpe.weight", torch.ones(256, 32)))
    assert convert(tmp_path) == 1
    assert "tuned: transformer.wpe.weight: expected changes of linear modules, norms" in capsys.readouterr().err


def experts(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"] += 1


def attention(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q][3] += 1


def test_experts_may_stay_as_they_are_but_not_change(tmp_path, capsys):
    both(tmp_path, "mixtral")
    change(tmp_path / "tuned", attention)
    assert convert(tmp_path) == 0
    assert "note: 26 tensors that transformers names otherwise are equal in both folders" in capsys.readouterr().err
    (tmp_path / "out").rename(tmp_path / "good")
    change(tmp_path / "tuned", experts)
    assert convert(tmp_path) == 1
    assert "expected equal tensors where transformers gives parameters other names" in capsys.readouterr().err


def test_buffers_of_old_checkpoints_are_no_difference(tmp_path):
    both(tmp_path)
    change(tmp_path / "tuned", put("model.rotary_emb.inv_freq", torch.ones(4)))
    change(tmp_path / "tuned", attention)
    assert convert(tmp_path) == 0


def test_names_without_the_base_model_in_front_are_the_same_names(tmp_path):
    both(tmp_path, "gpt2")

    def shortened(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.ln_1.weight"] += 1

    change(tmp_path / "tuned", shortened)
    assert convert(tmp_path) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--error", "-1"], "--error must be a number from 0 to below 1, got -1"),
        (["--error", "1"], "--error must be a number from 0 to below 1, got 1"),
        (["--error", "nan"], "--error must be a number from 0 to below 1, got nan"),
        (["--form", "low-rank"], "--form low-rank needs an --error above 0"),
    ],
)
def test_a_wrong_command_line_ends_with_two(words, text, tmp_path, capsys):
    assert convert(tmp_path, *words) == 2
    assert f"error: {text}" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"error": 1.0}, {"form": "round"}, {"form": "low-rank"}])
def test_options_are_checked_for_programs_too(options):
    with pytest.raises(CannotConvert, match="expected"):
        Options(**options)


def tuned_by(kind: str) -> PreTrainedModel:
    return models.tuned("llama", getattr(models, kind))


def test_forms_that_do_not_fit_are_refused(tmp_path, capsys):
    save(build("llama"), tmp_path / "base")
    save(tuned_by("everything"), tmp_path / "tuned")
    assert convert(tmp_path, "--form", "sparse") == 1
    assert "expected a change of at most half of the entries with form sparse, got more" in capsys.readouterr().err
    assert convert(tmp_path, "--form", "low-rank", "--error", "1e-9") == 1
    assert "expected a change that factors say with an error of at most 1e-09" in capsys.readouterr().err


def test_one_folder_is_not_two(tmp_path):
    save(build("llama"), tmp_path / "base")
    with pytest.raises(CannotConvert, match="tuned: expected another folder than base, got the same one"):
        convert_diff(tmp_path / "base", tmp_path / "x" / ".." / "base", tmp_path / "out", Options(), lambda *_: None)


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    save(build("llama"), tmp_path / "base")
    assert convert(tmp_path) == 1
    assert "expected a folder with config.json and safetensors, got nothing there" in capsys.readouterr().err
