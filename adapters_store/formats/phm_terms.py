"""Terms of maps x H with H = Σ kron(S_i, W_i) [in, out], the way round that ``parts.KronSum`` has them: those of Hᵀ."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor


def kron_term(w1: Value, weights: tuple[TensorRef, ...], i: int) -> tuple[Value, Value] | tuple[Value, Value, Value]:
    """w1 and W_iᵀ, which is of ``weights`` W [n, in, out], or L [n, in, k] and R [n, k, out] with W_i = L_i R_i.

    Of two factors the product is taken where it is no larger than they are.
    """
    if len(weights) == 1:
        _, wide, tall = weights[0].shape
        return w1, Computed(weights[0].name, (tall, wide), turned(i), weights)
    left, right = weights
    (_, wide, rank), tall = left.shape, right.shape[2]
    if rank * (wide + tall) >= wide * tall:
        return w1, Computed(left.name, (tall, wide), turned(i), weights)
    return (
        w1,
        Computed(right.name, (tall, rank), turned(i), (right,)),
        Computed(left.name, (rank, wide), turned(i), (left,)),
    )


def turned(i: int) -> "Callable[..., Tensor]":
    """Matrix i of a stack, or of the products of two, transposed."""

    def formula(left: "Tensor", right: "Tensor | None" = None) -> "Tensor":
        return (left[i] if right is None else left[i] @ right[i]).T

    return formula
