"""A transformers folder of safetensors as a source of tensors: one at a time, so that none but that is in memory."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from weft.adapters_store.errors import quoted
from weft.server.convert.folders import opened
from weft.server.convert.problems import expected

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Checkpoint:
    """The tensors of a folder by name. Holds its files open; use it in a ``with``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        if not folder.is_dir():
            got = "a file" if folder.exists() else "nothing there"
            raise expected(str(folder), "a folder with config.json and safetensors", got)
        self._where = self._index()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        """All names, in the order of the files."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor, without reading it."""
        with self._named(name):
            return tuple(self._file(name).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        with self._named(name):
            found: Tensor = self._file(name).get_tensor(name)
        return found

    def weight(self, name: str) -> Tensor:
        """The same, which has to hold floats."""
        found = self.read(name)
        if found.dtype not in FLOATS:
            why = "quantised weights cannot be compared; give the folders in full precision"
            raise expected(f"{self.folder.name}: {name}", "floats", found.dtype, why)
        return found

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """An index may promise what its files do not hold."""
        try:
            yield
        except SafetensorError as error:
            raise expected(self._where[name], f"a tensor {quoted(name)}", quoted(str(error))) from None

    def _file(self, name: str) -> Any:
        file = self._where[name]
        if file not in self._files:
            self._files[file] = self._stack.enter_context(opened(self.folder / file))
        return self._files[file]

    def _index(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            return self._sharded()
        if (self.folder / WHOLE).is_file():
            with opened(self.folder / WHOLE) as file:
                return dict.fromkeys(file.keys(), WHOLE)
        pickled = next((name for name in PICKLED if (self.folder / name).exists()), None)
        why = "load it and save it again: save_pretrained writes safetensors" if pickled else ""
        raise expected(str(self.folder), f"a folder with {WHOLE} or {INDEX}", f"one with {pickled or 'neither'}", why)

    def _sharded(self) -> dict[str, str]:
        try:
            found = json.loads((self.folder / INDEX).read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise expected(INDEX, "a JSON object with a weight_map", "something else") from None
        if not isinstance(found, dict) or not all(_is_plain(file) for file in found.values()):
            raise expected(INDEX, "a weight_map from names to files of the same folder", "something else")
        missing = sorted({file for file in found.values() if not (self.folder / file).is_file()})
        if missing:
            raise expected(str(self.folder), f"all files that {INDEX} names", f"no {quoted(missing[0])}")
        return dict(found)


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file
