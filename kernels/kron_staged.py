"""Kronecker terms in two stages, for factors that the fused kernel (``kron``) would waste arithmetic on:

    fold   T[token, i1, o2] = sum over i2 of X[token, i1, i2] * w2[o2, i2]     one product over rows (token, i1)
    join   Y[token, o1, o2] = round(sigma * Y + sum over terms, i1 of w1[o1, i1] * T[token, i1, o2] + pair + beta)

The fused kernel makes rows of X w2^T anew for each of its cdiv(o1, BM) rows of tiles, and as many as BM at least,
token after token. Here they are made once, into scratch memory, and the rows of all tokens of a tile stand under each
other, as do the columns of T in ``join``: neither small i1 nor small o2 leaves a tile empty. Which sites go this way
is a rule (``kron_ways``) that every kernel applies for itself.

    t   fp32 [sites of the group, rows of the walk, most sum over terms of i1 * o2], written as far as it is read
"""

# a kernel's types are those of its launch
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from weft.kernels.kron import finish, mixed_dot
from weft.kernels.kron_ways import staged
from weft.kernels.layout import (
    ALIGN,
    HEADER_WORDS,
    KRON_COUNT,
    KRON_OFF,
    KRON_WORDS,
    SITE_WORDS,
    UNIT,
)
from weft.kernels.lowrank import plain_dot

_ALIGN = tl.constexpr(ALIGN)
_UNIT = tl.constexpr(UNIT)
_HEADER = tl.constexpr(HEADER_WORDS)
_SITE = tl.constexpr(SITE_WORDS)
_TERM = tl.constexpr(KRON_WORDS)
_KRON = tl.constexpr(KRON_OFF)
_KRONS = tl.constexpr(KRON_COUNT)


