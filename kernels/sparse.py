"""Deltas of a linear that are mostly zero, in the rows whose adapter has one: y = round(y + x delta^T).

    entries   delta[index // in, index % in] = value   index ascending: the entries of neighbouring outputs lie together
    rows      delta[row[i], :] = rows[i]               no row twice

A program makes BN outputs for the rows of a tile. It finds its entries by two searches, and takes them BK at a time:
the columns of x that they read, [BM, BK], times a matrix [BK, BN] that holds each value in its entry's output. So
entries need not be spread evenly, every number is read as it lies, and sums run in the entries' order: no atomics.

    tiles   int32 [tiles, RECORD_TILE]   (``walks``): offsets are those of index and values, or of row and rows
"""

# a kernel's types are those of its launch
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from weft.kernels.layout import ALIGN, UNIT
from weft.kernels.lowrank import plain_dot
from weft.kernels.walks import RECORD_TILE

_ALIGN = tl.constexpr(ALIGN)
_UNIT = tl.constexpr(UNIT)
_TILE = tl.constexpr(RECORD_TILE)


@triton.jit
def count_below(index_ptr, size, bound, WAYS: tl.constexpr):
    """How many of ``size`` ascending numbers are less than ``bound``, WAYS looked at together."""
    low, high = size * 0, size
    way = tl.arange(0, WAYS)
    while low < high:
        # the last of each of WAYS equal runs
        step = (high - low + WAYS - 1) // WAYS
        at = low + (way + 1) * step - 1
        number = tl.load(index_ptr + at, mask=at < high, other=2**31 - 1)
        low += tl.sum(((at < high) & (number < bound)).to(tl.int32), axis=0) * step
        high = tl.minimum(high, low + step - 1)
    return low


@triton.jit
def entries_kernel(
    y_ptr, x_ptr, factors_ptr, words_ptr, tiles_ptr, tall, stride_yt, stride_xt,
    FEATURES: tl.constexpr, ITEM: tl.constexpr, UPCAST: tl.constexpr, WAYS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * _TILE
    block = tl.load(tile).to(tl.int64)
    row, stop, size = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 5)
    index = words_ptr + block * (_ALIGN // 4) + tl.load(tile + 3).to(tl.int64) * (_UNIT // 4)
    values = factors_ptr + block * (_ALIGN // ITEM) + tl.load(tile + 4).to(tl.int64) * (_UNIT // ITEM)
    first = tl.program_id(1) * BN
    start = count_below(index, size, first.to(tl.int64) * FEATURES, WAYS)
    end = count_below(index, size, (first + BN).to(tl.int64) * FEATURES, WAYS)
    if start == end:
        return
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    live = m < stop - row
    x_rows = x_ptr + row.to(tl.int64) * stride_xt + (m * stride_xt)[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    while start < end:
        k = start + tl.arange(0, BK)
        here = k < end
        flat = tl.load(index + k, mask=here, other=0)
        out = flat // FEATURES
        # [BM, BK]
        x = tl.load(x_rows + (flat - out * FEATURES)[None, :], mask=live[:, None] & here[None, :], other=0.0)
        value = tl.load(values + k, mask=here, other=0.0)
        # [BK, BN]
        spread = tl.where((out - first)[:, None] == n[None, :], value[:, None], 0.0).to(value.dtype)
        acc = plain_dot(x, spread, acc, UPCAST)
        start += BK
    mask = live[:, None] & (first + n < tall)[None, :]
    y_place = y_ptr + row.to(tl.int64) * stride_yt + (m[:, None] * stride_yt + (first + n)[None, :])
    acc += tl.load(y_place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_place, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    y_ptr, x_ptr, factors_ptr, words_ptr, tiles_ptr, stride_yt, stride_xt,
    FEATURES: tl.constexpr, ITEM: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * _TILE
    block = tl.load(tile).to(tl.int64)
    row, stop, size = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 5)
    if tl.program_id(1) * BN >= size:
        return
    index = words_ptr + block * (_ALIGN // 4) + tl.load(tile + 3).to(tl.int64) * (_UNIT // 4)
    weights = factors_ptr + block * (_ALIGN // ITEM) + tl.load(tile + 4).to(tl.int64) * (_UNIT // ITEM)
    STRIDE: tl.constexpr = (FEATURES * ITEM + _UNIT - 1) // _UNIT * _UNIT // ITEM
    m, n = tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    live = m < stop - row
    x_rows = x_ptr + row.to(tl.int64) * stride_xt + (m * stride_xt)[:, None]
    weight_rows = weights + n[None, :].to(tl.int64) * STRIDE
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, FEATURES, BK):
        k = start + tl.arange(0, BK)
        # [BM, BK]
        x = tl.load(x_rows + k[None, :], mask=live[:, None] & (k[None, :] < FEATURES), other=0.0)
        # [BK, BN]
        w = tl.load(weight_rows + k[:, None], mask=(n[None, :] < size) & (k[:, None] < FEATURES), other=0.0)
        acc = plain_dot(x, w, acc, UPCAST)
    out = tl.load(index + n, mask=n < size, other=0)
    mask = live[:, None] & (n < size)[None, :]
    y_place = y_ptr + row.to(tl.int64) * stride_yt + (m[:, None] * stride_yt + out[None, :])
    acc += tl.load(y_place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_place, acc.to(y_ptr.dtype.element_ty), mask=mask)
