"""What a step looks like to the arithmetic: runs of token rows that point at blocks of an arena."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from weft.kernels.extras import DELTAS, Kind, Record
from weft.kernels.layout import BETA_OFF, KRON_COUNT, RANK, SIGMA_IN_OFF, SIGMA_OFF, Directory, Geometry

if TYPE_CHECKING:
    from weft.kernels.alike import Alike
    from weft.kernels.banked import Banked
    from weft.kernels.parts import Carried


class BatchError(ValueError):
    """Segments or tensors that do not describe one batch."""


@dataclass(frozen=True, eq=False)
class Block:
    """An adapter's operators where they lie now.

    key:        unique per load: whatever is remembered about a block is remembered under it
    offset:     bytes from the start of the arena, a multiple of ALIGN
    nbytes:     length
    directory:  its head, on the host
    banks:      blocks of factors that it shares with others, by their numbers in its records
    """

    key: int
    offset: int
    nbytes: int
    directory: Directory
    banks: tuple["Block", ...] = ()


@dataclass(frozen=True, eq=False)
class Segment:
    """Token rows [start, stop) of one request that share a block; None runs the base model alone.

    Neighbouring segments may share a block. They are kept apart, so that the arithmetic of a request's rows
    does not depend on who stands next to it.
    """

    start: int
    stop: int
    block: Block | None


@dataclass(frozen=True, eq=False)
class SoftSpan:
    """Token rows [start, stop) of the batch that are rows ``first``.. of a block's soft prompt."""

    start: int
    stop: int
    first: int
    block: Block


class Rows:
    """A batch's segments, ready to be applied many times; made by ``Kernels.rows``, opaque to callers.

    tokens:    rows in the batch
    segments:  those with a block and at least one row
    """

    def __init__(self, geometry: Geometry, segments: Sequence[Segment]) -> None:
        at = 0
        for segment in segments:
            if segment.start != at or segment.stop < at:
                raise BatchError(f"segments: expected one that starts at row {at}, got {segment.start}..{segment.stop}")
            if segment.block is not None and len(segment.block.directory.sites) != len(geometry.sites):
                sites = len(segment.block.directory.sites)
                raise BatchError(f"segments: expected blocks of {len(geometry.sites)} sites, got one of {sites}")
            at = segment.stop
        self.tokens = at
        self.segments = tuple(s for s in segments if s.block is not None and s.stop > s.start)
        self.blocks = {s.block.key: s.block for s in self.segments if s.block is not None}
        starts = [members.start for members in geometry.members]
        self.touched: npt.NDArray[np.bool_] = np.zeros(len(starts), dtype=bool)
        for block in self.blocks.values():
            words = block.directory.sites[:, (RANK, KRON_COUNT, SIGMA_OFF, BETA_OFF)].any(axis=1)
            self.touched |= np.logical_or.reduceat(words, starts)
        self.records: dict[tuple[Kind, int], list[tuple[Segment, Record]]] = {}
        # the same with their pieces, from the first use on
        self.carried: dict[tuple[Kind, int], list[Carried]] = {}
        self.by_start: dict[tuple[Kind, int], dict[int, Carried]] = {}
        for segment in self.segments:
            assert segment.block is not None
            for record in segment.block.directory.records:
                self.records.setdefault((record.kind, record.place), []).append((segment, record))
        # by group, the sites and kinds of its deltas, site by site
        self.deltas: dict[int, list[tuple[int, Kind]]] = {}
        for kind, place in sorted(self.records, key=lambda known: (known[1], known[0])):
            if kind in DELTAS:
                self.touched[geometry.group_of[place]] = True
                self.deltas.setdefault(geometry.group_of[place], []).append((place, kind))
        # by group, (start, stop, tap) of rows that do not read the place's own output, from the first use on
        self.taps: dict[int, list[tuple[int, int, int]]] = {}
        # single rows whose records have one form, and what is left, from the first use on
        self.alike: dict[tuple[Kind, int], tuple[list[Alike], list[Carried]]] = {}
        # what the kernels make of banks, by site, from the first use on
        self.banked: dict[int, list[Banked]] = {}

    def input_scaled(self, site: int) -> tuple[tuple[int, int], ...]:
        """Row ranges, apart from each other and in order, whose block has sigma_in at this site."""
        ranges: list[tuple[int, int]] = []
        for segment in self.segments:
            assert segment.block is not None
            if not segment.block.directory.sites[site, SIGMA_IN_OFF]:
                continue
            if ranges and ranges[-1][1] == segment.start:
                ranges[-1] = (ranges[-1][0], segment.stop)
            else:
                ranges.append((segment.start, segment.stop))
        return tuple(ranges)
