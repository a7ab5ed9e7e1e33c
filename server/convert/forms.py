"""How the change of one matrix can be said: entries, rows, columns, a product of two narrow matrices, or all of it.

Each form is judged by the bytes that it takes on the device in the dtype of the backbone, indices being int32; what it
loses may be at most a share of the change, as a squared Frobenius norm.

    sparse    n entries                 n · (4 + size)
    rows      k rows of [out, in]       k · (4 + in · size)
    columns   k columns                 k · (4 + out · size)
    low-rank  B A with r rows of A      r · (in + out) · size
    dense     all                       in · out · size
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from weft.server.convert.factors import factors

SPARSE, ROWS, COLUMNS, LOW_RANK, DENSE = "sparse", "rows", "columns", "low-rank", "dense"
# what a caller may ask for; rows stands for rows or columns
CHOICES = ("auto", SPARSE, ROWS, LOW_RANK, DENSE)
INDEX_BYTES = 4
# what formats allow: see ``native_sparse``
DENSITY_MAX = 0.5
ENTRIES_MAX = 2**31 - 1
# of what may be lost, at most this share is spent on storing values in the checkpoint's own dtype
ROUNDING_SHARE = 0.25


@dataclass(frozen=True)
class Change:
    """A matrix as it is to be changed: ``delta`` [out, in] in fp32, and how much of it may be lost, squared.

    dtype:  of the backbone; values are stored in it where that loses nothing, or little enough
    """

    delta: Tensor
    dtype: torch.dtype
    lost_max: float

    @property
    def norm(self) -> float:
        """The squared norm of the change."""
        return square(self.delta)

    def stored(self) -> tuple[Tensor, float]:
        """The change as it is stored, and how much more may be lost."""
        rounded = self.delta.to(self.dtype)
        lost = square(rounded.float() - self.delta)
        if lost <= self.lost_max * ROUNDING_SHARE:
            return rounded, self.lost_max - lost
        return self.delta, self.lost_max


@dataclass(frozen=True)
class Said:
    """One form of a change.

    count:    entries, rows, columns or rank; 0 for all of it
    nbytes:   on the device
    tensors:  ``index`` and ``values``; or ``a`` [r, in] and ``b`` [out, r]; or ``values`` alone
    lost:     squared norm of what it does not say
    """

    form: str
    count: int
    nbytes: int
    tensors: dict[str, Tensor]
    lost: float

    @property
    def words(self) -> str:
        """For a report."""
        letter = {SPARSE: "n", ROWS: "k", COLUMNS: "k", LOW_RANK: "r"}.get(self.form)
        return f"{self.form} {letter}={self.count}" if letter else self.form


@dataclass(frozen=True)
class _Plan:
    nbytes: int
    build: Callable[[], Said]


def smallest(change: Change, choice: str = "auto", device: str = "cpu") -> Said | None:
    """The form of a linear's change that takes the fewest bytes, or the one that is asked for.

    None if none of them loses little enough, or if a format does not allow it.
    """
    stored, room = change.stored()
    plans = list(_plans(change, stored, room, choice))
    best = min(plans, key=lambda plan: plan.nbytes, default=None)
    if choice in ("auto", LOW_RANK) and change.lost_max > 0:
        narrow = _low_rank(change, best.nbytes if best else None, device)
        if narrow is not None:
            return narrow
    return best.build() if best else None


def smallest_of_embedding(change: Change, choice: str = "auto", followed: bool = False) -> Said:
    """The same for an embedding [tokens, features], of which a device holds whole rows, or entries if they are fewer.

    followed:  whether an output embedding of the same weight changes with it, and takes the entries once more
    """
    stored, room = change.stored()
    rows, features = change.delta.shape
    size = change.dtype.itemsize
    energy = _energies(change.delta, 1)
    kept = _kept(energy, room)
    entries = int((change.delta[kept] != 0).sum())
    flat = entries * (INDEX_BYTES + size)
    sparse = min(flat, len(kept) * (INDEX_BYTES + features * size)) + followed * flat
    dense = rows * (INDEX_BYTES + features * size) + followed * rows * features * size
    allowed = entries <= DENSITY_MAX * stored.numel() and stored.numel() <= ENTRIES_MAX
    if allowed and choice != DENSE and (sparse <= dense or choice == SPARSE):
        chosen = torch.zeros_like(change.delta, dtype=torch.bool)
        chosen[kept] = change.delta[kept] != 0
        return _entries(change, stored, chosen, sparse)
    return Said(DENSE, 0, dense, {"values": stored}, square(stored.float() - change.delta))


def square(values: Tensor) -> float:
    """The squared Frobenius norm, summed in fp64."""
    return float(torch.linalg.vector_norm(values.flatten(), dtype=torch.float64)) ** 2


def relative(lost: float, norm: float) -> float:
    """A squared loss as an error relative to a squared norm."""
    return sqrt(lost / norm) if norm else 0.0


def _plans(change: Change, stored: Tensor, room: float, choice: str) -> Iterator[_Plan]:
    out, wide = change.delta.shape
    size = change.dtype.itemsize
    if choice in ("auto", SPARSE):
        plan = _sparse(change, stored, room)
        if plan is not None:
            yield plan
    if choice in ("auto", ROWS):
        for form, axis, across in ((ROWS, 0, wide), (COLUMNS, 1, out)):
            kept = _kept(_energies(change.delta, 1 - axis), room)
            nbytes = len(kept) * (INDEX_BYTES + across * size)
            yield _Plan(nbytes, _row_builder(change, stored, kept, form, nbytes))
    if choice in ("auto", DENSE):
        nbytes = out * wide * size
        yield _Plan(nbytes, lambda: Said(DENSE, 0, nbytes, {"values": stored}, square(stored.float() - change.delta)))


def _sparse(change: Change, stored: Tensor, room: float) -> _Plan | None:
    magnitude = change.delta.abs()
    limit = 0.0
    if room > 0:
        ordered = magnitude[magnitude > 0].sort().values
        dropped = int(torch.searchsorted(ordered.double().square().cumsum(0), room, right=True))
        # the largest always stays
        limit = float(ordered[min(dropped, len(ordered) - 1)])
    chosen = (magnitude >= limit) & (magnitude > 0)
    count = int(chosen.sum())
    if count > DENSITY_MAX * stored.numel() or stored.numel() > ENTRIES_MAX:
        return None
    nbytes = count * (INDEX_BYTES + change.dtype.itemsize)
    return _Plan(nbytes, lambda: _entries(change, stored, chosen, nbytes))


def _entries(change: Change, stored: Tensor, chosen: Tensor, nbytes: int) -> Said:
    index = chosen.flatten().nonzero().flatten()
    values = stored.flatten()[index]
    said = torch.zeros_like(change.delta).flatten().index_copy(0, index, values.float())
    lost = square(said - change.delta.flatten())
    return Said(SPARSE, len(index), nbytes, {"index": index.to(torch.int32), "values": values}, lost)


def _row_builder(change: Change, stored: Tensor, kept: Tensor, form: str, nbytes: int) -> Callable[[], Said]:
    axis = 0 if form == ROWS else 1

    def build() -> Said:
        values = stored.index_select(axis, kept)
        said = torch.zeros_like(change.delta).index_copy(axis, kept, values.float())
        lost = square(said - change.delta)
        return Said(form, len(kept), nbytes, {"index": kept.to(torch.int32), "values": values.contiguous()}, lost)

    return build


def _energies(delta: Tensor, axis: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(delta, dim=axis, dtype=torch.float64)
    return norms.square()


def _kept(energy: Tensor, room: float) -> Tensor:
    """Which of these stay when the least of them go, as long as those sum to at most ``room``; ascending."""
    ordered = energy.sort()
    dropped = int(torch.searchsorted(ordered.values.cumsum(0), room, right=True))
    # the largest always stays
    return ordered.indices[min(dropped, len(energy) - 1) :].sort().values


def _low_rank(change: Change, below: int | None, device: str) -> Said | None:
    """Two factors that take fewer bytes than ``below``, None if there are none."""
    out, wide = change.delta.shape
    each = (out + wide) * change.dtype.itemsize
    rank_max = min(out, wide) if below is None else min(min(out, wide), (below - 1) // each)
    found = factors(change.delta, change.lost_max, rank_max, device) if rank_max else None
    if found is None:
        return None
    a, b, lost = found
    return Said(LOW_RANK, len(a), len(a) * each, {"a": a, "b": b}, lost)
