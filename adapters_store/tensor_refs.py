"""Tensors as a parser speaks of them: one in the file, or one that a formula makes of several. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

INTEGERS = ("I32", "I64", "U8", "I16", "I8")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of the weights file: bytes [start, stop) after the header. ``dtype`` as safetensors names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that a method's formula makes, in fp32, when values are read.

    name:        the tensor of the file that messages about it name
    shape:       of the result, known from shapes alone
    formula:     takes the sources, then the parameters; must not write to them
    sources:     tensors of the file, or results of other formulas
    parameters:  paths of frozen parameters; a site's weight comes as [out, in] whatever the module stores
    """

    name: str
    shape: tuple[int, ...]
    formula: "Callable[..., Tensor]"
    sources: "tuple[Value, ...]"
    parameters: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)


Value = TensorRef | Computed


class Bytes(Protocol):
    """The bytes that TensorRefs count in: a memoryview, or what cuts like one."""

    def __getitem__(self, part: slice, /) -> memoryview: ...
