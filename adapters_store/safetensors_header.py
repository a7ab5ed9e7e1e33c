"""Reads the header of a safetensors file, strictly, before a byte of its data is looked at.

    8 bytes   length of the header, little endian
    header    a JSON object: name -> {dtype, shape, data_offsets}, and ``__metadata__``
    data      the tensors, in any order, back to back

Everything this accepts, the safetensors library accepts too, with the same shapes and dtypes. It refuses more: header
size is judged from the first eight bytes, every key stands once, names are plain, and tensors are floats or, where a
format says so, integers. A tensor may be empty here; whether it may be in a format is for ``formats`` to say.
"""

import re
from dataclasses import dataclass
from math import prod
from typing import Any

from weft.adapters_store.errors import AdapterInvalid, expected, quoted, some
from weft.adapters_store.strict_json import is_text, read_object
from weft.adapters_store.tensor_refs import TensorRef

FIELD = "adapter_model.safetensors"
LENGTH_BYTES = 8
HEADER_BYTES_MAX = 4 << 20
TENSORS_MAX = 65_536
METADATA_BYTES_MAX = 64 << 10
NAME_LENGTH_MAX = 512
DIMENSIONS_MAX = 4
ELEMENTS_MAX = 1 << 40
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U8": 1, "I16": 2, "I8": 1}

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_KEYS = {"dtype", "shape", "data_offsets"}
_CONVERT = "`weft convert pickle` makes a safetensors file of it and runs nothing of it"
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (adapter_model.bin)", _CONVERT),
    (b"\x80", "a pickle (adapter_model.bin)", _CONVERT),
    (b"GGUF", "a GGUF file", "weft reads safetensors"),
    (b"\x1f\x8b", "gzip", "send the safetensors file as it is"),
    (b"\x93NUMPY", "a NumPy array", "weft reads safetensors"),
    (b"version https://git-lfs", "a git-lfs pointer", "fetch the file that it points to"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file by name, and where its data begins."""

    tensors: dict[str, TensorRef]
    data_start: int


def header_bytes(first: bytes, file_bytes: int | None = None) -> int:
    """Length of the header, judged from the first eight bytes and, where known, the size of the file."""
    if len(first) < LENGTH_BYTES:
        raise expected(FIELD, f"at least {LENGTH_BYTES} bytes", len(first))
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if not 2 <= length <= HEADER_BYTES_MAX:
        raise _foreign(first) or expected(FIELD, f"a safetensors header of 2 to {HEADER_BYTES_MAX} bytes", length)
    if file_bytes is not None and length > file_bytes - LENGTH_BYTES:
        wanted = f"a header of at most {file_bytes - LENGTH_BYTES} bytes in a file of {file_bytes}"
        raise _foreign(first) or expected(FIELD, wanted, length)
    return length


def read_header(raw: bytes, data_bytes: int) -> Header:
    """Parse a header that is followed by ``data_bytes`` bytes of data."""
    if not raw.startswith(b"{"):
        raise expected(FIELD, "a header that begins with '{'", repr(raw[:1])[1:])
    entries = read_object(raw, FIELD, HEADER_BYTES_MAX)
    metadata = entries.pop("__metadata__", None)
    if metadata is not None:
        _check_metadata(metadata)
    if not entries:
        raise expected(FIELD, "at least one tensor", "none")
    if len(entries) > TENSORS_MAX:
        raise expected(FIELD, f"at most {TENSORS_MAX} tensors", len(entries))
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    _check_cover(tensors, data_bytes)
    return Header(tensors, LENGTH_BYTES + len(raw))


def _foreign(first: bytes) -> AdapterInvalid | None:
    """The refusal of a file that is plainly something else. A good length may begin with the same bytes: ask later."""
    for magic, name, advice in _FOREIGN:
        if first.startswith(magic[:LENGTH_BYTES]):
            return expected(FIELD, "a safetensors file", name, advice)
    return None


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise expected("__metadata__", "an object of strings", "something else")
    texts = [*metadata.keys(), *metadata.values()]
    if not all(is_text(text) for text in texts):
        raise expected("__metadata__", "text", "lone surrogates")
    size = sum(len(text.encode()) for text in texts)
    if size > METADATA_BYTES_MAX:
        raise expected("__metadata__", f"at most {METADATA_BYTES_MAX} bytes", size)


def _tensor(name: str, entry: Any) -> TensorRef:
    if len(name) > NAME_LENGTH_MAX or not _NAME.fullmatch(name):
        wanted = f"a tensor name of at most {NAME_LENGTH_MAX} letters, digits, '.', '_' and '-'"
        raise AdapterInvalid(f"{FIELD}: expected {wanted}, got {quoted(name)!r}", name)
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        got = some(sorted(entry)) or "nothing" if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise expected(name, "dtype, shape and data_offsets", got)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise expected(name, f"dtype {' or '.join(DTYPE_BYTES)}", quoted(str(dtype), 40))
    # the library multiplies from left to right, so that a zero at the end does not save it from an overflow
    if not _are_sizes(shape) or len(shape) > DIMENSIONS_MAX or prod(size or 1 for size in shape) > ELEMENTS_MAX:
        raise expected(name, f"a shape of at most {DIMENSIONS_MAX} sizes, {ELEMENTS_MAX} values at most", _show(shape))
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise expected(name, "data_offsets [begin, end]", _show(offsets))
    start, stop = offsets
    if stop - start != prod(shape) * DTYPE_BYTES[dtype]:
        raise expected(name, f"{prod(shape) * DTYPE_BYTES[dtype]} bytes for {shape} {dtype}", stop - start)
    return TensorRef(name, tuple(shape), dtype, start, stop)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_cover(tensors: dict[str, TensorRef], data_bytes: int) -> None:
    # no holes, no overlaps, nothing behind the end: a file means one thing only
    at = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != at:
            problem = "a hole" if tensor.start > at else "an overlap"
            raise expected(tensor.name, f"data that begins at byte {at}", f"{tensor.start}: {problem}")
        at = tensor.stop
    if at != data_bytes:
        raise expected(FIELD, f"{at} bytes of data, as its header says", data_bytes)


def _show(value: Any) -> str:
    return quoted(str(value), 60)
