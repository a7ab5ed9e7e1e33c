"""Pickles: read without running anything of them, converted bit for bit, refused with what they wanted."""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import adapterhub, adapters
from tests.support.backbones import build
from tests.support.catalogues import sites_of
from weft.adapters_store.formats import read_adapter
from weft.server import cli
from weft.server.convert.pickles import read_state_dict
from weft.server.convert.problems import CannotConvert

ROOMS = ("kernels", "adapters_store", "server", "bench")


class Runs:
    """Runs something when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def pickled(folder: Path, name: str = "adapter_model.bin") -> Path:
    """A PEFT folder whose tensors lie in a pickle."""
    adapters.make("lora", "llama", folder, seed=3)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / name)
    return folder


def convert(*words: str | Path) -> int:
    """Run the command."""
    return cli.main(["convert", "pickle", *map(str, words)])


def test_a_pickled_adapter_becomes_the_same_one_with_safetensors(tmp_path, capsys):
    source = pickled(tmp_path / "in")
    config = (source / "adapter_config.json").read_bytes()
    assert convert(source, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert out == f"wrote {tmp_path / 'out'}: 28 tensors, {size / 1024:.1f} KiB, of adapter_model.bin\n"
    assert err == ""
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == config
    found, wanted = load_file(tmp_path / "out" / "adapter_model.safetensors"), torch.load(source / "adapter_model.bin")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert read_adapter(tmp_path / "out", sites_of(build("llama")).info).method == "LORA"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_adapterhub_s_pickle_gets_the_name_that_adapterhub_gives(tmp_path):
    golden = adapterhub.folder("llama", adapterhub.kinds("llama")[0])
    source = tmp_path / "in"
    source.mkdir()
    (source / "adapter_config.json").write_bytes((golden / "adapter_config.json").read_bytes())
    tensors = load_file(golden / "adapter.safetensors")
    torch.save(tensors, source / "pytorch_adapter.bin")
    (source / "pytorch_model_head.bin").write_bytes(b"anything")
    assert convert(source, tmp_path / "out", "--json") == 0
    found = load_file(tmp_path / "out" / "adapter.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    # in a store every file of weights has PEFT's name
    (tmp_path / "out" / "adapter.safetensors").rename(tmp_path / "out" / "adapter_model.safetensors")
    assert read_adapter(tmp_path / "out", sites_of(adapterhub.backbone("llama")).info).dialect == "adapterhub"


def test_programs_get_what_became_of_it(tmp_path, capsys):
    source = pickled(tmp_path / "in")
    tensors = torch.load(source / "adapter_model.bin")
    first = next(iter(tensors))
    tensors[first] = tensors[first].double()
    tensors["base_model.model.again"] = next(iter(list(tensors.values())[1:]))
    torch.save(tensors, source / "adapter_model.bin")
    (source / "pytorch_model_head.bin").write_bytes(b"anything")
    assert convert(source, tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"out", "read_from", "tensors", "bytes"} < set(found)
    assert found["notes"] == [
        f"1 tensors of float64 are rounded to float32: {first}",
        "1 tensors that shared memory with others have their own now",
        "pytorch_model_head.bin is left out: prediction heads are not served",
    ]


def evil(path: Path, how: str, marker: Path) -> None:
    """A file that would leave ``marker`` if anything of it ran."""
    value = {"a": torch.ones(2), "b": Runs(os.system, f"touch {marker}")}
    if how == "zip":
        torch.save(value, path)
    elif how == "before zips":
        torch.save(value, path, _use_new_zipfile_serialization=False)
    elif how == "bare pickle":
        path.write_bytes(pickle.dumps(value["b"], protocol=2))
    elif how == "exec":
        torch.save({"a": Runs(exec, f"open({str(marker)!r}, 'w')")}, path)
    else:
        torch.save({"a": Runs(marker.write_text, "ran")}, path)


@pytest.mark.parametrize("how", ["zip", "before zips", "bare pickle", "exec", "a method"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(how, tmp_path, capsys):
    source = pickled(tmp_path / "in")
    evil(source / "adapter_model.bin", how, tmp_path / "ran")
    assert convert(source, tmp_path / "out") == 1
    err = capsys.readouterr().err
    wanted = {"exec": "exec", "a method": "getattr"}.get(how, "posix.system")
    assert f"adapter_model.bin: expected a pickle of tensors only, got a pickle that wants to run {wanted}" in err
    assert "nothing of it was run" in err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def bad_files() -> dict[str, tuple[Callable[[Path], object], str]]:
    """How to write a bad file → what is said about it."""
    good = {"a": torch.ones(4)}

    def cut(path: Path) -> None:
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:-40])

    return {
        "empty": (lambda path: path.write_bytes(b""), "expected a file that torch.save wrote, got an empty file"),
        "cut off": (cut, "expected a file that torch.save wrote whole, got a damaged one: "),
        "pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "a git-lfs pointer"),
        "page": (lambda path: path.write_bytes(b"<!doctype html>"), "got a web page"),
        "gguf": (lambda path: path.write_bytes(b"GGUF\x03"), "got a GGUF file"),
        "safetensors": (lambda path: save_file(good, path), "a safetensors file: rename it, it needs no conversion"),
        "junk": (
            lambda path: path.write_bytes(b"\x00" * 64),
            "expected a pickle of tensors only, got a pickle of some",
        ),
        "numpy": (lambda path: torch.save({"a": np.ones(3)}, path), "wants to run numpy._core.multiarray._reconstruct"),
        "object": (lambda path: torch.save(argparse.Namespace(a=1), path), "that wants to run argparse.Namespace"),
        "module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "wants to run torch.nn.modules.linear.Linear"),
        "list": (lambda path: torch.save([1], path), "expected tensors by name, got a list"),
        "nothing": (lambda path: torch.save({}, path), "expected tensors by name, got an empty dict"),
        "number": (lambda path: torch.save({"a": 1}, path), "expected a tensor at a, got a int"),
        "numbered": (
            lambda path: torch.save({1: torch.ones(1)}, path),
            "expected tensors by name, got a int as a name",
        ),
        "sparse": (
            lambda path: torch.save({"a": good["a"].to_sparse()}, path),
            "expected a plain tensor at a, got a sp",
        ),
        "complex": (lambda path: torch.save({"a": torch.ones(2) * 1j}, path), "got torch.complex64 at a"),
        "bad name": (lambda path: torch.save({"a b": torch.ones(2)}, path), "weft would not read the result: "),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_other_files_are_refused_with_what_they_are(kind, tmp_path, capsys):
    source = pickled(tmp_path / "in")
    write, wanted = bad_files()[kind]
    write(source / "adapter_model.bin")
    assert convert(source, tmp_path / "out") == 1
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_are_refused_with_what_they_lack(tmp_path, capsys):
    source, out = pickled(tmp_path / "in"), tmp_path / "out"
    (source / "pytorch_adapter.bin").write_bytes(b"x")
    assert convert(source, out) == 1
    assert "one with adapter_model.bin and pytorch_adapter.bin" in capsys.readouterr().err
    (source / "pytorch_adapter.bin").unlink()
    (source / "adapter_model.safetensors").write_bytes(b"x")
    assert convert(source, out) == 1
    assert "one that has it (it needs no conversion)" in capsys.readouterr().err
    (source / "adapter_model.safetensors").unlink()
    (source / "adapter_model.bin").unlink()
    assert convert(source, out) == 1
    assert "one with none" in capsys.readouterr().err
    (source / "adapter_config.json").write_text("[]")
    assert convert(source, out) == 1
    assert "adapter_config.json: expected a JSON object, got a list" in capsys.readouterr().err
    (source / "adapter_config.json").write_text("{")
    assert convert(source, out) == 1
    assert "adapter_config.json: expected JSON, got " in capsys.readouterr().err
    (source / "adapter_config.json").unlink()
    assert convert(source, out) == 1
    assert "expected a folder with adapter_config.json, got one without it" in capsys.readouterr().err
    assert convert(tmp_path / "none", out) == 1
    assert "expected a folder, got nothing there" in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_written_over(tmp_path, capsys):
    source = pickled(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert convert(source, out, "--json") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "CANNOT_CONVERT"
    assert "expected a new or empty folder to write to, got something that is there" in error["message"]
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    assert convert(source, out) == 0


def test_a_folder_that_cannot_be_written_says_so(tmp_path, capsys):
    source = pickled(tmp_path / "in")
    (tmp_path / "file").write_text("")
    assert convert(source, tmp_path / "file" / "out") == 1
    assert f"error: {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(CannotConvert, match=r"none\.bin: expected a file, got nothing there"):
        read_state_dict(tmp_path / "none.bin")


def test_pickles_are_opened_in_one_place_and_never_by_a_server():
    root = Path(__file__).resolve().parents[3]
    sources = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    opening = {path.name for path in sources if re.search(r"torch\.load\(|pickle\.loads?\(", path.read_text())}
    assert opening == {"pickles.py"}
    using = {path.parent.name for path in sources if "weft.server.convert" in path.read_text()}
    assert using == {"convert", "commands"}
    code = "import weft.server.app, weft.server.engine.process, sys; print([m for m in sys.modules if 'convert' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "weft.server.convert" not in done.stdout
