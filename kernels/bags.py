"""A group's operators applied to many rows at once as weighted sums of table rows, whatever mix of shapes.

Every product here is one call of ``torch.embedding_bag``, in which each output is the sum, in the order of its own
indices, of table rows times weights:

    shrink    h[row, chunk]   = sum over k of x[row, k] * A^T[k, chunk]           table: chunks of the sections
              t[row, c2, i1]  = sum over i2 of x[row, i1, i2] * w2^T[i2, c2]      (in the same call)
              h = act(h + inner) where a site has that (``bends``)
    expand    y[row, n]      += sum over r of h[row, r] * B[r, n]                 table: rows of the sections
    mix       y[row, o1, c2] += sum over terms, i1 of w1[o1, i1] * t[row, c2, i1] table: t

So what a row gets depends on its own indices and on nothing else, bit for bit: not on its neighbours, their number,
their ranks, or where an adapter lies. Matrix products promise no such thing: their order changes with their shape.
Sums are made in fp32 and rounded to the factors' dtype, as matmuls in that dtype are.

``Pattern`` is what follows from shapes alone and is the same in all layers; ``Plan`` adds the places in the pool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.kernels.bends import bends_of
from weft.kernels.working_set import LANES, WIDTH_MAX, GroupForm, Pool, SiteForm

Ints = npt.NDArray[np.int64]

# in fp32 long sums are made of sums of this many products: one after the other they would lose digits that a
# matmul, which keeps many sums at once, does not
TERMS_MAX = 16


def bag(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[i] = sum over j in offsets[i]..offsets[i + 1] of weights[j] * table[index[j]].

    table:    [rows, columns], weights: [indices]   of one dtype, which the result has too; summed in fp32
    index:    [indices]   offsets: [bags + 1]   int32
    returns:  [bags, columns]
    """
    return torch.embedding_bag(table, index, offsets, False, 0, False, weights, True)[0]


