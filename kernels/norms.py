"""A norm module as arithmetic sees it: ((x − mean) · rsqrt(var + eps)) · (offset + w) + b."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """The frozen module.

    weight, bias:  [d], its own
    centred:       whether the mean is taken off
    offset:        what the weight is added to: 1 in families that store weights around 0
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool
    offset: float


def normed(x: Tensor, norm: Norm) -> Tensor:
    """x [.., d] before weight and bias, in fp32."""
    wide = x.float()
    if norm.centred:
        wide = wide - wide.mean(dim=-1, keepdim=True)
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.eps)


def overridden(x: Tensor, norm: Norm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [rows, groups, d] through the norm with another weight or bias, or both: in fp32.

    weight, bias:  [1, d] for all of these rows or [rows, 1, d], in the place of the norm's own
    """
    made = normed(x, norm) * (norm.offset + (norm.weight if weight is None else weight).float())
    own = norm.bias if bias is None else bias
    return made if own is None else made + own.float()
