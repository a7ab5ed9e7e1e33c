"""Low-rank pairs of a group of sites, with scale and bias: y = sigma * y + act(x A^T + inner) B^T + beta, row by row.

Two launches whatever the mix of adapters and ranks:

    shrink   h[split, row, r] = sum over the split's k of x[row, k] * A[r, k]   all ranks of the group's sites
    expand   y[row, n]        = round(sigma[n] * y[row, n] + sum over r of g[row, r] * B[r, n] + beta[n])
             g[row, r]        = act(h[row, r] + inner[r])

A *tile* is a run of at most BM rows of one block. Programs find the operators in the block's directory; nothing is
passed per adapter. The sum over k is made in parts that depend on its length only. Few rows have a program, and a
plane of h, for every part; where rows are many, one program makes FOLD parts and adds them up. Planes are fp32,
each written once and added in order: nothing is zeroed beforehand and no sum depends on what else runs. In
expand g meets B as the sum of two numbers of B's dtype, which keeps it at fp32's precision for the price of a
second product that memory hides.

    tiles   int32 [tiles, 4]     block's first byte / ALIGN, first row, row behind, first row in h
    words   int32 [arena / 4]    the arena, for directories
    blocks  int32 [blocks, 4]    site in the group, first column in the site, first column in y, out_features
"""

# a kernel's types are those of its launch
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from weft.kernels.functions import bent
from weft.kernels.layout import (
    ACT,
    ALIGN,
    B_OFF,
    BETA_OFF,
    HEADER_WORDS,
    INNER_OFF,
    KRON_COUNT,
    RANK,
    SIGMA_OFF,
    SITE_WORDS,
    TAP_SHIFT,
    UNIT,
)

# what kernels may read of this module has to be constexpr
_ALIGN = tl.constexpr(ALIGN)
_UNIT = tl.constexpr(UNIT)
_HEADER = tl.constexpr(HEADER_WORDS)
_SITE = tl.constexpr(SITE_WORDS)
_RANK = tl.constexpr(RANK)
_B = tl.constexpr(B_OFF)
_KRONS = tl.constexpr(KRON_COUNT)
_SIGMA = tl.constexpr(SIGMA_OFF)
_BETA = tl.constexpr(BETA_OFF)
_ACT = tl.constexpr(ACT)
_ACT_MASK = tl.constexpr((1 << TAP_SHIFT) - 1)
_INNER = tl.constexpr(INNER_OFF)
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def plain_dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b, fp32, for a [M, K] and b [K, N] of one dtype; UPCAST multiplies in fp32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def precise_dot(h, b, acc, UPCAST: tl.constexpr):
    """acc + h b for fp32 h [M, K] and b [K, N] of the factors' dtype, without rounding h to it."""
    if UPCAST:
        acc = tl.dot(h, b.to(tl.float32), acc, input_precision="ieee")
    else:
        high = h.to(b.dtype)
        low = (h - high.to(tl.float32)).to(b.dtype)
        acc = tl.dot(low, b, acc)
        acc = tl.dot(high, b, acc)
    return acc