@triton.jit
def fold_kernel(
    x_ptr, t_ptr, factors_ptr, words_ptr, tiles_ptr,
    site, terms_most, stride_xt, stride_ts, stride_tt,
    EVEN: tl.constexpr, ITEM: tl.constexpr, UPCAST: tl.constexpr, HEIGHT: tl.constexpr, DEPTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 4
    block = tl.load(tile).to(tl.int64)
    row, stop, t_row = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    member, which = tl.program_id(1) // terms_most, tl.program_id(1) % terms_most
    head = words_ptr + block * (_ALIGN // 4)
    entry = head + _HEADER + (site + member) * _SITE
    count = tl.load(entry + _KRONS)
    terms = head + tl.load(entry + _KRON).to(tl.int64) * (_UNIT // 4)
    if which >= count:
        return
    if not staged(terms, count, HEIGHT, DEPTH):
        return
    column = 0
    t = 0
    while t < which:
        column += tl.load(terms + t * _TERM + 3) * tl.load(terms + t * _TERM + 4)
        t += 1
    term = terms + which * _TERM
    i1, o2, i2 = tl.load(term + 3), tl.load(term + 4), tl.load(term + 5)
    if EVEN:
        i2 = tl.multiple_of(i2, 8)
        o2 = tl.multiple_of(o2, 8)
    o2_blocks = (o2 + BN - 1) // BN
    first = tl.program_id(2) // o2_blocks * BM
    height = (stop - row) * i1
    if first >= height:
        return
    m = first + tl.arange(0, BM)
    token = m // i1
    i = m - token * i1
    n = tl.program_id(2) % o2_blocks * BN + tl.arange(0, BN)
    UNITS: tl.constexpr = _UNIT // ITEM
    stride_2 = (i2 + UNITS - 1) // UNITS * UNITS
    w2 = factors_ptr + block * (_ALIGN // ITEM) + tl.load(term + 1).to(tl.int64) * UNITS
    x_rows = x_ptr + row.to(tl.int64) * stride_xt + (token * stride_xt + i * i2)[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, i2, BK):
        k = start + tl.arange(0, BK)
        # [BM, BK]
        x = tl.load(x_rows + k[None, :], mask=(m[:, None] < height) & (k[None, :] < i2), other=0.0)
        # [BK, BN]; the zeros behind a row's end are loaded rather than masked
        w_mask = (k[:, None] < stride_2) & (n[None, :] < o2)
        w = tl.load(w2 + (n[None, :] * stride_2 + k[:, None]), mask=w_mask, other=0.0)
        acc = plain_dot(x, w, acc, UPCAST)
    place = t_ptr + member.to(tl.int64) * stride_ts + t_row.to(tl.int64) * stride_tt + column
    place += (token * stride_tt + i * o2)[:, None] + n[None, :]
    tl.store(place, acc, mask=(m[:, None] < height) & (n[None, :] < o2))


@triton.jit
def join_kernel(
    y_ptr, t_ptr, h_ptr, factors_ptr, vectors_ptr, words_ptr, tiles_ptr, columns_ptr,
    site, stride_yt, stride_ts, stride_tt, stride_hs, stride_ht,
    SPLITS: tl.constexpr, SITES_CEIL: tl.constexpr, EVEN: tl.constexpr, ITEM: tl.constexpr, UPCAST: tl.constexpr,
    HEIGHT: tl.constexpr, DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 4
    block = tl.load(tile).to(tl.int64)
    row, stop, h_row = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    member = tl.program_id(1)
    head = words_ptr + block * (_ALIGN // 4)
    group = head + _HEADER + site * _SITE
    entry = group + member * _SITE
    count = tl.load(entry + _KRONS)
    if count == 0:
        return
    terms = head + tl.load(entry + _KRON).to(tl.int64) * (_UNIT // 4)
    if not staged(terms, count, HEIGHT, DEPTH):
        return
    # all terms of a site have one (o1, o2)
    o1, o2 = tl.load(terms + 2), tl.load(terms + 4)
    if EVEN:
        o2 = tl.multiple_of(o2, 8)
    o1_blocks = (o1 + BM - 1) // BM
    first, width = tl.program_id(2) // o1_blocks * BN, (stop - row) * o2
    if first >= width:
        return
    o = tl.program_id(2) % o1_blocks * BM + tl.arange(0, BM)
    # columns of all tokens of the tile beside each other
    c = first + tl.arange(0, BN)
    token = c // o2
    n = c - token * o2
    UNITS: tl.constexpr = _UNIT // ITEM
    factors = factors_ptr + block * (_ALIGN // ITEM)
    t_place = t_ptr + member.to(tl.int64) * stride_ts + h_row.to(tl.int64) * stride_tt
    t_place += (token * stride_tt + n)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    t = 0
    while t < count:
        term = terms + t * _TERM
        i1 = tl.load(term + 3)
        stride_1 = (i1 + UNITS - 1) // UNITS * UNITS
        w1 = factors + tl.load(term).to(tl.int64) * UNITS
        start = 0
        while start < i1:
            i = start + tl.arange(0, BK)
            # [BM, BK]
            mix = tl.load(
                w1 + (o[:, None] * stride_1 + i[None, :]), mask=(o[:, None] < o1) & (i[None, :] < stride_1), other=0.0
            )
            # [BK, BN]
            folded = tl.load(t_place + i[:, None] * o2, mask=(i[:, None] < i1) & (c[None, :] < width), other=0.0)
            acc = mixed_dot(mix, folded, acc, UPCAST)
            start += BK
        t_place += i1 * o2
        t += 1
    mask = (o[:, None] < o1) & (c[None, :] < width)
    out = o[:, None] * o2 + n[None, :]
    y_place = y_ptr + row.to(tl.int64) * stride_yt + tl.load(columns_ptr + member) + (token * stride_yt)[None, :] + out
    finish(
        acc, y_place, mask, out, o1 * o2, h_ptr + h_row.to(tl.int64) * stride_ht + (token * stride_ht)[None, :],
        (c < width)[None, :], factors, vectors_ptr + block * (_ALIGN // 4), group, member, stride_hs,
        SPLITS, SITES_CEIL, ITEM,
    )  # fmt: skip
