"""Functions between the two maps of a bottleneck: their numbers in a block, and what they compute."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# a block holds the place of a name in this list; never reorder it without a new block format
NAMES = ("identity", "relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu")

IDENTITY, SIGMOID = 0, NAMES.index("sigmoid")
# functions without rounding of their own
EXACT = frozenset({"identity", "relu"})
# elements that fill vectors of any CPU, in any dtype; elements from which torch shares a tensor out
LANES, GRAIN = 64, 32768

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


def activate_rows(x: Tensor, code: int) -> Tensor:
    """The function on x [n, d], a row's bits being the same wherever it stands."""
    function = _FUNCTIONS[NAMES[code]]
    return function(x) if NAMES[code] in EXACT else by_rows(x, function)


def by_rows(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """An elementwise function on x [n, d], a row's bits being the same wherever it stands.

    A CPU computes what fills no vector by other code, which rounds otherwise; where threads share a tensor out, that
    may be in the middle. So rows are padded to whole vectors, and never so many that they are shared out.
    """
    padded = F.pad(x, (0, -x.shape[1] % LANES)).contiguous()
    rows = max(1, (GRAIN - 1) // padded.shape[1])
    return torch.cat([function(part) for part in torch.split(padded, rows)])[:, : x.shape[1]]
