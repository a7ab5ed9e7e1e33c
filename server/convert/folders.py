"""Folders that conversions write: whole or not at all, and never over something that is there."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.adapters_store.errors import AdapterError, quoted
from weft.adapters_store.files import CONFIG
from weft.adapters_store.safetensors_header import LENGTH_BYTES, header_bytes, read_header
from weft.server.convert.problems import CannotConvert, expected


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into; it becomes ``out`` when the block ends well, and vanishes otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise expected(str(out), "a new or empty folder to write to", "something that is there")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield made
        # a folder made for oneself alone is handed on like any other
        made.chmod(0o755)
        if out.exists():
            out.rmdir()
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_config(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The config of an adapter's folder: as bytes, and as what it says. CannotConvert if there is none."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise expected(str(folder), "a folder", "a file" if folder.exists() else "nothing there")
    if not path.is_file():
        raise expected(str(folder), f"a folder with {CONFIG}", "one without it")
    raw = path.read_bytes()
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise expected(CONFIG, "JSON", quoted(str(error))) from None
    if not isinstance(found, dict):
        raise expected(CONFIG, "a JSON object", f"a {type(found).__name__}")
    return raw, found


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """The settings of a new adapter."""
    text = json.dumps(config, indent=2, sort_keys=False, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a small file. CannotConvert if it is missing or none."""
    if not path.is_file():
        raise expected(path.name, "a file", "nothing there", str(path))
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose tensors are read one by one."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise expected(path.name, "a safetensors file", quoted(str(error))) from None


def check_written(path: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Judge a file of weights as the store does, and read back its tensors bit for bit where they are given."""
    with path.open("rb") as file:
        first = file.read(LENGTH_BYTES)
        try:
            raw = file.read(header_bytes(first, path.stat().st_size))
            read_header(raw, path.stat().st_size - len(first) - len(raw))
        except AdapterError as error:
            raise CannotConvert(f"weft would not read the result: {error.message}") from None
    if tensors is None:
        return
    found = read_safetensors(path)
    different = [name for name in tensors if name not in found or not _same_bits(tensors[name], found[name])]
    if different or len(found) != len(tensors):
        raise expected(path.name, "the tensors that were written", f"others: {', '.join(different[:4])}")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)
