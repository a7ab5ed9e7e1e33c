"""Functions between the two maps of a bottleneck: their numbers in a block, and what they compute."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# a block holds the place of a name in this list; never reorder it without a new block format
NAMES = ("identity", "relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu")

IDENTITY = 0

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}


def activate(x: Tensor, code: int) -> Tensor:
    """The function with this number, elementwise, in x's dtype."""
    return _FUNCTIONS[NAMES[code]](x)
