"""A group's operators applied to many rows at once as weighted sums of table rows, whatever mix of shapes.

Every product here is one call of ``torch.embedding_bag``, in which each output is the sum, in the order of its own
indices, of table rows times weights:

    shrink    h[row, chunk]   = sum over k of x[row, k] * A^T[k, chunk]           table: chunks of the sections
              t[row, c2, i1]  = sum over i2 of x[row, i1, i2] * w2^T[i2, c2]      (in the same call)
    expand    y[row, n]      += sum over r of h[row, r] * B[r, n]                 table: rows of the sections
    mix       y[row, o1, c2] += sum over terms, i1 of w1[o1, i1] * t[row, c2, i1] table: t

So what a row gets depends on its own indices and on nothing else, bit for bit: not on its neighbours, their number,
their ranks, or where an adapter lies. Matrix products promise no such thing: their order changes with their shape.
``Pattern`` is what follows from shapes alone and is the same in all layers; ``Plan`` adds the places in the pool.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.kernels.working_set import LANES, WIDTH_MAX, GroupForm, Pool

Ints = npt.NDArray[np.int64]

# in fp32 a sum of this many products is as good as a matmul's; longer ones are summed in pieces
TERMS_MAX = 128


def bag(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[i] = sum over j in offsets[i]..offsets[i + 1] of weights[j] * table[index[j]].

    table:    [rows, columns], weights: [indices]   of one dtype, which the result has too; summed in fp32
    index:    [indices]   offsets: [bags + 1]   int32
    returns:  [bags, columns]
    """
    return torch.embedding_bag(table, index, offsets, False, 0, False, weights, True)[0]


@dataclass(frozen=True, eq=False)
class Local:
    """One form's indices as if it were alone: one row, its section at 0. Lengths are those of the bags."""

    starts: Ints
    periods: Ints
    shrink: Ints
    fold: Ints
    pick: Ints
    expand: Ints
    expand_bags: Ints
    weight: Ints
    mix: Ints
    mix_bags: Ints
    place: Ints


