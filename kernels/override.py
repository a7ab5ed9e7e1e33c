"""Norms in the rows whose adapter has a weight or bias of its own: ((x - mean) * rsqrt(var + eps)) * (offset + w) + b.

A program makes one row [d] of one group of a token: in fp32, rounded once. What an adapter leaves is the module's own.

    tiles   int32 [tiles, RECORD_TILE]   (``walks``): offsets are those of weight and bias, 0 for none
"""

# a kernel's types are those of its launch
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from weft.kernels.layout import ALIGN, UNIT
from weft.kernels.walks import RECORD_TILE

_ALIGN = tl.constexpr(ALIGN)
_UNIT = tl.constexpr(UNIT)
_TILE = tl.constexpr(RECORD_TILE)


@triton.jit
def norm_kernel(
    out_ptr, x_ptr, vectors_ptr, weight_ptr, bias_ptr, tiles_ptr,
    stride_ot, stride_og, stride_xt, stride_xg, eps, offset,
    FEATURES: tl.constexpr, CEIL: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * _TILE
    row = tl.load(tile + 1) + tl.program_id(1)
    if row >= tl.load(tile + 2):
        return
    group = tl.program_id(2)
    n = tl.arange(0, CEIL)
    inside = n < FEATURES
    x = tl.load(x_ptr + row.to(tl.int64) * stride_xt + group * stride_xg + n, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, axis=0) / FEATURES, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / FEATURES + eps)
    vectors = vectors_ptr + tl.load(tile).to(tl.int64) * (_ALIGN // 4)
    weight, bias = tl.load(tile + 3).to(tl.int64) * (_UNIT // 4), tl.load(tile + 4).to(tl.int64) * (_UNIT // 4)
    if weight > 0:
        x *= offset + tl.load(vectors + weight + n, mask=inside, other=0.0)
    else:
        x *= offset + tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if bias > 0:
        x += tl.load(vectors + bias + n, mask=inside, other=0.0)
    elif BIASED:
        x += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    place = out_ptr + row.to(tl.int64) * stride_ot + group * stride_og + n
    tl.store(place, x.to(out_ptr.dtype.element_ty), mask=inside)
