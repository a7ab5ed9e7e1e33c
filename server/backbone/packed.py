"""Weights in the order in which oneDNN multiplies them: on a CPU, products of a batch take half to two thirds the time.

The only place that touches torch's private mkldnn operators. ``pack`` answers None wherever they are missing or give
other results than torch, and the plain product stays; ``Backbone.linears`` says which of the two runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# the order suits any number of rows; this is the size of a small decode batch, where it matters most
ROWS_HINT = 16
PROBE_ROWS = 3
# of the largest value of a probe; sums in another order differ by less
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Packed:
    """One weight [out, in], held in packed order only."""

    def __init__(self, weight: Tensor):
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS_HINT)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [rows, in] → [rows, out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._weight, bias, "none", [], "")
        return y

    def dense(self) -> Tensor:
        """A copy in the usual order, bit for bit what was packed."""
        weight: Tensor = self._weight.to_dense()
        return weight


def pack(weight: Tensor) -> Packed | None:
    """The weight packed, or None where it has to stay as it is."""
    if weight.device.type != "cpu" or weight.dtype not in TOLERANCE or not _available(weight.dtype):
        return None
    packed = Packed(weight)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_ROWS, weight.shape[1], generator=generator).to(weight.dtype)
    want = F.linear(x, weight).float()
    error = (packed.linear(x, None).float() - want).abs().max()
    same = error <= TOLERANCE[weight.dtype] * want.abs().max() and torch.equal(packed.dense(), weight)
    return packed if same else None


def _available(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
