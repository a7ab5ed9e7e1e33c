"""A safetensors file that is written tensor by tensor: none of them has to stay in memory until the last one is known.

Data goes to a file beside the result as it comes. Names are given at the end, because what a tensor is called in an
adapter of several members depends on how many there are.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
}
_LENGTH_BYTES = 8
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor on the disk: which member it belongs to, its name there, and where its bytes lie."""

    member: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Spool:
    """Tensors on their way into one file. Use it in a ``with``; the file beside the result goes when it ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "spool"
        self._file = self._path.open("w+b")
        self.entries: list[Entry] = []

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, member: str, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        start = self._file.tell()
        self._file.write(flat.numpy().data)
        self.entries.append(Entry(member, name, tensor.dtype, tuple(tensor.shape), start, flat.numel()))

    def write(self, path: Path, name_of: Callable[[Entry], str]) -> None:
        """Make the file of all tensors. Wider dtypes come first, so that each begins where its dtype may."""
        ordered = sorted(self.entries, key=lambda entry: -entry.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for entry in ordered:
            offsets = [at, at + entry.nbytes]
            header[name_of(entry)] = {
                "dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets
            }  # fmt: skip
            at += entry.nbytes
        text = json.dumps(header).encode()
        # the data begins at a multiple of eight
        text += b" " * (-len(text) % _LENGTH_BYTES)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            for entry in ordered:
                self._file.seek(entry.start)
                self._copy(entry.nbytes, file.write)

    def _copy(self, nbytes: int, write: Callable[[bytes], int]) -> None:
        while nbytes:
            chunk = self._file.read(min(nbytes, _CHUNK))
            write(chunk)
            nbytes -= len(chunk)
