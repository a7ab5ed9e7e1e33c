"""The header reader: whatever it accepts means the same to the safetensors library, and nothing makes it slow."""

import json
import time

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.adapters_store.files import Tensor, lora, with_header
from tests.adapters_store.files import safetensors as encode
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.safetensors_header import HEADER_BYTES_MAX, TENSORS_MAX, Header, header_bytes, read_header

SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def ours(file: bytes) -> Header:
    """What our reader makes of a whole file."""
    length = header_bytes(file[:8], len(file))
    return read_header(file[8 : 8 + length], len(file) - 8 - length)


def check_against_the_library(file: bytes) -> bool:
    """Whether we accept a file; if so, the library must read the same from it."""
    try:
        header = ours(file)
    except AdapterInvalid:
        return False
    theirs = dict(safetensors.deserialize(file))
    assert theirs.keys() == header.tensors.keys()
    for name, tensor in header.tensors.items():
        assert theirs[name]["shape"] == list(tensor.shape)
        assert theirs[name]["dtype"] == tensor.dtype
        start = header.data_start
        assert bytes(theirs[name]["data"]) == file[start + tensor.start : start + tensor.stop]
    return True


names = st.text(st.sampled_from("ab._-0é\n/ \ud800"), max_size=6)
shapes = st.lists(st.integers(0, 3), max_size=5)


@st.composite
def plausible_files(draw: st.DrawFn) -> bytes:
    """Files that are right, or nearly so."""
    entries, data, at = {}, b"", 0
    for name in draw(st.lists(names, max_size=4)):
        dtype = draw(st.sampled_from(["F32", "F16", "BF16", "I8", "F64"]))
        shape = draw(shapes)
        size = SIZES.get(dtype, 1)
        for length in shape:
            size *= length
        slip = draw(st.sampled_from([0] * 9 + [1, -1]))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size + slip]}
        at += size
        data += bytes(size)
    if draw(st.booleans()):
        entries["__metadata__"] = draw(st.dictionaries(names, st.one_of(names, st.integers(0, 1)), max_size=2))
    header = json.dumps(entries).encode("utf-8", "surrogatepass") + draw(st.sampled_from([b"", b" ", b"\n  ", b"x"]))
    return with_header(header, data + draw(st.sampled_from([b"", b"", b"", b"\0"])))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plausible_files())
def test_what_we_accept_the_library_reads_alike(file):
    check_against_the_library(file)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_file_with_broken_bytes_is_refused_or_means_the_same_to_both(data):
    file = bytearray(encode({"a.b": Tensor((2, 3), bytes(24)), "c": Tensor((4,), bytes(8), "BF16")}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(file) - 1))
        what = data.draw(st.sampled_from(["set", "cut", "insert"]))
        byte = data.draw(st.integers(0, 255) | st.sampled_from(list(b'{}[]",:0123456789-e.\\u ')))
        if what == "set":
            file[at] = byte
        elif what == "cut":
            del file[at]
        else:
            file.insert(at, byte)
    # a length that fits again, so that the damage inside is what is judged
    if data.draw(st.booleans()) and len(file) > 40:
        file[:8] = (len(file) - 8 - 32).to_bytes(8, "little")
    check_against_the_library(bytes(file))


def test_a_real_file_is_accepted():
    assert check_against_the_library(lora().encode()[1])


def test_tensors_in_any_order_are_accepted():
    first = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    second = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert check_against_the_library(with_header(json.dumps({"a": first, "b": second}).encode(), bytes(8)))


def test_a_header_that_is_too_long_is_refused_after_eight_bytes():
    for length in (HEADER_BYTES_MAX + 1, 10**8, 2**63, 2**64 - 1):
        with pytest.raises(AdapterInvalid, match="header of 2 to"):
            header_bytes(length.to_bytes(8, "little"))


def test_too_many_tensors_are_refused():
    entry = '{"dtype":"F16","shape":[1],"data_offsets":[0,2]}'
    entries = ",".join(f'"{i:x}":{entry}' for i in range(TENSORS_MAX + 1))
    assert len(entries) < HEADER_BYTES_MAX
    with pytest.raises(AdapterInvalid, match="at most 65536 tensors"):
        ours(with_header(f"{{{entries}}}".encode(), bytes(2)))


@pytest.mark.parametrize(
    "header",
    [
        b'{"' + b'\\"' * (2 << 20 - 1),
        b'{"a": ' + b"[" * (4 << 20 - 1),
        b"{" + b'"a":1,' * 600_000 + b"}",
        b"{" + b" " * (4 << 20 - 2) + b"}",
        b'{"a": "' + b"\\" * (4 << 20 - 1),
    ],
    ids=["escaped_quotes", "brackets", "one_key", "spaces", "backslashes"],
)
def test_no_header_within_the_limit_is_slow_to_refuse(header):
    start = time.process_time()
    with pytest.raises(AdapterInvalid):
        read_header(header[:HEADER_BYTES_MAX], 0)
    assert time.process_time() - start < 5
