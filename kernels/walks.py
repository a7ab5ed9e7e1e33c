"""A batch as the Triton kernels walk it: runs of rows of one block, cut into tiles, and the sizes of their grids."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.kernels.batch import Rows, Segment
from weft.kernels.extras import Kind
from weft.kernels.kron_ways import is_staged
from weft.kernels.layout import ALIGN, BETA_OFF, KRON_COUNT, RANK, SIGMA_OFF, Geometry, KronTerm
from weft.kernels.tiles import LARGE, SMALL, Tiles

Tile = tuple[int, int, int, int]

# words of a tile of rows that carry a record: block's first byte / ALIGN, first row, row behind, offsets of the
# record's first two pieces, columns of the first
RECORD_TILE = 6


class Walk:
    """Segments of one class as tiles: int32 [tiles, 4] each, a run of rows of one block (``lowrank``).

    merged:  neighbouring segments of one block share tiles
    apart:   tiles of SMALL rows that no two segments share: some sums run over the rows of a tile
    rows:    in all segments together
    """

    def __init__(self, height: int) -> None:
        self.rows = 0
        self._height = height
        self._runs: list[Tile] = []
        self._apart: list[Tile] = []
        self.merged = self.apart = torch.empty(0, 4, dtype=torch.int32)

    def add(self, segment: Segment) -> None:
        """Append a segment, before the tiles are ``placed``."""
        assert segment.block is not None
        tile = (segment.block.offset // ALIGN, segment.start, segment.stop, self.rows)
        self._apart += _cut(tile, SMALL)
        last = self._runs[-1] if self._runs else None
        if last and last[0] == tile[0] and last[2] == segment.start and self._height == SMALL:
            self._runs[-1] = (last[0], last[1], segment.stop, last[3])
        else:
            self._runs.append(tile)
        self.rows += segment.stop - segment.start

    def tiles(self) -> tuple[list[Tile], list[Tile]]:
        """(merged, apart) on the host."""
        return [tile for run in self._runs for tile in _cut(run, self._height)], self._apart


def _cut(run: Tile, height: int) -> list[Tile]:
    block, start, stop, hidden = run
    return [(block, at, min(at + height, stop), hidden + at - start) for at in range(start, stop, height)]


class Mix(NamedTuple):
    """Kronecker terms at a group of sites, over all blocks of a batch.

    fused:         the most tiles that Y takes at a site whose terms are fused; 0: there is none
    folds, joins:  the most tiles of the two stages of any other site;  ``terms``: the most terms there
    columns:       the most numbers per token between the stages
    even:          whether all sizes divide by 8
    """

    fused: int
    folds: int
    joins: int
    terms: int
    columns: int
    even: bool


class TritonRows(Rows):
    """Rows as tiles, and what the launches of each group have to cover.

    walks:      ``large``: segments of at least LARGE rows;  ``small``: all others. So which of the two a segment
                is in depends on its own length only
    ranks_max:  per group, the largest sum of ranks
    expands:    per group, whether a site is finished by ``expand``;  ``mixes``: by its Kronecker terms
    """

    def __init__(self, geometry: Geometry, segments: Sequence[Segment], device: torch.device) -> None:
        super().__init__(geometry, segments)
        self.walks = {"small": Walk(SMALL), "large": Walk(LARGE)}
        for segment in self.segments:
            self.walks["large" if segment.stop - segment.start >= LARGE else "small"].add(segment)
        self._copy(device)
        self._device = device
        self._carried: dict[Kind, dict[int, list[Tensor]]] = {}
        self._mixes: dict[tuple[int, str, bool], Mix] = {}
        starts = [members.start for members in geometry.members]
        self.ranks_max: npt.NDArray[np.int64] = np.zeros(len(starts), dtype=np.int64)
        self.expands: npt.NDArray[np.bool_] = np.zeros(len(starts), dtype=bool)
        self.mixes: npt.NDArray[np.bool_] = np.zeros(len(starts), dtype=bool)
        for block in self.blocks.values():
            sites = block.directory.sites
            mixes, plain = sites[:, KRON_COUNT] > 0, sites[:, (RANK, SIGMA_OFF, BETA_OFF)].any(axis=1)
            self.ranks_max = np.maximum(self.ranks_max, np.add.reduceat(sites[:, RANK], starts))
            self.expands |= np.logical_or.reduceat(plain & ~mixes, starts)
            self.mixes |= np.logical_or.reduceat(mixes, starts)

    def _copy(self, device: torch.device) -> None:
        """All tiles to the device in one piece."""
        views = _placed([tiles for walk in self.walks.values() for tiles in walk.tiles()], 4, device)
        for walk, merged, apart in zip(self.walks.values(), views[::2], views[1::2], strict=True):
            walk.merged, walk.apart = merged, apart

    def carrying(self, kind: Kind, place: int) -> list[Tensor]:
        """Tiles of the rows whose adapter has records of this kind here, int32 [tiles, RECORD_TILE].

        Several tensors where adapters have several such records: no row is in one of them twice.
        """
        if kind not in self._carried:
            self._carried[kind] = self._carry(kind)
        return self._carried[kind].get(place, [])

    def most(self, kind: Kind, place: int) -> int:
        """The most columns of the first piece of such a record."""
        return max((r.pieces[0].columns for _, r in self.records.get((kind, place), ()) if r.pieces[0]), default=0)

    def _carry(self, kind: Kind) -> dict[int, list[Tensor]]:
        """``carrying`` at all places, copied to the device in one piece."""
        parts: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for (found, place), carried in self.records.items():
            seen: Counter[int] = Counter()
            for segment, record in carried if found is kind else ():
                assert segment.block is not None
                first, second = (*record.pieces, None)[:2]
                words = first.offset if first else 0, second.offset if second else 0, first.columns if first else 0
                tiles = _cut((segment.block.offset // ALIGN, segment.start, segment.stop, 0), SMALL)
                parts.setdefault((place, seen[segment.start]), []).extend((*tile[:3], *words) for tile in tiles)
                seen[segment.start] += 1
        tables: dict[int, list[Tensor]] = {}
        for (place, _), table in zip(parts, _placed(list(parts.values()), RECORD_TILE, self._device), strict=True):
            tables.setdefault(place, []).append(table)
        return tables

    def mix(self, members: range, height: str, exact: bool, tiles: Tiles) -> Mix:
        """How large the grids of the Kronecker kernels are for these sites, with these tiles."""
        key = (members.start, height, exact)
        if key not in self._mixes:
            tables = {
                terms
                for block in self.blocks.values()
                for terms in block.directory.krons[members.start : members.stop]
                if terms
            }
            self._mixes[key] = _mix_of(tables, height, tiles)
        return self._mixes[key]


def _placed(parts: Sequence[Sequence[tuple[int, ...]]], words: int, device: torch.device) -> list[Tensor]:
    """Each part as a table int32 [.., words]; one copy to the device for all of them."""
    packed = torch.tensor([row for part in parts for row in part], dtype=torch.int32).view(-1, words)
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    stops = np.cumsum([len(part) for part in parts]).tolist()
    return [packed[stop - len(part) : stop] for part, stop in zip(parts, stops, strict=True)]


def _mix_of(tables: set[tuple[KronTerm, ...]], height: str, tiles: Tiles) -> Mix:
    kron, fold, join = tiles.kron, tiles.fold[height], tiles.join
    tokens = LARGE if height == "large" else SMALL
    fused = folds = joins = terms_most = columns = 0
    for terms in tables:
        _, _, o1, _, o2, _ = terms[0]
        if not is_staged(terms, kron["BM"], kron["BK"]):
            fused = max(fused, _tiles(o1, kron["BM"]) * _tiles(o2, kron["BN"]))
            continue
        rows = tokens * max(term.i1 for term in terms)
        folds = max(folds, _tiles(rows, fold["BM"]) * _tiles(o2, fold["BN"]))
        joins = max(joins, _tiles(o1, join["BM"]) * _tiles(tokens * o2, join["BN"]))
        terms_most = max(terms_most, len(terms))
        columns = max(columns, sum(term.i1 * term.o2 for term in terms))
    even = all(size % 8 == 0 for terms in tables for term in terms for size in term[2:])
    return Mix(fused, folds, joins, terms_most, columns, even)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)
