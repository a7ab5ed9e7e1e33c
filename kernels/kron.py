"""Sums of Kronecker terms, never materialised: with x as X [i1, i2] and y as Y [o1, o2],

    Y = round(sigma * Y + sum over terms of w1 X w2^T + low-rank pair, which may be bent, + beta)

One launch for a group of sites. A program makes one tile [o1, o2] of Y for each token of a row tile in turn, all
on chip: first rows of X w2^T, then their mix by w1. Nothing is written in between, and the parts of w1 and w2 that
a program reads stay in its cache from token to token. Sites with factors far from square (8 x 8 with 512 x 512) go
another way (``kron_ways``). The mix meets X w2^T at fp32's precision, as expand meets h (``lowrank``).

This kernel finishes its sites: it adds their low-rank pairs, scales and biases as well, and rounds once.
"""

# a kernel's types are those of its launch
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from weft.kernels.functions import bent
from weft.kernels.kron_ways import staged
from weft.kernels.layout import (
    ACT,
    ALIGN,
    B_OFF,
    BETA_OFF,
    HEADER_WORDS,
    INNER_OFF,
    KRON_COUNT,
    KRON_OFF,
    KRON_WORDS,
    RANK,
    SIGMA_OFF,
    SITE_WORDS,
    TAP_SHIFT,
    UNIT,
)
from weft.kernels.lowrank import plain_dot

_ALIGN = tl.constexpr(ALIGN)
_UNIT = tl.constexpr(UNIT)
_HEADER = tl.constexpr(HEADER_WORDS)
_SITE = tl.constexpr(SITE_WORDS)
_TERM = tl.constexpr(KRON_WORDS)
_RANK = tl.constexpr(RANK)
_B = tl.constexpr(B_OFF)
_KRON = tl.constexpr(KRON_OFF)
_KRONS = tl.constexpr(KRON_COUNT)
_SIGMA = tl.constexpr(SIGMA_OFF)
_BETA = tl.constexpr(BETA_OFF)
_ACT = tl.constexpr(ACT)
_ACT_MASK = tl.constexpr((1 << TAP_SHIFT) - 1)
_INNER = tl.constexpr(INNER_OFF)


@triton.jit
def mixed_dot(w, product, acc, UPCAST: tl.constexpr):
    """acc + w p for w [M, K] of the factors' dtype and fp32 p [K, N], without rounding p to it."""
    if UPCAST:
        acc = tl.dot(w.to(tl.float32), product, acc, input_precision="ieee")
    else:
        high = product.to(w.dtype)
        low = (product - high.to(tl.float32)).to(w.dtype)
        acc = tl.dot(w, low, acc)
        acc = tl.dot(w, high, acc)
    return acc


