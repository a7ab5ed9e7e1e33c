"""Networks of one form beside many single rows, run as one network in which every row has weights of its own.

The modules stay the family's; those that hold weights are swapped for ones that give each row its own, and functions
with rounding of their own run over whole vectors. So a row's numbers do not depend on who else is in the batch.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.pytorch_utils import Conv1D

from weft.kernels.activation import by_rows
from weft.kernels.parts import rowwise

# where modules of functions are defined: elementwise, without weights
FUNCTIONS = (activations.__name__, nn.modules.activation.__name__)


class _Linear(nn.Module):
    """weight [n, out, in], or [n, in, out] where the family stores it so; bias [n, out]; x [1, n, in] or [n, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool):
        super().__init__()
        self.weight, self.bias, self._transposed = weight, bias, transposed

    def forward(self, x: Tensor) -> Tensor:
        """As x, [.., n, out]."""
        weight = self.weight.transpose(1, 2).contiguous() if self._transposed else self.weight
        y = rowwise(x.flatten(0, -2), weight)
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class _LayerNorm(nn.Module):
    """weight and bias [n, d]; x [1, n, d]."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self._eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """[1, n, d]."""
        y = F.layer_norm(x.float(), x.shape[-1:], eps=self._eps) * self.weight.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


class _Function(nn.Module):
    """A function of a module, its rows x [1, n, d] rounded alike wherever they stand."""

    def __init__(self, function: nn.Module):
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return by_rows(x.flatten(0, -2), self._function).view(x.shape)


def _norm_by_rows(norm: nn.Module, heads_first: bool) -> None:
    """Let a family's own norm over the last dimension take a weight [n, d], of x [1, n, d], or of each head."""
    kind = type(norm)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        turn = x.dim() == 4 and not heads_first
        y: Tensor = kind.forward(self, x.transpose(1, 2) if turn else x)
        return y.transpose(1, 2) if turn else y

    norm.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def give_rows_weights(module: nn.Module, heads_first: bool, only: str | None = None) -> None:
    """Swap or change, inside a module, what holds weights, so that each of n rows is given its own.

    heads_first:  whether the family's norms of heads get [1, heads, n, d], not [1, n, heads, d]
    only:         the one child that is meant
    """
    for name, child in list(module.named_children()):
        if only is not None and name != only:
            continue
        if isinstance(child, nn.Linear):
            module.add_module(name, _Linear(child.weight, child.bias, transposed=False))
        elif isinstance(child, Conv1D):
            module.add_module(name, _Linear(child.weight, child.bias, transposed=True))
        elif isinstance(child, nn.LayerNorm):
            module.add_module(name, _LayerNorm(child))
        elif type(child).__module__ in FUNCTIONS:
            module.add_module(name, _Function(child))
        elif "norm" in type(child).__name__.lower() and list(child.parameters(recurse=False)):
            _norm_by_rows(child, heads_first)
        else:
            give_rows_weights(child, heads_first)
