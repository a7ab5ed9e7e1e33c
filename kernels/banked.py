"""Deltas through factors that adapters share: one product for all rows of a bank, each with diagonals of its own.

    y += outer ⊙ ((inner ⊙ (x a[:, :in]ᵀ)) b[:, :out])

Rows of short segments are multiplied in tiles of the batch: a tile is always as high, and a row always in the same
place of it, so what a row gets does not depend on which of its neighbours use the bank. A long segment is a product of
its own. Sites that share an input share the first product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.parts import Carried, product

# first products of one input, by bank and first row
Hiddens = dict[tuple[int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Run:
    """Rows of the batch that are multiplied at once, and those of them that are meant.

    start, stop:  rows of the batch;  height: rows of the product, those beyond the batch are zero
    rows:         [n] int64 inside the run, or None for all ``height`` of them
    inner, outer: a vector for each of these rows
    """

    start: int
    stop: int
    height: int
    rows: Tensor | None
    inner: list[Tensor]
    outer: list[Tensor]


@dataclass(frozen=True, eq=False)
class Banked:
    """The runs of one bank at one site; a [r, widest in] and b [r, tallest out] are the bank's."""

    key: int
    a: Tensor
    b: Tensor
    runs: tuple[Run, ...]

    def add(self, y: Tensor, x: Tensor, hiddens: Hiddens) -> None:
        """Add to y [tokens, out] in place what x [tokens, in] gives, rounded once."""
        b = self.b[:, : y.shape[1]]
        for run in self.runs:
            hidden = hiddens.get((self.key, run.start))
            if hidden is None:
                rows = F.pad(x[run.start : run.stop], (0, 0, 0, run.height - (run.stop - run.start)))
                hidden = product(rows, self.a[:, : x.shape[1]]).float()
                hiddens[self.key, run.start] = hidden
            part = y[run.start : run.stop]
            if run.rows is None:
                made = product((hidden * _stack(run.inner)).to(x.dtype), b.T).float()
                part.copy_(part.float() + made * _stack(run.outer))
            else:
                scaled = torch.zeros_like(hidden)
                scaled[run.rows] = hidden.index_select(0, run.rows) * _stack(run.inner)
                made = product(scaled.to(x.dtype), b.T).index_select(0, run.rows).float() * _stack(run.outer)
                part.index_copy_(0, run.rows, (part.index_select(0, run.rows).float() + made).to(y.dtype))


def banked(carried: Sequence[Carried], tokens: int, tile: int) -> list[Banked]:
    """What these records at one site ask for.

    tile:  rows of a tile; segments that are longer are products of their own
    """
    by_bank: dict[int, list[Carried]] = {}
    for each in carried:
        by_bank.setdefault(each.bank_key, []).append(each)
    found = []
    for key, its in by_bank.items():
        _, _, a, b = its[0].pieces
        assert a is not None
        assert b is not None
        found.append(Banked(key, a, b, tuple(_runs(its, tokens, tile))))
    return found


def _runs(carried: Sequence[Carried], tokens: int, tile: int) -> Iterator[Run]:
    tiles: dict[int, list[tuple[int, Carried]]] = {}
    for each in carried:
        start, stop = each.span
        if stop - start > tile:
            yield Run(start, stop, stop - start, None, *_diagonals([each]))
            continue
        for row in range(start, stop):
            tiles.setdefault(row // tile, []).append((row, each))
    for number, rows in tiles.items():
        start, whole = number * tile, len(rows) == tile
        index = torch.tensor([row - start for row, _ in rows], dtype=torch.int64, device=_device(carried))
        diagonals = _diagonals([each for _, each in rows])
        yield Run(start, min(start + tile, tokens), tile, None if whole else index, *diagonals)


def _diagonals(carried: Sequence[Carried]) -> tuple[list[Tensor], list[Tensor]]:
    inner = [piece[0] for each in carried if (piece := each.pieces[0]) is not None]
    outer = [piece[0] for each in carried if (piece := each.pieces[1]) is not None]
    return inner, outer


def _device(carried: Sequence[Carried]) -> torch.device:
    piece = carried[0].pieces[0]
    assert piece is not None
    return piece.device


def _stack(vectors: Sequence[Tensor]) -> Tensor:
    """[n, d]; of one vector, which all rows share, [d]."""
    return vectors[0] if len(vectors) == 1 else torch.stack(tuple(vectors))
