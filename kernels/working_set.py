"""Adapters in the form that a CPU computes fastest on, beside the arena, under a budget in bytes.

An adapter's *section* at a group of sites holds its factors in the geometry's dtype as tables for
``torch.embedding_bag``, the weighted sum of rows that ``bags`` is made of. Factors that are contracted with the
input lie transposed in chunks of LANES columns, [features, LANES] each, so that one row of a chunk is one vector
register and ranks need no padding beyond that. B lies in chunks of ``width`` columns, [rank, width] each; so do
sigma and beta, in fp32. width is a power of two that divides every output of the group. ``inner`` lies in fp32 in
chunks of LANES, as the ranks that it is added to.

Sections of all groups make a *slot*. Slots live in one pool; an adapter that joins a batch is written into free
space, those that no row uses make room, least recently used first. What does not fit is a *miss*.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from weft.kernels.activation import IDENTITY
from weft.kernels.batch import Block
from weft.kernels.layout import (
    A_OFF,
    ACT,
    B_OFF,
    BETA_OFF,
    INNER_OFF,
    RANK,
    SIGMA_IN_OFF,
    SIGMA_OFF,
    TAP_SHIFT,
    Directory,
    Geometry,
    Views,
    round_up,
)

LANES = 16
WIDTH_MAX = 256
# sections begin at a multiple of this many bytes: a whole row of any table
SECTION = 4 * WIDTH_MAX
# the pool begins with a row of ones and a row of zeros: the sigma and beta of sites that have none
HEAD = 2 * SECTION


@dataclass(frozen=True)
class KronForm:
    """A Kronecker term in a section: w1 [o1, i1] from element ``w1``, w2^T in chunks from row ``w2`` of LANES."""

    w1: int
    w2: int
    o1: int
    i1: int
    o2: int
    i2: int

    @property
    def chunks(self) -> int:
        """Chunks of LANES columns that o2 takes."""
        return -(-self.o2 // LANES)


@dataclass(frozen=True)
class SiteForm:
    """One site in a section.

    tall:    out_features;  ``chunks``: chunks of width that they take
    column:  of its first rank among the ranks of the group
    b:       row of width, in the factors' dtype, where B begins
    sigma, beta:  rows of width in fp32;  ``sigma_in``: row of ``GroupForm.lanes`` in fp32;  -1: absent
    act:     number of the function between A and B;  ``inner``: whether a vector is added before it
    """

    tall: int
    chunks: int
    rank: int
    column: int
    b: int
    krons: tuple[KronForm, ...]
    sigma: int
    beta: int
    sigma_in: int
    act: int
    inner: bool

    @property
    def bent(self) -> bool:
        """Whether anything happens between A and B."""
        return self.inner or self.act != IDENTITY


@dataclass(frozen=True)
class GroupForm:
    """How one section lies; equal for all adapters that are shaped alike at sites shaped alike.

    width:   columns in a chunk of B, sigma and beta
    wide:    in_features;  ``lanes``: floats in a row of sigma_in
    ranks:   of all sites together;  ``chunks``: chunks of LANES that they take, from element 0 on
    inner:   row of LANES in fp32 where the sites' vectors lie as their ranks do, or -1
    nbytes:  of the section, a multiple of SECTION
    """

    width: int
    wide: int
    lanes: int
    ranks: int
    chunks: int
    inner: int
    sites: tuple[SiteForm, ...]
    nbytes: int

    @cached_property
    def active(self) -> bool:
        """Whether there is anything to add to the group's outputs."""
        return any(s.rank or s.krons or s.sigma >= 0 or s.beta >= 0 for s in self.sites)


@dataclass(frozen=True, eq=False)
class Slot:
    """Where an adapter's sections lie: ``starts[group]`` in bytes from the start of the pool."""

    forms: tuple[GroupForm, ...]
    starts: tuple[int, ...]
    start: int
    nbytes: int


def forms_of(geometry: Geometry, head: Directory) -> tuple[GroupForm, ...]:
    """The form of every group's section for adapters with this directory."""
    present = (head.sites[:, (SIGMA_OFF, BETA_OFF, SIGMA_IN_OFF)] != 0).tolist()
    inner = (head.sites[:, INNER_OFF] != 0).tolist()
    acts = (head.sites[:, ACT] % (1 << TAP_SHIFT)).tolist()
    ranks = head.sites[:, RANK].tolist()
    forms = []
    for members in geometry.members:
        shapes = tuple(
            Shape(
                geometry.sites[s].out_features,
                ranks[s],
                tuple(k[2:] for k in head.krons[s]),
                tuple(present[s]),
                acts[s] if ranks[s] else IDENTITY,
                inner[s],
            )
            for s in members
        )
        forms.append(_form(geometry.sites[members.start].in_features, shapes, geometry.dtype.itemsize))
    return tuple(forms)