@lru_cache(maxsize=4096)
def _local(form: GroupForm, exact: bool) -> Local:
    starts = [np.arange(form.chunks) * form.wide]
    periods = [np.full(form.chunks, form.wide)]
    pieces = _pieces(form.wide) if exact else [form.wide]
    shrink, fold = pieces * form.chunks, [len(pieces)] * form.chunks
    weight: list[Ints] = []
    mix: list[Ints] = []
    mix_bags: list[Ints] = []
    place: list[Ints] = []
    hidden, mixed = form.chunks, 0
    for site in form.sites:
        at = hidden
        for kron in site.krons:
            starts.append(kron.w2 + np.arange(kron.chunks) * kron.i2)
            periods.append(np.full(kron.chunks, kron.i2))
            shrink += [kron.i2] * (kron.i1 * kron.chunks)
            fold += [1] * (kron.i1 * kron.chunks)
            hidden += kron.i1 * kron.chunks
        if not site.krons:
            place.append(np.full(site.tall, -1))
            continue
        o1, o2, chunks = site.krons[0].o1, site.krons[0].o2, site.krons[0].chunks
        for o in range(o1):
            for c in range(chunks):
                firsts = at + np.cumsum([0, *(k.i1 * chunks for k in site.krons)])
                for kron, first in zip(site.krons, firsts.tolist(), strict=False):
                    weight.append(kron.w1 + o * kron.i1 + np.arange(kron.i1))
                    mix.append(first + c * kron.i1 + np.arange(kron.i1))
        mix_bags.append(np.full(o1 * chunks, sum(k.i1 for k in site.krons)))
        out = np.arange(site.tall)
        place.append(mixed * LANES + out // o2 * (chunks * LANES) + out % o2)
        mixed += o1 * chunks
    pick, expand, bags = _expand(form)
    return Local(
        np.concatenate(starts),
        np.concatenate(periods),
        np.array(shrink, dtype=np.int64),
        np.array(fold, dtype=np.int64),
        pick,
        expand,
        bags,
        _joined(weight),
        _joined(mix),
        _joined(mix_bags),
        np.concatenate(place),
    )


def _pieces(length: int) -> list[int]:
    return [min(TERMS_MAX, length - at) for at in range(0, length, TERMS_MAX)]


def _expand(form: GroupForm) -> tuple[Ints, Ints, Ints]:
    pick, expand, bags = [], [], []
    for site in form.sites:
        pick.append(np.tile(site.column + np.arange(site.rank), site.chunks))
        expand.append(site.b + np.arange(site.chunks * site.rank))
        bags.append(np.full(site.chunks, site.rank))
    return _joined(pick), _joined(expand), _joined(bags)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _spread(parts: Sequence[Ints], shifts: Sequence[int]) -> Ints:
    return _joined([part + shift for part, shift in zip(parts, shifts, strict=True)])


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
        copies = [len(part.starts) for part in parts]
        # rows of x, each as often as the row has chunks
        self.copies = copies[0] if len(set(copies)) == 1 else None
        self.source = self._index(np.repeat(np.arange(len(forms)), copies))
        self.starts, self._of_copy = _joined([p.starts for p in parts]), np.repeat(np.arange(len(forms)), copies)
        self.steps = self._steps(_joined([part.periods for part in parts]))
        self.shrink_offsets = self._offsets(_joined([part.shrink for part in parts]))
        fold = _joined([part.fold for part in parts])
        self.fold: tuple[Tensor, Tensor, Tensor] | None = None
        if (fold > 1).any():
            pieces = int(fold.sum())
            ones = torch.ones(pieces, dtype=torch.float32, device=device)  # only fp32 is summed in pieces
            self.fold = (self._index(np.arange(pieces)), self._offsets(fold), ones)
        hidden = np.cumsum([0, *(len(part.fold) for part in parts)])[:-1].tolist()
        self.pick = self._index(_spread([part.pick for part in parts], [at * LANES for at in hidden]))
        self.expand = _joined([part.expand for part in parts])
        self._of_expand = np.repeat(np.arange(len(parts)), [len(part.expand) for part in parts])
        self.expand_offsets = self._offsets(_joined([part.expand_bags for part in parts]))
        self.weight = _joined([part.weight for part in parts])
        self._of_weight = np.repeat(np.arange(len(parts)), [len(part.weight) for part in parts])
        self.mix = self._index(_spread([part.mix for part in parts], hidden))
        self._place_mixed(parts)
        self._vectors(forms)

    def _place_mixed(self, parts: Sequence[Local]) -> None:
        bags = _joined([part.mix_bags for part in parts])
        # an empty bag behind all others: the zeros of rows and sites without such terms
        self.mix_offsets = self._offsets(np.append(bags, 0))
        shifts = np.cumsum([0, *(len(part.mix_bags) for part in parts)])[:-1].tolist()
        zero = len(bags) * LANES
        place = [
            np.where(part.place < 0, zero, part.place + shift * LANES)
            for part, shift in zip(parts, shifts, strict=True)
        ]
        self.place = self._index(_joined(place))

    def _vectors(self, forms: Sequence[GroupForm]) -> None:
        """sigma and beta: rows of width inside each section, -1 for none."""
        kept, at = [], 0
        columns: list[list[list[int]]] = [[], []]
        for form in forms:
            for rows, name in zip(columns, ("sigma", "beta"), strict=True):
                rows.append([v for site in form.sites for v in _run(getattr(site, name), site.chunks)])
        self.sigma, self.beta = (np.array(rows, dtype=np.int64) for rows in columns)
        for site in forms[0].sites:
            kept.append(np.arange(at, at + site.tall))
            at += site.chunks * self.width
        self.padded = at
        self.keep = self._index(np.concatenate(kept)) if at != self.tall else None

    def _steps(self, periods: Ints) -> Tensor:
        steps = np.arange(self.wide)
        if len(set(periods.tolist())) <= 1:
            return self._index(steps % periods[0] if len(periods) else steps)
        return self._index(steps[None, :] % periods[:, None])

    def _index(self, values: Ints) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self._device)

    def _offsets(self, lengths: Ints) -> Tensor:
        return self._index(np.cumsum([0, *lengths.tolist()]))

    def at(self, shifts: Ints) -> "Places":
        """The indices with each row's section this many elements behind the table's start."""
        copies = self._index((self.starts + shifts[self._of_copy] // LANES)[:, None])
        return Places(
            torch.add(copies, self.steps).view(-1),
            self._index(self.expand + shifts[self._of_expand] // self.width),
            self._index(self.weight + shifts[self._of_weight]),
        )


def _run(first: int, rows: int) -> Iterator[int]:
    return iter(range(first, first + rows)) if first >= 0 else iter([-1] * rows)


@dataclass(frozen=True, eq=False)
class Places:
    """Indices of a pattern in a table: int32, flat."""

    shrink: Tensor
    expand: Tensor
    weight: Tensor


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
        self._pattern, self._places, self._refill = pattern, places, refill
        factors = pool.factors[int(starts.min()) // pool.factors.itemsize :]
        self._chunks, self._flat = factors.view(-1, LANES), factors
        self._tables = factors.view(-1, pattern.width)
        self._vectors = pool.vectors.view(-1, pattern.width)
        self._span = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else None
        self._index = torch.tensor(rows, dtype=torch.int64, device=factors.device)
        self._sigma = self._vector(pattern.sigma, starts, 0)
        self._beta = self._vector(pattern.beta, starts, WIDTH_MAX)

    def _vector(self, rows: Ints, starts: Ints, otherwise: int) -> Tensor | None:
        if (rows < 0).all():
            return None
        width = self._pattern.width
        index = np.where(rows < 0, otherwise // width, rows + starts[:, None] // (4 * width))
        return torch.from_numpy(index.reshape(-1)).to(self._index.device)

    def run(self, y: Tensor, x: Tensor) -> None:
        """Add what the operators make of x [tokens, wide] to y [tokens, tall], in this plan's rows."""
        if self._refill is not None:
            self._refill()
        span = self._span
        if span is not None:
            self._add(y[span], x[span])
        else:
            out = y.index_select(0, self._index)
            self._add(out, x.index_select(0, self._index))
            y.index_copy_(0, self._index, out)

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
        if not len(pattern.starts):
            return None
        hidden = bag(self._chunks, places.shrink, pattern.shrink_offsets, self._inputs(x))
        if pattern.fold is not None:
            hidden = bag(hidden, *pattern.fold)
        delta = None
        if len(pattern.expand):
            picked = hidden.view(-1).index_select(0, pattern.pick)
            delta = self._kept(bag(self._tables, places.expand, pattern.expand_offsets, picked))
        if len(pattern.mix):
            weights = self._flat.index_select(0, places.weight)
            mixed = bag(hidden, pattern.mix, pattern.mix_offsets, weights)
            mixed = mixed.view(-1).index_select(0, pattern.place).view(pattern.count, pattern.tall)
            delta = mixed if delta is None else delta.add_(mixed)
        return delta

    def _inputs(self, x: Tensor) -> Tensor:
        """Rows of x as often as they have chunks, flat."""
        copies = self._pattern.copies
        if copies is None:
            return x.index_select(0, self._pattern.source).view(-1)
        return x.reshape(-1) if copies == 1 else x.unsqueeze(1).expand(-1, copies, -1).reshape(-1)

    def _gather(self, index: Tensor) -> Tensor:
        return self._kept(self._vectors.index_select(0, index))

    def _kept(self, rows: Tensor) -> Tensor:
        pattern = self._pattern
        out = rows.view(pattern.count, pattern.padded)
        return out if pattern.keep is None else out.index_select(1, pattern.keep)
