"""What the files of an adapter say, before anything is computed: operators that point at tensors in the file.

Imports no torch. A parser in ``formats/`` makes these; ``compile`` folds them into the arrays that kernels read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of the weights file: bytes [start, stop) after the header. ``dtype`` is F32, F16 or BF16."""

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
class LowRank:
    """y += scale * (x aᵀ) bᵀ with a [rank, in] and b [out, rank]."""

    a: TensorRef
    b: TensorRef
    scale: float


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a Kronecker product, [rows, columns]: a tensor, or the product ``left @ right`` of two.

    transposed:  the file stores [columns, rows]
    term:        which slice of a leading axis of terms, None when there is no such axis
    """

    left: TensorRef
    right: TensorRef | None = None
    transposed: bool = False
    term: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns] as the formula uses it."""
        rows, columns = self.left.shape[-2:]
        if self.right is not None:
            columns = self.right.shape[-1]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def inner(self) -> int | None:
        """Rank of a product, None for a plain tensor."""
        return None if self.right is None else self.left.shape[-1]


@dataclass(frozen=True, slots=True)
class Kron:
    """y += scale * x kron(w1, w2)ᵀ with w1 [o1, i1], w2 [o2, i2], o1·o2 = out and i1·i2 = in."""

    w1: Factor
    w2: Factor
    scale: float


@dataclass(frozen=True, slots=True)
class Scale:
    """y = v ⊙ Linear(x), bias included; with ``of_input``, y = Linear(v ⊙ x)."""

    vector: TensorRef
    of_input: bool


@dataclass(frozen=True, slots=True)
class Bias:
    """y += scale * v; with ``absolute``, v replaces the bias of the linear instead."""

    vector: TensorRef
    scale: float = 1.0
    absolute: bool = False


Operator = LowRank | Kron | Scale | Bias


@dataclass(frozen=True, slots=True)
class SiteOperators:
    """The operators of one site in the order in which they apply, and what happened to the scales on the way."""

    operators: tuple[Operator, ...]
    folds: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParsedAdapter:
    """An adapter whose names, shapes and settings are all judged; only its values are not.

    sites:     by module path of the backbone
    copies:    tensors that must equal the backbone's parameter of the path beside them, bit for bit
    weights:   the data part of the weights file, as read once; None when only the header was read
    """

    method: str
    dialect: str
    sites: Mapping[str, SiteOperators]
    copies: tuple[tuple[TensorRef, str], ...] = ()
    notes: tuple[str, ...] = ()
    weights: memoryview | None = None
