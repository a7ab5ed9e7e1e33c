"""Bytes that are no weights file or no config: id, bytes, the field that the refusal names, words of its message."""

import json
from collections.abc import Iterator
from typing import Any

from tests.adapters_store.files import Files, Tensor, noise, safetensors, with_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Case = tuple[str, bytes, str, str]


def _entry(**changes: Any) -> bytes:
    """A file of one [2, 2] tensor called ``t`` whose entry is changed."""
    entry: dict[str, Any] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    header = json.dumps({"t": {k: v for k, v in entry.items() if v is not ...}})
    return with_header(header.encode(), bytes(16))


def _pair(first: str, second: str) -> bytes:
    """Two tensors with these offsets, and 32 bytes of data."""
    entries = ", ".join(
        f'"{name}": {{"dtype": "F32", "shape": [2, 2], "data_offsets": {offsets}}}'
        for name, offsets in (("a", first), ("b", second))
    )
    return with_header(f"{{{entries}}}".encode(), bytes(32))


def _named(name: str) -> bytes:
    entry = '{"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}'
    return with_header(f'{{"{name}": {entry}}}'.encode(), bytes(16))


def broken_weights(files: Files) -> Iterator[Case]:
    """Weights files, broken from the first byte to the last."""
    good = safetensors(files.tensors)
    size = len(good)
    yield "empty", b"", WEIGHTS, "at least 8 bytes, got 0"
    yield "seven", good[:7], WEIGHTS, "at least 8 bytes, got 7"
    yield "length_0", bytes(8) + good[8:], WEIGHTS, "a safetensors header of 2 to"
    yield "length_1", (1).to_bytes(8, "little") + good[8:], WEIGHTS, "a safetensors header of 2 to"
    yield "length_max", b"\xff" * 8 + good[8:], WEIGHTS, "a safetensors header of 2 to"
    yield "length_sign", (1 << 63).to_bytes(8, "little") + good[8:], WEIGHTS, "a safetensors header of 2 to"
    yield "length_above_4_mib", ((4 << 20) + 1).to_bytes(8, "little") + good[8:], WEIGHTS, "4194304"
    yield "length_above_file", (size - 7).to_bytes(8, "little") + good[8:], WEIGHTS, f"in a file of {size}"
    yield "zip", b"PK\x03\x04\x14\x00\x00\x00" + bytes(64), WEIGHTS, "torch.save writes"
    yield "pickle", b"\x80\x02}q\x00X\x04\x00\x00\x00" + bytes(64), WEIGHTS, "weft convert pickle"
    yield "gguf", b"GGUF\x03\x00\x00\x00" + bytes(64), WEIGHTS, "GGUF"
    yield "gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00" + bytes(64), WEIGHTS, "gzip"
    yield "numpy", b"\x93NUMPY\x01\x00" + bytes(64), WEIGHTS, "NumPy"
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", WEIGHTS, "git-lfs pointer"
    yield "leading_space", with_header(b' {"a": 1}'), WEIGHTS, "begins with '{'"
    yield "array", with_header(b"[[]]"), WEIGHTS, "begins with '{'"
    yield "bom", with_header(b'\xef\xbb\xbf{"a": 1}'), WEIGHTS, "begins with '{'"
    yield "utf16", with_header('{"a": 1}'.encode("utf-16-le")), WEIGHTS, "expected JSON"
    yield "not_utf8", with_header(b'{"\xff": 1}'), WEIGHTS, "expected UTF-8, got byte 2"
    yield "not_json", with_header(b"{tensors}"), WEIGHTS, "expected JSON"
    yield "garbage_behind", with_header(b'{"a": {}} x'), WEIGHTS, "Extra data"
    yield "no_tensors", with_header(b"{}"), WEIGHTS, "at least one tensor"
    yield "deep", with_header(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"), WEIGHTS, "8 levels of nesting"
    yield "nan", with_header(b'{"a": NaN}'), WEIGHTS, "finite numbers"
    yield "twice", _pair("[0, 16]", "[16, 32]").replace(b'"b"', b'"a"'), "a", "every key once"
    twin = _pair("[0, 16]", "[16, 32]").replace(b'"b"', b'"\\u0061"')
    yield "twice_escaped", (len(twin) - 40).to_bytes(8, "little") + twin[8:], "a", "every key once"
    yield "hole", _pair("[0, 16]", "[20, 36]") + bytes(4), "b", "a hole"
    yield "overlap", _pair("[0, 16]", "[8, 24]"), "b", "an overlap"
    yield "same_bytes_twice", _pair("[0, 16]", "[0, 16]"), "b", "an overlap"
    yield "does_not_start_at_0", _pair("[16, 32]", "[32, 48]"), "a", "a hole"
    yield "behind_the_end", good + b"PK\x03\x04", WEIGHTS, "as its header says"
    yield "cut_short", good[:-4], WEIGHTS, "as its header says"
    yield "offsets_backwards", _entry(data_offsets=[16, 0]), "t", "data_offsets [begin, end]"
    yield "offsets_negative", _entry(data_offsets=[-16, 0]), "t", "data_offsets [begin, end]"
    yield "offsets_float", _entry(data_offsets=[0.0, 16.0]), "t", "data_offsets [begin, end]"
    yield "offsets_true", _entry(data_offsets=[False, 16]), "t", "data_offsets [begin, end]"
    yield "offsets_text", _entry(data_offsets=["0", "16"]), "t", "data_offsets [begin, end]"
    yield "offsets_three", _entry(data_offsets=[0, 8, 16]), "t", "data_offsets [begin, end]"
    yield "offsets_not_of_shape", _entry(shape=[2, 3]), "t", "expected 24 bytes"
    yield "shape_overflow", _entry(shape=[1 << 62, 8]), "t", "values at most"
    yield "shape_zero", _entry(shape=[0, 1 << 41], data_offsets=[0, 0]), "t", "values at most"
    yield "shape_empty", _entry(shape=[0, 1 << 40], data_offsets=[0, 0]), WEIGHTS, "expected 0 bytes of data"
    yield "shape_negative", _entry(shape=[-2, -2]), "t", "at most 4 sizes"
    yield "shape_long", _entry(shape=[1] * 1000), "t", "at most 4 sizes"
    yield "shape_text", _entry(shape="[2, 2]"), "t", "a shape"
    for dtype in ("F64", "C64", "F8_E4M3", "F4", "BOOL", "f32", 4):
        yield f"dtype_{dtype}", _entry(dtype=dtype), "t", "dtype F32 or F16 or BF16"
    yield "entry_unknown_key", _entry(extra=1), "t", "dtype, shape and data_offsets, got data_offsets"
    yield "entry_without_dtype", _entry(dtype=...), "t", "dtype, shape and data_offsets"
    yield "entry_list", with_header(b'{"t": []}'), "t", "got a list"
    yield "name_path", _named("../../etc/passwd"), "../../etc/passwd", "a tensor name of"
    yield "name_nul", _named("a\\u0000b"), "a\\x00b", "a tensor name of"
    yield "name_newline", _named("a\\nb"), "a\\nb", "a tensor name of"
    yield "name_bidi", _named("a\\u202eb"), "a\\u202eb", "a tensor name of"
    yield "name_surrogate", _named("a\\ud800b"), "a\\ud800b", "a tensor name of"
    yield "name_empty", _named(""), "", "a tensor name of"
    yield "name_long", _named("a" * 600), f"{'a' * 100}…{'a' * 100}", "a tensor name of"
    one = {"t": Tensor((2, 2), bytes(16))}
    yield "metadata_list", safetensors(one, metadata=[1]), "__metadata__", "an object of strings"
    yield "metadata_number", safetensors(one, metadata={"a": 1}), "__metadata__", "an object of strings"
    yield "metadata_large", safetensors(one, metadata={"a": "b" * 70_000}), "__metadata__", "at most 65536 bytes"
    yield "metadata_surrogate", safetensors(one, metadata={"a": "\ud800"}), "__metadata__", "lone surrogates"
    yield "other_tensor", safetensors({**files.tensors, "t": noise((2, 2))}), "t", "begins with base_model.model."


def broken_config_bytes(good: str) -> Iterator[Case]:
    """Configs that are not the plain JSON object they should be."""
    yield "empty", b"", CONFIG, "expected JSON"
    yield "list", b"[]", CONFIG, "a JSON object, got a list"
    yield "text", b'"LORA"', CONFIG, "a JSON object"
    yield "cut", good.encode()[:-1], CONFIG, "expected JSON"
    yield "comment", b"/* */" + good.encode(), CONFIG, "expected JSON"
    yield "bom", b"\xef\xbb\xbf" + good.encode(), CONFIG, "expected JSON"
    yield "not_utf8", b'{"peft_type": "\xff"}', CONFIG, "UTF-8"
    yield "nan", good.replace('"r": 4', '"r": NaN').encode(), CONFIG, "finite numbers, got NaN"
    yield "infinity", good.replace('"lora_alpha": 8', '"lora_alpha": -Infinity').encode(), CONFIG, "got -Infinity"
    yield (
        "overflow",
        good.replace('"lora_alpha": 8', '"lora_alpha": 1e999').encode(),
        CONFIG,
        "finite numbers, got 1e999",
    )
    yield "digits", good.replace('"r": 4', f'"r": {"9" * 5000}').encode(), CONFIG, "19 digits, got one of 5000"
    yield "deep", good.replace('"r": 4', f'"r": {"[" * 100_000}{"]" * 100_000}').encode(), CONFIG, "8 levels"
    yield "twice", good.replace('"r": 4', '"r": 4, "r": 400').encode(), "r", "every key once"
    yield "twice_escaped", good.replace('"r": 4', '"r": 4, "\\u0072": 400').encode(), "r", "every key once"
    yield "large", good.encode() + b" " * (1 << 20), CONFIG, "at most 1048576 bytes"
    yield "surrogate", good.replace('"q_proj"', '"\\ud800"').encode(), "target_modules", "a list of names"