def fold(table: Tensor, pieces: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
    """Sums of neighbouring rows, where long sums were cut into pieces."""
    return table if pieces is None else bag(table, *pieces)


@dataclass(frozen=True, eq=False)
class Local:
    """One form's indices as if it were alone: one row of x, its section at 0.

    copies:  per chunk that x meets, (first row of the chunk, i2 or in_features: the period of its rows)
    shrink, mix, expand:  lengths of bags;  ``*_fold``: pieces per sum;  ``*_index``: rows of their tables
    pick:    elements of h that weigh B;  ``weight``: elements of w1
    place:   per output, its element of what mix makes, -1 for none
    """

    copies: Ints
    shrink: Ints
    shrink_fold: Ints
    pick: Ints
    expand: Ints
    expand_index: Ints
    weight: Ints
    mix: Ints
    mix_fold: Ints
    mix_index: Ints
    place: Ints


@lru_cache(maxsize=512)
def _local(form: GroupForm, exact: bool) -> Local:
    copies = [(chunk * form.wide, form.wide) for chunk in range(form.chunks)]
    sums = [form.wide] * form.chunks
    pick, expand, expand_index = [], [], []
    mixes, place, mixed = [], [], 0
    for site in form.sites:
        pick.append(np.tile(site.column + np.arange(site.rank), site.chunks))
        expand_index.append(site.b + np.arange(site.chunks * site.rank))
        expand.append(np.full(site.chunks, site.rank))
        place.append(_place(site, mixed))
        if site.krons:
            mixes.append(_mix(site, len(sums)))
            mixed += len(mixes[-1][0])
        for kron in site.krons:
            copies += [(kron.w2 + chunk * kron.i2, kron.i2) for chunk in range(kron.chunks)]
            sums += [kron.i2] * (kron.chunks * kron.i1)
    lengths, weight, index = zip(*mixes, strict=True) if mixes else ((), (), ())
    return Local(
        np.array(copies, dtype=np.int64).reshape(-1, 2),
        *_pieces(np.array(sums, dtype=np.int64), exact),
        _joined(pick),
        _joined(expand),
        _joined(expand_index),
        _joined(weight),
        *_pieces(_joined(lengths), exact),
        _joined(index),
        _joined(place),
    )


def _mix(site: SiteForm, hidden: int) -> tuple[Ints, Ints, Ints]:
    """(terms of each sum [o1 * chunks], elements of w1, rows of t) for a site whose t begins at row ``hidden``."""
    o1, chunks = site.krons[0].o1, site.krons[0].chunks
    weights, rows = [], []
    for kron in site.krons:
        weight = kron.w1 + np.arange(o1 * kron.i1).reshape(o1, 1, kron.i1)
        row = hidden + np.arange(chunks * kron.i1).reshape(1, chunks, kron.i1)
        weights.append(np.broadcast_to(weight, (o1, chunks, kron.i1)))
        rows.append(np.broadcast_to(row, (o1, chunks, kron.i1)))
        hidden += chunks * kron.i1
    weight, row = np.concatenate(weights, axis=2), np.concatenate(rows, axis=2)
    return np.full(o1 * chunks, weight.shape[2]), weight.reshape(-1), row.reshape(-1)


def _place(site: SiteForm, mixed: int) -> Ints:
    if not site.krons:
        return np.full(site.tall, -1)
    o2, chunks, out = site.krons[0].o2, site.krons[0].chunks, np.arange(site.tall)
    return (mixed + out // o2 * chunks) * LANES + out % o2


def _pieces(lengths: Ints, exact: bool) -> tuple[Ints, Ints]:
    """(lengths of bags, bags per sum) for sums of these lengths."""
    if not exact:
        return lengths, np.ones_like(lengths)
    counts = np.maximum(-(-lengths // TERMS_MAX), 1)
    bags = np.full(counts.sum(), TERMS_MAX)
    bags[np.cumsum(counts) - 1] = lengths - (counts - 1) * TERMS_MAX
    return bags, counts


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _spread(parts: Sequence[Ints], shifts: Sequence[int]) -> Ints:
    return _joined([part + shift for part, shift in zip(parts, shifts, strict=True)])


def _starts(lengths: Sequence[int]) -> list[int]:
    starts: list[int] = np.cumsum([0, *lengths])[:-1].tolist()
    return starts


class Pattern:
    """Rows of these forms, their sections still at 0; tensors that all layers with such rows share.

    forms:  of each row in order, all of one group
    exact:  sum long products in pieces of TERMS_MAX
    """

    def __init__(self, forms: Sequence[GroupForm], exact: bool, device: torch.device) -> None:
        self._device = device
        parts = [_local(form, exact) for form in forms]
        first = forms[0]
        self.count, self.width, self.wide = len(forms), first.width, first.wide
        self.tall = sum(site.tall for site in first.sites)
        # x: rows as often as they have chunks
        copies = [len(part.copies) for part in parts]
        self.once = set(copies) == {1}
        self.source = self._index(np.repeat(np.arange(len(forms)), copies))
        table = np.concatenate([part.copies for part in parts])
        self._shrink, self._of_copy = table[:, 0], np.repeat(np.arange(len(forms)), copies)
        self._steps = self._steps_of(table[:, 1])
        self.shrink = self._offsets([part.shrink for part in parts])
        self.shrink_fold = self._fold([part.shrink_fold for part in parts])
        # h: rows of each row
        hidden = _starts([len(part.shrink_fold) for part in parts])
        self.pick = self._index(_spread([part.pick for part in parts], [at * LANES for at in hidden]))
        self.bends = tuple(bends_of(forms, hidden, device))
        self._expand, self._of_expand = self._behind([part.expand_index for part in parts])
        self.expand = self._offsets([part.expand for part in parts])
        self._weight, self._of_weight = self._behind([part.weight for part in parts])
        self.mix_index = self._index(_spread([part.mix_index for part in parts], hidden))
        # an empty sum behind all others: the zeros of outputs without such terms
        self.mix = self._offsets([*(part.mix for part in parts), np.zeros(1, dtype=np.int64)])
        self.mix_fold = self._fold([*(part.mix_fold for part in parts), np.ones(1, dtype=np.int64)])
        mixed = _starts([len(part.mix_fold) for part in parts])
        zero = sum(len(part.mix_fold) for part in parts) * LANES
        place = [np.where(p.place < 0, zero, p.place + at * LANES) for p, at in zip(parts, mixed, strict=True)]
        self.place = self._index(_joined(place))
        self._vectors(forms)

    @property
    def low_rank(self) -> bool:
        """Whether any row has ranks."""
        return len(self._expand) > 0

    @property
    def kron(self) -> bool:
        """Whether any row has Kronecker terms."""
        return len(self._weight) > 0

    def _vectors(self, forms: Sequence[GroupForm]) -> None:
        """sigma and beta: per row and chunk of its outputs, rows of width inside the section, -1 for none."""
        sites = forms[0].sites
        self.sigma = _rows_of([[(site.sigma, site.chunks) for site in form.sites] for form in forms])
        self.beta = _rows_of([[(site.beta, site.chunks) for site in form.sites] for form in forms])
        # outputs that do not fill their chunks leave columns that are not kept
        starts = [chunk * self.width for chunk in _starts([site.chunks for site in sites])]
        self.padded = self.width * sum(site.chunks for site in sites)
        kept = [np.arange(start, start + site.tall) for start, site in zip(starts, sites, strict=True)]
        self.keep = self._index(_joined(kept)) if self.padded != self.tall else None

    def _steps_of(self, periods: Ints) -> Tensor:
        steps = np.arange(self.wide)
        if len(set(periods.tolist())) <= 1:
            return self._index(steps % periods[0] if len(periods) else steps)
        return self._index(steps[None, :] % periods[:, None])

    def _behind(self, parts: Sequence[Ints]) -> tuple[Ints, Ints]:
        return _joined(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def _index(self, values: Ints) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self._device)

    def _offsets(self, lengths: Sequence[Ints]) -> Tensor:
        return self._index(np.append(0, np.cumsum(_joined(lengths))))

    def _fold(self, counts: Sequence[Ints]) -> tuple[Tensor, Tensor, Tensor] | None:
        pieces = _joined(counts)
        if (pieces <= 1).all():
            return None
        # only fp32 is summed in pieces
        ones = torch.ones(int(pieces.sum()), dtype=torch.float32, device=self._device)
        return self._index(np.arange(len(ones))), self._offsets([pieces]), ones

    def at(self, shifts: Ints) -> "Places":
        """The indices with each row's section this many elements behind the table's start."""
        copies = self._index((self._shrink + shifts[self._of_copy] // LANES)[:, None])
        return Places(
            torch.add(copies, self._steps).view(-1),
            self._index(self._expand + shifts[self._of_expand] // self.width),
            self._index(self._weight + shifts[self._of_weight]),
        )


def _rows_of(runs: Sequence[Sequence[tuple[int, int]]]) -> Ints | None:
    """(first, count) as rows first, first + 1, ..; None if nothing is there."""
    rows = [[at + i if at >= 0 else -1 for at, count in row for i in range(count)] for row in runs]
    table = np.array(rows, dtype=np.int64)
    return table if (table >= 0).any() else None


@dataclass(frozen=True, eq=False)
class Places:
    """Indices of a pattern in a table: int32, flat."""

    shrink: Tensor
    expand: Tensor
    weight: Tensor


class Chosen:
    """Some rows of a batch, in order: views of them if they are neighbours, else copies."""

    def __init__(self, rows: Sequence[int], device: torch.device) -> None:
        self._count = len(rows)
        self._span = slice(rows[0], rows[-1] + 1)
        apart = rows[-1] - rows[0] != len(rows) - 1
        self._index = torch.tensor(rows, dtype=torch.int64, device=device) if apart else None

    def take(self, table: Tensor) -> Tensor:
        """These rows of a table [rows of the batch, columns]."""
        if len(table) == self._count:
            return table
        return table[self._span] if self._index is None else table.index_select(0, self._index)

    def give(self, table: Tensor, rows: Tensor) -> None:
        """Write back what was taken, after it was changed in place."""
        if self._index is not None:
            table.index_copy_(0, self._index, rows)

    def put(self, table: Tensor, rows: Tensor) -> None:
        """Write rows [n, ..] of any dtype in the place of these."""
        part = self.take(table)
        part.copy_(rows)
        self.give(table, part)

    def add(self, table: Tensor, gained: Tensor) -> None:
        """Add fp32 to these rows, rounded once."""
        self.put(table, self.take(table).float() + gained)


class Plan:
    """A pattern at its places, over given rows of a batch: everything that ``run`` reads.

    rows:     of the batch, in order
    starts:   bytes from the pool's start to each row's section
    refill:   writes the pool before every run; for sections that are not kept
    """

    def __init__(
        self,
        pattern: Pattern,
        places: Places,
        pool: Pool,
        rows: Sequence[int],
        starts: Ints,
        refill: Callable[[], None] | None = None,
    ) -> None:
        self._pattern, self._places, self._refill, self._pool = pattern, places, refill, pool
        factors = pool.factors[int(starts.min()) // pool.factors.itemsize :]
        self._chunks, self._flat = factors.view(-1, LANES), factors
        self._tables = factors.view(-1, pattern.width)
        self._vectors = pool.vectors.view(-1, pattern.width)
        self._rows = Chosen(rows, pool.factors.device)
        self._sigma = self._vector(pattern.sigma, starts, 0)
        self._beta = self._vector(pattern.beta, starts, WIDTH_MAX)
        self._inner = [bend.places(starts) for bend in pattern.bends]

    def _vector(self, rows: Ints | None, starts: Ints, otherwise: int) -> Tensor | None:
        if rows is None:
            return None
        width = self._pattern.width
        index = np.where(rows < 0, otherwise // width, rows + starts[:, None] // (4 * width))
        return torch.from_numpy(index.reshape(-1)).to(self._flat.device)

    def run(self, y: Tensor, x: Tensor) -> None:
        """Add what the operators make of x [tokens, wide] to y [tokens, tall], in this plan's rows."""
        if self._refill is not None:
            self._refill()
        out = self._rows.take(y)
        self._add(out, self._rows.take(x))
        self._rows.give(y, out)

    def _add(self, y: Tensor, x: Tensor) -> None:
        delta = self._delta(x)
        if self._sigma is None and self._beta is None and delta is not None:
            y.add_(delta)
            return
        total = y.float()
        if self._sigma is not None:
            total = total * self._gather(self._sigma)
        # a sum in all cases, so that the sign of a zero does not depend on the neighbours' operators
        total = total + (0.0 if delta is None else delta)
        if self._beta is not None:
            total += self._gather(self._beta)
        y.copy_(total)

    def _delta(self, x: Tensor) -> Tensor | None:
        pattern, places = self._pattern, self._places
        if not (pattern.low_rank or pattern.kron):
            return None
        hidden = fold(bag(self._chunks, places.shrink, pattern.shrink, self._inputs(x)), pattern.shrink_fold)
        for bend, inner in zip(pattern.bends, self._inner, strict=True):
            bend.apply(hidden, self._pool, inner)
        delta = None
        if pattern.low_rank:
            picked = hidden.view(-1).index_select(0, pattern.pick)
            delta = self._kept(bag(self._tables, places.expand, pattern.expand, picked))
        if pattern.kron:
            weights = self._flat.index_select(0, places.weight)
            mixed = fold(bag(hidden, pattern.mix_index, pattern.mix, weights), pattern.mix_fold)
            mixed = mixed.view(-1).index_select(0, pattern.place).view(pattern.count, pattern.tall)
            delta = mixed if delta is None else delta.add_(mixed)
        return delta

    def _inputs(self, x: Tensor) -> Tensor:
        """Rows of x as often as they have chunks, flat."""
        if self._pattern.once:
            return x.reshape(-1)
        return x.index_select(0, self._pattern.source).view(-1)

    def _gather(self, index: Tensor) -> Tensor:
        return self._kept(self._vectors.index_select(0, index))

    def _kept(self, rows: Tensor) -> Tensor:
        pattern = self._pattern
        out = rows.view(pattern.count, pattern.padded)
        return out if pattern.keep is None else out.index_select(1, pattern.keep)
