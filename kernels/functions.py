"""The functions of ``activation`` in Triton, exact to a few units of fp32.

A program bends the h of one block, so which function it is, is the same for all of its lanes.
"""

# a kernel's types are those of its launch
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from weft.kernels.activation import NAMES

_RELU = tl.constexpr(NAMES.index("relu"))
_SILU = tl.constexpr(NAMES.index("silu"))
_GELU = tl.constexpr(NAMES.index("gelu"))
_GELU_TANH = tl.constexpr(NAMES.index("gelu_tanh"))
_TANH = tl.constexpr(NAMES.index("tanh"))
_SIGMOID = tl.constexpr(NAMES.index("sigmoid"))
_LEAKY_RELU = tl.constexpr(NAMES.index("leaky_relu"))


@triton.jit
def exp(x):
    """e to the power of fp32 x, held below what overflows: what is asked of it then is as good as infinite."""
    return tl.exp(tl.where(x > 80.0, 80.0, x))


@triton.jit
def tanh(x):
    """tanh of fp32 x."""
    square = x * x
    # near zero the quotient below cancels; there a polynomial is exact (Cephes' tanhf)
    series = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square + 1.33314422036e-1
    near = (series * square - 3.33332819422e-1) * square * x + x
    far = 1.0 - 2.0 / (exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(square < 0.390625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def bent(x, act):
    """The function numbered ``act`` of fp32 x, elementwise; NaN stays NaN."""
    if act == _RELU:
        x = tl.where(x < 0.0, 0.0, x)
    elif act == _SILU:
        x = x / (1.0 + exp(-x))
    elif act == _GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif act == _GELU_TANH:
        # x (1 + tanh u) / 2
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + exp(-2.0 * u))
    elif act == _TANH:
        x = tanh(x)
    elif act == _SIGMOID:
        x = 1.0 / (1.0 + exp(-x))
    elif act == _LEAKY_RELU:
        x = tl.where(x < 0.0, 0.01 * x, x)
    return x
