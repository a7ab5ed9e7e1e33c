"""Random matrices that are in no file, drawn again from their seed as PEFT draws them when it loads the adapter.

PEFT draws on the host, in an order that follows from the config, and so does this: whoever serves such a file computes
what PEFT would here. torch keeps the numbers of a seed from machine to machine, but promises nothing between its own
versions; a file that holds its matrices depends on none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Generator, Tensor

# for what parsers say of themselves
REDRAWN = "save_projection=false: drawn again"


@dataclass(frozen=True)
class Drawn:
    """Tensors of these shapes that ``draw`` makes of one generator, when a value is first read."""

    seed: int
    shapes: tuple[tuple[int, ...], ...]
    draw: "Callable[[Generator], tuple[Tensor, ...]]"

    @cached_property
    def tensors(self) -> "tuple[Tensor, ...]":
        """All of them."""
        import torch

        return tuple(t.float() for t in self.draw(torch.Generator().manual_seed(self.seed)))

    def value(self, number: int, name: str) -> Computed:
        """One of them, called by the name that it would have in the file."""
        return Computed(name, self.shapes[number], lambda: self.tensors[number], ())


def kaiming(seed: int, *shapes: tuple[int, int]) -> Drawn:
    """Matrices one after the other, each uniform within ±√(6 / columns)."""

    def draw(random: "Generator") -> "tuple[Tensor, ...]":
        import torch

        return tuple(torch.nn.init.kaiming_uniform_(torch.empty(shape), generator=random) for shape in shapes)

    return Drawn(seed, shapes, draw)
