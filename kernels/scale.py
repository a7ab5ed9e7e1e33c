"""The scale on a site's input: x = round(sigma_in * x) in the rows whose adapter has one.

What scales and biases do to outputs is part of the kernels that write them (``lowrank``, ``kron``).
"""

# a kernel's types are those of its launch
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from weft.kernels.layout import ALIGN, HEADER_WORDS, SIGMA_IN_OFF, SITE_WORDS, UNIT

_ALIGN = tl.constexpr(ALIGN)
_UNIT = tl.constexpr(UNIT)
_HEADER = tl.constexpr(HEADER_WORDS)
_SITE = tl.constexpr(SITE_WORDS)
_SIGMA_IN = tl.constexpr(SIGMA_IN_OFF)


@triton.jit
def scale_input_kernel(
    x_ptr, vectors_ptr, words_ptr, tiles_ptr, site, stride_xt,
    FEATURES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 4
    block = tl.load(tile).to(tl.int64)
    row, stop = tl.load(tile + 1), tl.load(tile + 2)
    sigma = tl.load(words_ptr + block * (_ALIGN // 4) + _HEADER + site * _SITE + _SIGMA_IN)
    if sigma == 0:
        return
    m = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    # [BM, BN]
    place = x_ptr + (row + m).to(tl.int64)[:, None] * stride_xt + n[None, :]
    mask = (m < stop - row)[:, None] & (n < FEATURES)[None, :]
    # [BN]
    vector = vectors_ptr + block * (_ALIGN // 4) + sigma.to(tl.int64) * (_UNIT // 4) + n
    scale = tl.load(vector, mask=n < FEATURES, other=1.0)
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32) * scale[None, :]
    tl.store(place, x.to(x_ptr.dtype.element_ty), mask=mask)
