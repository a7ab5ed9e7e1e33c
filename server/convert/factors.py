"""The fewest singular directions of a matrix that hold all but a given part of it.

Most of what is low-rank is of a rank far below its size, and random combinations of the columns then span it; only
where they do not are the eigenvectors of the whole Gram matrix worked out, in fp64, which keeps singular values down to
1e-8 of the largest. Source of the first: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# combinations of columns that are tried before the eigenvectors, and how often each is multiplied through
SKETCHES = (16, 64, 256)
POWERS = 2
# of the smaller side: with more directions than this, eigenvectors are not dearer
SKETCH_MAX = 0.25
# how much more than a sketch finds there might be
SURE = 1.1
# from the rank that singular values promise on
RANKS_TRIED = 3


def factors(matrix: Tensor, lost_max: float, rank_max: int, device: str = "cpu") -> tuple[Tensor, Tensor, float] | None:
    """(a [r, in], b [out, r], what matrix - b a has left as a squared norm), r as small as it can be; on the host.

    None if more than ``rank_max`` directions are needed.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    # directions are sought among the outputs, of which there are fewer now
    wide = (matrix.T if tall else matrix).to(device)
    needed = _square(wide) - lost_max
    for basis in _bases(wide):
        inner = basis.T @ wide
        rest = _square(wide - basis @ inner)
        energy, turn = (each.flip(-1) for each in torch.linalg.eigh(inner.double() @ inner.double().T))
        if rest > lost_max:
            if _at_most(energy, rank_max) < needed:
                return None
            continue
        basis, inner = (basis.double() @ turn).float(), (turn.T @ inner.double()).float()
        behind = rest + (energy.sum() - energy.cumsum(0)).clamp(min=0)
        rank = int((behind > lost_max).sum()) + 1
        found = _measured(matrix, basis, inner, tall, lost_max, range(rank, min(rank + RANKS_TRIED - 1, rank_max) + 1))
        if found is not None or rank > rank_max:
            return found
    return None


def _at_most(energy: Tensor, rank: int) -> float:
    """What ``rank`` directions can hold, when the strongest ones hold about this, in descending order, each."""
    return SURE * float(energy[:rank].sum() + max(0, rank - len(energy)) * energy[-1])


def _bases(wide: Tensor) -> Iterator[Tensor]:
    """Orthonormal columns that hold more and more of the matrix, all of it in the end."""
    random = torch.Generator(wide.device).manual_seed(0)
    for count in SKETCHES:
        if count > SKETCH_MAX * wide.shape[0]:
            break
        drawn = torch.randn(wide.shape[1], count, generator=random, device=wide.device)
        basis = torch.linalg.qr(wide @ drawn).Q
        for _ in range(POWERS):
            basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis).Q).Q
        yield basis
    precise = wide.double()
    yield torch.linalg.eigh(precise @ precise.T).eigenvectors.float()


def _measured(
    matrix: Tensor, basis: Tensor, inner: Tensor, tall: bool, lost_max: float, ranks: range
) -> tuple[Tensor, Tensor, float] | None:
    """The first of these ranks that loses little enough: measured, for sums of fp32 are right to a few units only."""
    size = torch.linalg.vector_norm(inner, dim=1).sqrt()
    for rank in ranks:
        scale = size[:rank]
        left, right = basis[:, :rank] * scale, inner[:rank] / scale[:, None].clamp(min=torch.finfo(scale.dtype).tiny)
        b, a = (right.T, left.T) if tall else (left, right)
        a, b = a.cpu().contiguous(), b.cpu().contiguous()
        lost = _square(matrix - b @ a)
        if lost <= lost_max:
            return a, b, lost
    return None


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.flatten(), dtype=torch.float64)) ** 2