@triton.jit
def hidden_tile(h_ptr, rows, live, columns, rank, stride_hs, stride_ht, SPLITS: tl.constexpr):
    """The planes of h summed in order: fp32 [rows, columns], zero where dead or beyond ``rank``."""
    # [BM, BR]
    mask = live[:, None] & (columns[None, :] < rank)
    place = h_ptr + (rows[:, None] * stride_ht + columns[None, :])
    h = tl.load(place, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        h += tl.load(place + split * stride_hs, mask=mask, other=0.0)
    return h


@triton.jit
def shrink_kernel(
    x_ptr, factors_ptr, words_ptr, tiles_ptr, h_ptr,
    site, stride_xt, stride_hs, stride_ht,
    FEATURES: tl.constexpr, SPAN: tl.constexpr, FOLD: tl.constexpr, SITES: tl.constexpr, SITES_CEIL: tl.constexpr,
    ITEM: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 4
    block = tl.load(tile).to(tl.int64)
    row, stop, h_row = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    s = tl.arange(0, SITES_CEIL)
    entry = words_ptr + block * (_ALIGN // 4) + _HEADER + (site + s) * _SITE
    ranks = tl.load(entry + _RANK, mask=s < SITES, other=0)
    # the A of a group lie behind each other: the first is all of them
    first = tl.min(tl.where(ranks > 0, tl.load(entry, mask=s < SITES, other=0), _NOWHERE), axis=0)
    rank = tl.sum(ranks, axis=0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    if tl.program_id(1) * BN >= rank:
        return
    split = tl.program_id(2)
    # a row of A takes whole UNITs
    STRIDE: tl.constexpr = (FEATURES * ITEM + _UNIT - 1) // _UNIT * _UNIT // ITEM
    a_ptr = factors_ptr + block * (_ALIGN // ITEM) + first.to(tl.int64) * (_UNIT // ITEM)
    m = tl.arange(0, BM)
    live = m < stop - row
    x_rows = x_ptr + row.to(tl.int64) * stride_xt + m[:, None] * stride_xt
    a_rows = a_ptr + n[None, :] * STRIDE
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for part in range(FOLD):
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, SPAN, BK):
            k = (split * FOLD + part) * SPAN + start + tl.arange(0, BK)
            # [BM, BK]
            x = tl.load(x_rows + k[None, :], mask=live[:, None] & (k[None, :] < FEATURES), other=0.0)
            # [BK, BN]
            a = tl.load(a_rows + k[:, None], mask=(n[None, :] < rank) & (k[:, None] < FEATURES), other=0.0)
            acc = plain_dot(x, a, acc, UPCAST)
        total += acc
    h_tile = h_ptr + split * stride_hs + h_row.to(tl.int64) * stride_ht
    place = h_tile + (m[:, None] * stride_ht + n[None, :])
    tl.store(place, total, mask=live[:, None] & (n[None, :] < rank))


@triton.jit
def expand_kernel(
    y_ptr, h_ptr, factors_ptr, vectors_ptr, words_ptr, tiles_ptr, blocks_ptr,
    site, stride_yt, stride_hs, stride_ht,
    SPLITS: tl.constexpr, SITES: tl.constexpr, SITES_CEIL: tl.constexpr, EVEN: tl.constexpr,
    ITEM: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 4
    block = tl.load(tile).to(tl.int64)
    row, stop, h_row = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    part = blocks_ptr + tl.program_id(1) * 4
    member, column, y_column, tall = tl.load(part), tl.load(part + 1), tl.load(part + 2), tl.load(part + 3)
    if EVEN:
        tall = tl.multiple_of(tall, 16)
        column = tl.multiple_of(column, 16)
        y_column = tl.multiple_of(y_column, 16)
    s = tl.arange(0, SITES_CEIL)
    group = words_ptr + block * (_ALIGN // 4) + _HEADER + site * _SITE
    before = tl.sum(tl.load(group + s * _SITE + _RANK, mask=s < member, other=0), axis=0)
    entry = group + member * _SITE
    rank, b_off, sigma, beta = (
        tl.load(entry + _RANK),
        tl.load(entry + _B),
        tl.load(entry + _SIGMA),
        tl.load(entry + _BETA),
    )
    # a site with Kronecker terms is finished by their kernel: every output is rounded once
    if (tl.load(entry + _KRONS) > 0) | (rank + sigma + beta == 0):
        return
    act, inner = tl.load(entry + _ACT) & _ACT_MASK, tl.load(entry + _INNER)
    m = tl.arange(0, BM)
    n = column + tl.arange(0, BN)
    live, inside = m < stop - row, n < tall
    mask = live[:, None] & inside[None, :]
    # [BM, BN]
    # offsets inside a tile fit 32 bits, and take half the registers
    y_place = y_ptr + row.to(tl.int64) * stride_yt + (m[:, None] * stride_yt + (y_column + tl.arange(0, BN))[None, :])
    y = tl.load(y_place, mask=mask, other=0.0)
    vectors = vectors_ptr + block * (_ALIGN // 4)
    stride = (tall * ITEM + _UNIT - 1) // _UNIT * (_UNIT // ITEM)
    b_ptr = factors_ptr + block * (_ALIGN // ITEM) + b_off.to(tl.int64) * (_UNIT // ITEM)
    h_tile = h_ptr + h_row.to(tl.int64) * stride_ht + before
    # y joins last: sums that start from it would be rounded at its size
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    start = 0
    while start < rank:
        r = start + tl.arange(0, BR)
        # [BR, BN]
        b_mask = (r[:, None] < rank) & inside[None, :]
        b = tl.load(b_ptr + (r[:, None] * stride + n[None, :]), mask=b_mask, other=0.0)
        h = hidden_tile(h_tile, m, live, r, rank, stride_hs, stride_ht, SPLITS)
        if inner > 0:
            h += tl.load(vectors + inner.to(tl.int64) * (_UNIT // 4) + r, mask=r < rank, other=0.0)[None, :]
        if act > 0:
            h = bent(h, act)
        acc = precise_dot(h, b, acc, UPCAST)
        start += BR
    total = y.to(tl.float32)
    if sigma > 0:
        total *= tl.load(vectors + sigma.to(tl.int64) * (_UNIT // 4) + n, mask=inside, other=1.0)[None, :]
    acc += total
    if beta > 0:
        acc += tl.load(vectors + beta.to(tl.int64) * (_UNIT // 4) + n, mask=inside, other=0.0)[None, :]
    tl.store(y_place, acc.to(y_ptr.dtype.element_ty), mask=mask)
