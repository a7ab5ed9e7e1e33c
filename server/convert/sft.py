"""``weft convert sft``: ``pytorch_diff.bin`` of composable-sft (LT-SFT) as weft's X_SPARSE.

The file is ``{"diffs": {parameter: {"size", "index_steps", "values"}}, "abs": {parameter: tensor}}``. Entries are
counted column by column, each index as its distance from the one before it; their values are what is added. ``abs``
are whole parameters. Source: cambridgeltl/composable-sft 29f7872d, ``src/sft/sft.py``; unlike its own reader, which
counts in 32 bits, this one counts in 64.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from weft.adapters_store.errors import quoted
from weft.adapters_store.files import WEIGHTS
from weft.adapters_store.formats.tensors import PREFIX
from weft.server.convert.folders import new_folder, write_config
from weft.server.convert.forms import DENSITY_MAX, ENTRIES_MAX
from weft.server.convert.outline import Kind, Outline, Parameter, outline_of
from weft.server.convert.pickled_folder import Converted, save_tensors, writable
from weft.server.convert.pickles import Allowed, read_pickle, tensors_by_name
from weft.server.convert.problems import expected

FILE_NAME = "pytorch_diff.bin"
KEYS = {"size", "index_steps", "values"}
# the first index of each list is a number of numpy's, whose pickle names these under the old or the new package
_SCALAR = cast(Callable[..., Any], np.float64(0).__reduce__()[0])
ALLOWED: tuple[Allowed, ...] = (
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.int64)),
    type(np.dtype(np.int32)),
)


def convert_sft(file: Path, base: Path, out: Path) -> Converted:
    """Write ``out``. CannotConvert says what stands against it."""
    path = file / FILE_NAME if file.is_dir() else file
    found = read_pickle(path, ALLOWED)
    if not isinstance(found, dict) or not set(found) <= {"diffs", "abs"}:
        got = f"a {quoted(type(found).__name__)}" if not isinstance(found, dict) else ", ".join(map(str, found))
        raise expected(path.name, "diffs and abs of composable-sft", quoted(got))
    outline = outline_of(base)
    made = _Made(outline)
    for name, entry in dict(found.get("diffs") or {}).items():
        made.entries(str(name), entry)
    whole = found.get("abs") or {}
    for name, tensor in tensors_by_name(whole, "abs").items() if whole else ():
        made.whole(name, tensor)
    if not made.tensors:
        raise expected(path.name, "a difference of some parameter", "none")
    tensors, notes = writable(made.tensors, path.name)
    with new_folder(out) as folder:
        write_config(folder, made.config(base.name))
        save_tensors(tensors, folder / WEIGHTS)
    return Converted(str(out), path.name, len(tensors), (out / WEIGHTS).stat().st_size, (*made.notes, *notes))


class _Made:
    """The tensors of the new file."""

    def __init__(self, outline: Outline) -> None:
        self._outline = outline
        self.tensors: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self._tied: str | None = None
        self._embedding_rows: int | None = None

    def entries(self, name: str, entry: object) -> None:
        """One of ``diffs``."""
        parameter = self._parameter(name)
        index, values = _decoded(name, entry, parameter)
        if not len(index):
            self.notes.append(f"{name} is left out: nothing of it is changed")
            return
        if len(parameter.shape) > 1 and len(index) > DENSITY_MAX * _size(parameter.shape):
            why = "`weft convert diff` finds the smaller form of such a change"
            raise expected(name, "at most half of the entries", len(index), why)
        self._put(parameter, "sparse_indices", index.to(torch.int32))
        self._put(parameter, "sparse_values", values)
        if parameter.kind == Kind.EMBEDDING:
            self._embedding_rows = len(set((index // parameter.shape[1]).tolist()))

    def whole(self, name: str, tensor: Tensor) -> None:
        """One of ``abs``."""
        parameter = self._parameter(name)
        if tuple(tensor.shape) != parameter.shape:
            raise expected(f"abs: {name}", f"shape {list(parameter.shape)}", list(tensor.shape))
        self._put(parameter, "abs", tensor)

    def config(self, label: str) -> dict[str, Any]:
        """The settings beside them."""
        config: dict[str, Any] = {"peft_type": "X_SPARSE", "format_version": 1, "base_model_name_or_path": label}
        if self._tied is not None:
            config["tied"] = self._tied
        if self._embedding_rows is not None:
            config["embedding_rows"] = self._embedding_rows
        return config

    def _parameter(self, name: str) -> Parameter:
        found = self._outline.resolve(name)
        if found is None:
            raise expected(name, "a parameter of the backbone", "none of this name", "heads of tasks are not served")
        if self._outline.tied and found == self._outline.head_weight:
            # one parameter under two names
            found = self._outline.embedding_weight
        parameter = self._outline.parameters[found]
        if parameter.kind == Kind.OTHER:
            raise expected(name, "parameters of linear modules, norms and the input embedding", "another")
        if self._outline.tied and parameter.kind == Kind.EMBEDDING:
            self._tied = "shared"
        return parameter

    def _put(self, parameter: Parameter, role: str, tensor: Tensor) -> None:
        name = f"{PREFIX}{parameter.name}.{role}"
        if name in self.tensors:
            raise expected(parameter.name, "one difference of it", "two, under two names")
        self.tensors[name] = tensor


def _decoded(name: str, entry: object, parameter: Parameter) -> tuple[Tensor, Tensor]:
    """(indices into the flat parameter, row by row and ascending; their values)."""
    if not isinstance(entry, Mapping) or set(entry) != KEYS:
        raise expected(name, f"{', '.join(sorted(KEYS))}", "something else")
    values, size = entry["values"], tuple(int(length) for length in entry["size"])
    if size != parameter.shape:
        raise expected(name, f"size {list(parameter.shape)}, as the backbone has it", list(size))
    if _size(size) > ENTRIES_MAX:
        raise expected(name, f"a parameter of at most {ENTRIES_MAX} entries", _size(size))
    if not isinstance(values, Tensor) or values.dim() != 1 or not values.is_floating_point():
        raise expected(name, "values as one row of floats", "something else")
    steps = _steps(name, entry["index_steps"])
    if len(steps) != len(values):
        raise expected(name, f"as many index_steps as values, {len(values)}", len(steps))
    index = steps.cumsum(0)
    if len(index) and (int(steps[0]) < 0 or bool((steps[1:] < 1).any()) or int(index[-1]) >= _size(size)):
        raise expected(name, f"indices from 0 to {_size(size) - 1}, ascending, each once", "others")
    row_major = _row_major(index, size)
    order = row_major.argsort()
    return row_major[order], values[order]


def _steps(name: str, steps: Any) -> Tensor:
    if not isinstance(steps, Iterable):
        raise expected(name, "index_steps as a list", "something else")
    listed = list(steps)
    if not all(isinstance(step, int | np.integer) for step in listed):
        raise expected(name, "index_steps of integers", "others")
    return torch.tensor([int(step) for step in listed], dtype=torch.int64)


def _row_major(index: Tensor, size: tuple[int, ...]) -> Tensor:
    """Indices that count the first axis fastest as ones that count the last axis fastest."""
    flat = torch.zeros_like(index)
    for length in size:
        flat = flat * length + index % length
        index = index // length
    return flat


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
