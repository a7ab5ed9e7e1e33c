"""Sums of Kronecker terms, never materialised: with x as X [i1, i2] and y as Y [o1, o2],

    Y = round(sigma * Y + sum over terms of w1 X w2^T + low-rank pair + beta)

One launch for a group of sites. A program makes [o1, o2] tiles of all tokens of a row tile at one site: on chip,
first X w2^T for the tokens' rows of X, then the mix of those rows by w1. A pass takes as many tokens as fit: a
balanced 64 x 64 term fills it with one token; where w1 is small, 8 x 8 say, eight tokens stand below each other in
the first product and w1 becomes block-diagonal in the second, so the large w2 is read once for all of them and
nothing is written in between. The mix meets X w2^T at fp32's precision, as expand meets h (``lowrank``).

This kernel finishes its sites: it adds their low-rank pairs, scales and biases as well.
"""

import triton
import triton.language as tl

from weft.kernels.layout import (
    ALIGN,
    B_OFF,
    BETA_OFF,
    HEADER_WORDS,
    KRON_COUNT,
    KRON_OFF,
    KRON_WORDS,
    RANK,
    SIGMA_OFF,
    SITE_WORDS,
    UNIT,
)
from weft.kernels.lowrank import precise_dot

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


@triton.jit
def kron_kernel(
    y_ptr, x_ptr, h_ptr, factors_ptr, vectors_ptr, words_ptr, tiles_ptr, columns_ptr,
    site, stride_yt, stride_xt, stride_hs, stride_ht,
    SPLITS: tl.constexpr, SITES_CEIL: tl.constexpr, ITEM: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
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
    o1, o2 = tl.load(terms + 2), tl.load(terms + 4)
    # tokens of a pass: as many as keep both o1 and every i1 inside BM rows
    tallest = o1
    t = 0
    while t < count:
        tallest = tl.maximum(tallest, tl.load(terms + t * _TERM + 3))
        t += 1
    tokens = tl.maximum(BM // tallest, 1)
    height = tl.minimum(o1, BM)
    o2_blocks = (o2 + BN - 1) // BN
    o_start = tl.program_id(2) // o2_blocks * BM
    if o_start >= o1:
        return
    m = tl.arange(0, BM)
    n = tl.program_id(2) % o2_blocks * BN + tl.arange(0, BN)
    # row m of the tile is row ``o`` of Y of the pass's token ``token``
    token, o = m // height, o_start + m % height
    # [BM, BN] columns of the site
    out = o[:, None] * o2 + n[None, :]
    fits = (token < tokens)[:, None] & (o[:, None] < o1) & (n[None, :] < o2)
    y_column = tl.load(columns_ptr + member)
    s = tl.arange(0, SITES_CEIL)
    before = tl.sum(tl.load(group + s * _SITE + _RANK, mask=s < member, other=0), axis=0)
    rank, b_off, sigma, beta = tl.load(entry + _RANK), tl.load(entry + _B), tl.load(entry + _SIGMA), tl.load(entry + _BETA)
    vectors = vectors_ptr + block * (_ALIGN // 4)
    factors = factors_ptr + block * (_ALIGN // ITEM)
    stride_b = (o1 * o2 * ITEM + _UNIT - 1) // _UNIT * (_UNIT // ITEM)
    b_ptr = factors + b_off.to(tl.int64) * (_UNIT // ITEM)

    at = row
    while at < stop:
        live = (token < tokens) & (at + token < stop)
        mask = fits & live[:, None]
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        t = 0
        while t < count:
            term = terms + t * _TERM
            i1, i2 = tl.load(term + 3), tl.load(term + 5)
            w1 = factors + tl.load(term).to(tl.int64) * (_UNIT // ITEM)
            w2 = factors + tl.load(term + 1).to(tl.int64) * (_UNIT // ITEM)
            stride_1 = (i1 * ITEM + _UNIT - 1) // _UNIT * (_UNIT // ITEM)
            stride_2 = (i2 * ITEM + _UNIT - 1) // _UNIT * (_UNIT // ITEM)
            deep = tl.minimum(i1, BM)
            i_start = 0
            while i_start < i1:
                # row j of the product X w2^T is row ``i`` of X of the pass's token ``source``
                j = tl.arange(0, BM)
                source, i = j // deep, i_start + j % deep
                there = (source < tokens) & (at + source < stop) & (i < i1)
                x_rows = x_ptr + (at + source).to(tl.int64)[:, None] * stride_xt + i[:, None] * i2
                product = tl.zeros((BM, BN), dtype=tl.float32)
                k_start = 0
                while k_start < i2:
                    k = k_start + tl.arange(0, BK)
                    # [BM, BK]
                    x = tl.load(x_rows + k[None, :], mask=there[:, None] & (k[None, :] < i2), other=0.0)
                    # [BK, BN]
                    w2_mask = (k[:, None] < i2) & (n[None, :] < o2)
                    w = tl.load(w2 + n.to(tl.int64)[None, :] * stride_2 + k[:, None], mask=w2_mask, other=0.0)
                    if UPCAST:
                        product = tl.dot(x.to(tl.float32), w.to(tl.float32), product, input_precision="ieee")
                    else:
                        product = tl.dot(x, w, product)
                    k_start += BK
                # [BM, BM] w1 where both rows belong to one token
                same = (token[:, None] == source[None, :]) & (o[:, None] < o1) & there[None, :] & live[:, None]
                mix = tl.load(w1 + o[:, None] * stride_1 + i[None, :], mask=same, other=0.0)
                acc = mixed_dot(mix, product, acc, UPCAST)
                i_start += deep
            t += 1
        y_place = y_ptr + (at + token).to(tl.int64)[:, None] * stride_yt + y_column + out
        y = tl.load(y_place, mask=mask, other=0.0).to(tl.float32)
        if sigma > 0:
            y *= tl.load(vectors + sigma.to(tl.int64) * (_UNIT // 4) + out, mask=mask, other=1.0)
        acc += y
        h_rows = h_ptr + (h_row + at - row + token).to(tl.int64) * stride_ht + before
        r = 0
        while r < rank:
            h = tl.load(h_rows + r, mask=live, other=0.0)
            for split in tl.static_range(1, SPLITS):
                h += tl.load(h_rows + split * stride_hs + r, mask=live, other=0.0)
            b = tl.load(b_ptr + r * stride_b + out, mask=mask, other=0.0)
            acc += h[:, None] * b.to(tl.float32)
            r += 1
        if beta > 0:
            acc += tl.load(vectors + beta.to(tl.int64) * (_UNIT // 4) + out, mask=mask, other=0.0)
        tl.store(y_place, acc.to(y_ptr.dtype.element_ty), mask=mask)
        at += tokens


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