@triton.jit
def kron_term(
    x_ptr, factors, term, o, n, o1, o2, acc,
    EVEN: tl.constexpr, ITEM: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc + rows ``o`` and columns ``n`` of w1 X w2^T for one token's x."""
    i1, i2 = tl.load(term + 3), tl.load(term + 5)
    if EVEN:
        i2 = tl.multiple_of(i2, 8)
    # rows of factors take whole UNITs; the zeros behind their ends are loaded rather than masked
    UNITS: tl.constexpr = _UNIT // ITEM
    stride_1 = (i1 + UNITS - 1) // UNITS * UNITS
    stride_2 = (i2 + UNITS - 1) // UNITS * UNITS
    w1 = factors + tl.load(term).to(tl.int64) * UNITS
    w2 = factors + tl.load(term + 1).to(tl.int64) * UNITS
    start = 0
    while start < i1:
        i = start + tl.arange(0, BM)
        product = tl.zeros((BM, BN), dtype=tl.float32)
        k_start = 0
        while k_start < i2:
            k = k_start + tl.arange(0, BK)
            # [BM, BK]
            x = tl.load(x_ptr + (i[:, None] * i2 + k[None, :]), mask=(i[:, None] < i1) & (k[None, :] < i2), other=0.0)
            # [BK, BN]
            w = tl.load(
                w2 + (n[None, :] * stride_2 + k[:, None]), mask=(k[:, None] < stride_2) & (n[None, :] < o2), other=0.0
            )
            product = plain_dot(x, w, product, UPCAST)
            k_start += BK
        # [BM, BM]
        mix = tl.load(
            w1 + (o[:, None] * stride_1 + i[None, :]), mask=(o[:, None] < o1) & (i[None, :] < stride_1), other=0.0
        )
        acc = mixed_dot(mix, product, acc, UPCAST)
        start += BM
    return acc


@triton.jit
def finish(
    acc, y_place, mask, out, tall, h_place, live, factors, vectors, group, member, stride_hs,
    SPLITS: tl.constexpr, SITES_CEIL: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """Store round(sigma * y + acc + the site's low-rank pair + beta) at ``y_place``.

    out:      each lane's column of the site, of which there are ``tall``
    h_place:  its token's row of h, where ``live``
    """
    entry = group + member * _SITE
    y = tl.load(y_place, mask=mask, other=0.0).to(tl.float32)
    sigma, beta, rank = tl.load(entry + _SIGMA), tl.load(entry + _BETA), tl.load(entry + _RANK)
    if sigma > 0:
        y *= tl.load(vectors + sigma.to(tl.int64) * (_UNIT // 4) + out, mask=mask, other=1.0)
    acc += y
    if rank > 0:
        s = tl.arange(0, SITES_CEIL)
        h_place += tl.sum(tl.load(group + s * _SITE + _RANK, mask=s < member, other=0), axis=0)
        stride_b = (tall * ITEM + _UNIT - 1) // _UNIT * (_UNIT // ITEM)
        b_ptr = factors + tl.load(entry + _B).to(tl.int64) * (_UNIT // ITEM)
        act, inner = tl.load(entry + _ACT) & _ACT_MASK, tl.load(entry + _INNER)
        left = rank
        while left > 0:
            h = tl.load(h_place, mask=live, other=0.0)
            for split in tl.static_range(1, SPLITS):
                h += tl.load(h_place + split * stride_hs, mask=live, other=0.0)
            if inner > 0:
                # the rank is read again: one register more that lives through the loop, and ptxas spills
                r = tl.load(entry + _RANK) - left
                h += tl.load(vectors + inner.to(tl.int64) * (_UNIT // 4) + r)
            if act > 0:
                h = bent(h, act)
            acc += h * tl.load(b_ptr + out, mask=mask, other=0.0).to(tl.float32)
            b_ptr += stride_b
            h_place += 1
            left -= 1
    if beta > 0:
        acc += tl.load(vectors + beta.to(tl.int64) * (_UNIT // 4) + out, mask=mask, other=0.0)
    tl.store(y_place, acc.to(y_place.dtype.element_ty), mask=mask)


@triton.jit
def kron_kernel(
    y_ptr, x_ptr, h_ptr, factors_ptr, vectors_ptr, words_ptr, tiles_ptr, columns_ptr,
    site, stride_yt, stride_xt, stride_hs, stride_ht,
    SPLITS: tl.constexpr, SITES_CEIL: tl.constexpr, EVEN: tl.constexpr, ITEM: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
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
    if staged(terms, count, BM, BK):
        return
    # all terms of a site have one (o1, o2)
    o1, o2 = tl.load(terms + 2), tl.load(terms + 4)
    if EVEN:
        o2 = tl.multiple_of(o2, 8)
    o2_blocks = (o2 + BN - 1) // BN
    o_start = tl.program_id(2) // o2_blocks * BM
    if o_start >= o1:
        return
    o = o_start + tl.arange(0, BM)
    n = tl.program_id(2) % o2_blocks * BN + tl.arange(0, BN)
    # [BM, BN] columns of the site
    out = o[:, None] * o2 + n[None, :]
    mask = (o[:, None] < o1) & (n[None, :] < o2)
    factors = factors_ptr + block * (_ALIGN // ITEM)
    while row < stop:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        t = 0
        while t < count:
            term = terms + t * _TERM
            acc = kron_term(
                x_ptr + row.to(tl.int64) * stride_xt, factors, term, o, n, o1, o2, acc, EVEN, ITEM, UPCAST, BM, BN, BK
            )
            t += 1
        finish(
            acc, y_ptr + row.to(tl.int64) * stride_yt + tl.load(columns_ptr + member) + out, mask, out, o1 * o2,
            h_ptr + h_row.to(tl.int64) * stride_ht, row < stop, factors, vectors_ptr + block * (_ALIGN // 4),
            group, member, stride_hs, SPLITS, SITES_CEIL, ITEM,
        )  # fmt: skip
        row += 1
        h_row += 1
