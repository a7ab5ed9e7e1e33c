"""What the files of an adapter say, before anything is computed: operators that point at tensors in the file.

Imports no torch. A parser in ``formats/`` makes these; ``compile`` folds them into the arrays that kernels read.
Operators of linears are here, those of other places in ``parts``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from weft.adapters_store.parts import Gate, Part
from weft.adapters_store.tensor_refs import Bytes, TensorRef, Value


@dataclass(frozen=True, slots=True)
class LowRank:
    """y += scale * gate(x) * (x aᵀ) bᵀ with a [rank, in] and b [out, rank]."""

    a: Value
    b: Value
    scale: float = 1.0
    gate: Gate | None = None


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a Kronecker product, [rows, columns]: a tensor, or the product ``left @ right`` of two.

    transposed:  the file stores [columns, rows]
    term:        which slice of a leading axis of terms, None when there is no such axis
    """

    left: Value
    right: Value | None = None
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
    """y = v ⊙ y for everything so far, bias included; with ``of_input``, y = Linear(v ⊙ x)."""

    vector: Value
    of_input: bool


@dataclass(frozen=True, slots=True)
class Bias:
    """y += scale * v; with ``absolute``, v replaces the bias of the linear instead."""

    vector: Value
    scale: float = 1.0
    absolute: bool = False


@dataclass(frozen=True, slots=True)
class Sparse:
    """y += x Δᵀ with Δ [out, in] zero but for ``values`` [n] at ``index`` [n] of the flat matrix, row by row."""

    index: Value
    values: Value


@dataclass(frozen=True, slots=True)
class Rows:
    """y[:, index] += x rowsᵀ with rows [k, in]; ``replaces`` as for Dense."""

    index: Value
    rows: Value
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Columns:
    """y += x[:, index] columnsᵀ with columns [out, k]."""

    index: Value
    columns: Value


@dataclass(frozen=True, slots=True)
class Dense:
    """y += x deltaᵀ with delta [out, in]; ``replaces`` if the file holds a weight in the place of the linear's own."""

    delta: Value
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Bank:
    """Factors of which several sites, and several adapters, read parts: a [rank, widest in], b [tallest out, rank]."""

    a: Value
    b: Value


@dataclass(frozen=True, slots=True)
class Shared:
    """y += outer ⊙ (b (inner ⊙ (a x))) with the first columns of the bank's a and the first rows of its b."""

    bank: Bank
    inner: Value
    outer: Value


Operator = Shared | LowRank | Kron | Scale | Bias | Sparse | Rows | Columns | Dense


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
    parts:     operators at places that are no linears
    zeros:     tensors that must hold nothing but zeros
    """

    method: str
    dialect: str
    sites: Mapping[str, SiteOperators]
    copies: tuple[tuple[TensorRef, str], ...] = ()
    notes: tuple[str, ...] = ()
    weights: Bytes | None = None
    parts: tuple[Part, ...] = ()
    zeros: tuple[TensorRef, ...] = ()