class Shape(NamedTuple):
    """What of a site decides its form; ``present``: whether it has sigma, beta and sigma_in."""

    tall: int
    rank: int
    krons: tuple[tuple[int, ...], ...]
    present: tuple[bool, ...]
    act: int
    inner: bool


def _power(*lengths: int) -> int:
    """The largest power of two, at most WIDTH_MAX, that divides all these lengths rounded up to LANES."""
    divisor = gcd(*(round_up(length, LANES) for length in lengths))
    return min(divisor & -divisor, WIDTH_MAX)


def _krons(shapes: tuple[Shape, ...], at: int) -> tuple[list[tuple[KronForm, ...]], int]:
    """(the terms of each site, from this element on, the element behind them)."""
    krons = []
    for shape in shapes:
        row = []
        for o1, i1, o2, i2 in shape.krons:
            w2, w1 = at // LANES, at + round_up(o2, LANES) * i2
            row.append(KronForm(w1, w2, o1, i1, o2, i2))
            at = round_up(w1 + o1 * i1, LANES)
        krons.append(tuple(row))
    return krons, at


@lru_cache(maxsize=4096)
def _form(wide: int, shapes: tuple[Shape, ...], itemsize: int) -> GroupForm:
    width, lanes = _power(*(shape.tall for shape in shapes)), _power(wide)
    ranks = sum(shape.rank for shape in shapes)
    chunks = -(-ranks // LANES)
    krons, at = _krons(shapes, chunks * wide * LANES)
    bs = []
    for shape in shapes:
        at = round_up(at, width)
        bs.append(at // width)
        at += shape.rank * round_up(shape.tall, width)
    # from here on in floats
    at = round_up(at * itemsize, SECTION) // 4
    inner = at // LANES if any(shape.inner for shape in shapes) else -1
    at += chunks * LANES * (inner >= 0)
    column, sites = 0, []
    for shape, b, terms in zip(shapes, bs, krons, strict=True):
        tall, places = shape.tall, []
        for present, length, row_of in zip(shape.present, (tall, tall, wide), (width, width, lanes), strict=True):
            at = round_up(at, row_of)
            places.append(at // row_of if present else -1)
            at += round_up(length, row_of) * present
        sigma, beta, sigma_in = places
        tiles = -(-tall // width)
        sites.append(SiteForm(tall, tiles, shape.rank, column, b, terms, sigma, beta, sigma_in, shape.act, shape.inner))
        column += shape.rank
    return GroupForm(width, wide, lanes, ranks, chunks, inner, tuple(sites), round_up(at * 4, SECTION))


class Pool:
    """Memory for sections, seen as factors in their dtype and as fp32 vectors. HEAD is written already.

    What lies behind HEAD is not touched before a section is written there, so it costs nothing until then.
    """

    def __init__(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.nbytes = nbytes
        self.factors = memory.view(dtype)
        self.vectors = memory.view(torch.float32)
        self.vectors[:WIDTH_MAX] = 1.0
        self.vectors[WIDTH_MAX : 2 * WIDTH_MAX] = 0.0


def fill(pool: Pool, start: int, form: GroupForm, views: Views, block: Block, members: range) -> None:
    """Write an adapter's section at one group, at byte ``start`` of the pool, from its block in the arena."""
    if not form.nbytes:
        return
    factors = pool.factors[start // pool.factors.itemsize :]
    vectors = pool.vectors[start // 4 :]
    words = block.directory.sites[members.start : members.stop]
    if form.ranks:
        offsets = words[:, A_OFF]
        a = views.matrix(block.offset, int(offsets[offsets > 0].min()), form.ranks, form.wide)
        _chunk(factors, a.T, LANES)
    if form.inner >= 0:
        vectors[form.inner * LANES : (form.inner + form.chunks) * LANES] = 0.0
    for row, site, index in zip(words.tolist(), form.sites, members, strict=True):
        if site.rank:
            _chunk(
                factors[site.b * form.width :], views.matrix(block.offset, row[B_OFF], site.rank, site.tall), form.width
            )
        inner = views.vector(block.offset, row[INNER_OFF], site.rank)
        if inner is not None:
            at = form.inner * LANES + site.column
            vectors[at : at + site.rank] = inner
        vectors_of_site = (
            (site.sigma, SIGMA_OFF, site.tall, form.width),
            (site.beta, BETA_OFF, site.tall, form.width),
            (site.sigma_in, SIGMA_IN_OFF, form.wide, form.lanes),
        )
        for place, word, length, width in vectors_of_site:
            vector = views.vector(block.offset, row[word], length)
            if vector is not None:
                _chunk(vectors[place * width :], vector[None], width)
        for kron, term in zip(site.krons, block.directory.krons[index], strict=True):
            w1 = views.matrix(block.offset, term.w1_off, kron.o1, kron.i1)
            factors[kron.w1 : kron.w1 + kron.o1 * kron.i1].view(kron.o1, kron.i1).copy_(w1)
            _chunk(factors[kron.w2 * LANES :], views.matrix(block.offset, term.w2_off, kron.o2, kron.i2).T, LANES)


def _chunk(out: Tensor, source: Tensor, width: int) -> None:
    """Write source [rows, columns] to the front of ``out`` as [chunks, rows, width], zeros behind the columns."""
    rows, columns = source.shape
    whole, rest = divmod(columns, width)
    chunks = out[: (whole + (rest > 0)) * rows * width].view(-1, rows, width)
    if whole:
        # as [chunks, rows, width] whichever of the two lies side by side
        chunks[:whole].copy_(source[:, : whole * width].reshape(rows, whole, width).transpose(0, 1))
    if rest:
        chunks[whole, :, rest:] = 0.0
        chunks[whole, :, :rest].copy_(source[:, whole * width :])


class WorkingSet:
    """Owns the pool and decides who lies in it.

    epoch:   changes whenever something in the pool goes, so that what was bound to it binds again
    misses:  adapters asked for that had no place
    """

    def __init__(self, geometry: Geometry, views: Views, bytes_max: int, device: torch.device) -> None:
        if bytes_max < 0:
            raise ValueError(f"working_set_bytes_max: expected at least 0, got {bytes_max}")
        self._geometry, self._views = geometry, views
        self.pool = Pool(max(bytes_max // SECTION * SECTION, HEAD), geometry.dtype, device)
        self._slots: dict[int, Slot] = {}
        self.epoch = 0
        self.misses = 0

    @property
    def bytes(self) -> int:
        """Bytes that slots take."""
        return sum(slot.nbytes for slot in self._slots.values())

    def acquire(self, blocks: Mapping[int, Block]) -> dict[int, Slot]:
        """The slots of these blocks, by key; a block without one is a miss."""
        # all that are here first: nobody in this batch makes room for another
        for key in blocks:
            if key in self._slots:
                self._slots[key] = self._slots.pop(key)
        for key, block in blocks.items():
            if key not in self._slots:
                self._join(block, blocks)
        return {key: self._slots[key] for key in blocks if key in self._slots}

    def forget(self, key: int) -> None:
        """Free the slot of a block that is gone."""
        if self._slots.pop(key, None) is not None:
            self.epoch += 1

    def check(self) -> None:
        """Slots lie apart from each other inside the pool."""
        at = HEAD
        for slot in sorted(self._slots.values(), key=lambda slot: (slot.start, slot.nbytes)):
            assert slot.start >= at
            at = slot.start + slot.nbytes
        assert at <= self.pool.nbytes

    def _join(self, block: Block, batch: Mapping[int, Block]) -> None:
        forms = forms_of(self._geometry, block.directory)
        nbytes = sum(form.nbytes for form in forms)
        start = self._place(nbytes, batch)
        if start is None:
            self.misses += 1
            return
        starts, at = [], start
        for form, members in zip(forms, self._geometry.members, strict=True):
            starts.append(at)
            fill(self.pool, at, form, self._views, block, members)
            at += form.nbytes
        self._slots[block.key] = Slot(forms, tuple(starts), start, nbytes)

    def _place(self, nbytes: int, batch: Mapping[int, Block]) -> int | None:
        if nbytes > self.pool.nbytes - HEAD:
            return None
        idle = [key for key in self._slots if key not in batch]
        while (start := self._gap(nbytes)) is None and idle:
            self.forget(idle.pop(0))
        return start

    def _gap(self, nbytes: int) -> int | None:
        at = HEAD
        # slots without bytes, of adapters that have nothing here, lie at the start of others
        for slot in sorted(self._slots.values(), key=lambda slot: (slot.start, slot.nbytes)):
            if slot.start - at >= nbytes:
                return at
            at = slot.start + slot.nbytes
        return at if self.pool.nbytes - at >= nbytes else None
