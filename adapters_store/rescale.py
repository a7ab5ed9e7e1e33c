"""What a scale of a linear makes of the deltas that were there before it. Imports no torch.

An adapter that comes later takes the linear and the deltas of those before it as its own linear: what it puts out is
scaled with them in it, and what it is given is scaled before they see it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from weft.adapters_store.operators import (
    Bias,
    Columns,
    Dense,
    Factor,
    Kron,
    LowRank,
    Operator,
    Rows,
    Scale,
    Shared,
    Sparse,
)
from weft.adapters_store.parts import Gate
from weft.adapters_store.tensor_refs import Computed, Value

if TYPE_CHECKING:
    from torch import Tensor


def scaled(operator: Operator, vector: Value, path: str) -> Operator:
    """The operator of the linear ``path`` with its outputs times ``vector``."""
    match operator:
        case LowRank(_, b, _, _):
            return replace(operator, b=_made(b, lambda t, v: t * v[:, None], vector))
        case Kron():
            return scaled(multiplied_out(operator), vector, path)
        case Shared(_, _, outer):
            return replace(operator, outer=_made(outer, lambda t, v: t * v.view_as(t), vector))
        case Sparse(index, values):
            # only the weight says how long a row is
            return replace(operator, values=_made(values, _by_row, index, vector, parameters=(f"{path}.weight",)))
        case Rows(index, rows):
            return replace(operator, rows=_made(rows, lambda t, i, v: t * v[i][:, None], index, vector))
        case Columns(_, columns):
            return replace(operator, columns=_made(columns, lambda t, v: t * v[:, None], vector))
        case Dense(delta):
            return replace(operator, delta=_made(delta, lambda t, v: t * v[:, None], vector))
        case Bias() | Scale():
            return operator


def fed(operator: Operator, vector: Value) -> Operator:
    """The operator with its inputs times ``vector``."""
    match operator:
        case LowRank(a, _, _, gate):
            gate = None if gate is None else Gate(_made(gate.weight, _per_input, vector), gate.bias)
            return replace(operator, a=_made(a, lambda t, v: t * v, vector), gate=gate)
        case Kron():
            return fed(multiplied_out(operator), vector)
        case Shared():
            return fed(written_out(operator, vector.elements), vector)
        case Sparse(index, values):
            return replace(operator, values=_made(values, lambda t, i, v: t * v[i % len(v)].view_as(t), index, vector))
        case Rows(_, rows):
            return replace(operator, rows=_made(rows, lambda t, v: t * v, vector))
        case Columns(index, columns):
            return replace(operator, columns=_made(columns, lambda t, i, v: t * v[i], index, vector))
        case Dense(delta):
            return replace(operator, delta=_made(delta, lambda t, v: t * v, vector))
        case Bias() | Scale():
            return operator


def written_out(shared: Shared, wide: int) -> LowRank:
    """The same operator with factors of its own, for a linear with inputs [wide]."""
    bank, rank, tall = shared.bank, shared.inner.elements, shared.outer.elements
    a = Computed(shared.inner.name, (rank, wide), lambda a, d: a[:, :wide] * d.view(-1, 1), (bank.a, shared.inner))
    b = Computed(shared.outer.name, (tall, rank), lambda b, d: b[:tall] * d.view(-1, 1), (bank.b, shared.outer))
    return LowRank(a, b)


def multiplied_out(kron: Kron) -> LowRank | Dense:
    """The same operator as a low-rank pair, or as a matrix where that has fewer numbers."""
    tall, wide = (prod(sides) for sides in zip(kron.w1.shape, kron.w2.shape, strict=True))
    rank = pair_rank(kron)
    if rank * (tall + wide) < tall * wide:
        a = _of_factors(kron, (rank, wide), lambda first, second: _kron(first[1], second[1]))
        return LowRank(a, _of_factors(kron, (tall, rank), lambda first, second: _kron(first[0], second[0])), kron.scale)
    scale = kron.scale
    whole = _of_factors(kron, (tall, wide), lambda first, second: _kron(first[0] @ first[1], second[0] @ second[1]))
    return Dense(Computed(whole.name, whole.shape, lambda t: t * scale, (whole,)))


def pair_rank(kron: Kron) -> int:
    """Rank of the product as a low-rank pair; a factor in one piece counts with its smaller side."""
    return prod(factor.inner or min(factor.shape) for factor in (kron.w1, kron.w2))


Halves = tuple["Tensor", "Tensor"]


def _of_factors(kron: Kron, shape: tuple[int, int], made: "Callable[[Halves, Halves], Tensor]") -> Computed:
    """A tensor made of both factors, each as a product of two."""
    factors = (kron.w1, kron.w2)

    def formula(*tensors: "Tensor") -> "Tensor":
        given = iter(tensors)
        first, second = (_halves(factor, given) for factor in factors)
        return made(first, second)

    sources = tuple(t for factor in factors for t in (factor.left, factor.right) if t is not None)
    return Computed(kron.w1.left.name, shape, formula, sources)


def _halves(factor: Factor, given: "Iterator[Tensor]") -> Halves:
    import torch

    left = next(given)
    if factor.term is not None:
        left = left[factor.term]
    if factor.transposed:
        left = left.T
    if factor.right is not None:
        return left, next(given)
    rows, columns = left.shape
    return (torch.eye(rows), left) if rows <= columns else (left, torch.eye(columns))


def _kron(first: "Tensor", second: "Tensor") -> "Tensor":
    import torch

    return torch.kron(first.contiguous(), second.contiguous())


def _by_row(values: "Tensor", index: "Tensor", v: "Tensor", weight: "Tensor") -> "Tensor":
    return values * v[index // weight.shape[1]].view_as(values)


def _per_input(weight: "Tensor", v: "Tensor") -> "Tensor":
    return (weight.reshape(-1, len(v)) * v).view_as(weight)


def _made(value: Value, formula: "Callable[..., Tensor]", *others: Value, parameters: tuple[str, ...] = ()) -> Computed:
    """The value changed by a formula that takes it first; indices and vectors among the others come flat."""

    def flat(first: "Tensor", *rest: "Tensor") -> "Tensor":
        count = len(others)
        lists = [t.reshape(-1) if t.is_floating_point() else t.long().reshape(-1) for t in rest[:count]]
        return formula(first, *lists, *rest[count:])

    return Computed(value.name, value.shape, flat, (value, *others), parameters)
