"""The interface in Triton: two launches per group of sites whatever mix of adapters, three with Kronecker terms.

Long segments have launches of their own, with larger tiles, where a batch holds both kinds.

The arena is handed to the kernels three times, as factors, as fp32 vectors and as int32 directories. A batch is one
packed int32 tensor of tiles, copied to the device once; nothing is read back.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from weft.kernels.batch import Rows, Segment
from weft.kernels.dispatch import Kernels
from weft.kernels.kron import kron_kernel
from weft.kernels.layout import ALIGN, BETA_OFF, KRON_COUNT, RANK, SIGMA_OFF, Geometry
from weft.kernels.lowrank import expand_kernel, shrink_kernel
from weft.kernels.scale import scale_input_kernel
from weft.kernels.tiles import LARGE, SMALL, Tiles, tiles_for

Tile = tuple[int, int, int, int]


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


class TritonRows(Rows):
    """Rows as tiles, and what the launches of each group have to cover.

    walks:      ``large``: segments of at least LARGE rows;  ``small``: all others. So which of the two a segment
                is in depends on its own length only
    ranks_max:  per group, the largest sum of ranks
    expands:    per group, whether a site is finished by ``expand``;  ``mixes``: by ``kron``
    """

    def __init__(self, geometry: Geometry, segments: Sequence[Segment], device: torch.device) -> None:
        super().__init__(geometry, segments)
        self.walks = {"small": Walk(SMALL), "large": Walk(LARGE)}
        for segment in self.segments:
            self.walks["large" if segment.stop - segment.start >= LARGE else "small"].add(segment)
        self._copy(device)
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
        parts = [tiles for walk in self.walks.values() for tiles in walk.tiles()]
        packed = torch.tensor([tile for part in parts for tile in part], dtype=torch.int32).view(-1, 4)
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        stops = np.cumsum([len(part) for part in parts]).tolist()
        views = [packed[stop - len(part) : stop] for part, stop in zip(parts, stops, strict=True)]
        for walk, merged, apart in zip(self.walks.values(), views[::2], views[1::2], strict=True):
            walk.merged, walk.apart = merged, apart

    def krons(self, members: range, height: int, width: int) -> tuple[int, bool]:
        """(the most [height, width] tiles that Y takes at any of these sites, whether all sizes divide by 8)."""
        terms = {
            term[2:]
            for block in self.blocks.values()
            for terms in block.directory.krons[members.start : members.stop]
            for term in terms
        }
        most = max(triton.cdiv(o1, height) * triton.cdiv(o2, width) for o1, _, o2, _ in terms)
        return most, all(size % 8 == 0 for term in terms for size in term)


class TritonKernels(Kernels):
    """Launches; keeps nothing but views of the arena and what follows from the geometry."""

    name = "triton"

    def __init__(self, arena: Tensor, geometry: Geometry, tiles: Tiles | None = None) -> None:
        """``tiles``: in place of those that were searched for the device."""
        super().__init__(arena, geometry)
        self._factors, self._vectors = arena.view(geometry.dtype), arena.view(torch.float32)
        self._words = arena.view(torch.int32)
        name = torch.cuda.get_device_name(arena.device) if arena.is_cuda else "default"
        nvidia = torch.version.hip is None
        self._tiles = {exact: tiles or tiles_for(name, exact, nvidia) for exact in (False, True)}
        self._parts: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._columns: dict[tuple[int, ...], Tensor] = {}
        # the interpreter multiplies bf16 wrongly, so there the factors are raised to fp32 first
        self._upcast = geometry.dtype == torch.float32 or (
            geometry.dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)
        )

    def rows(self, segments: Sequence[Segment]) -> TritonRows:
        return TritonRows(self.geometry, segments, self.arena.device)

    def _apply(self, y: Tensor, x: Tensor, rows: Rows, group: int) -> None:
        assert isinstance(rows, TritonRows)
        if not rows.touched[group]:
            return
        upcast = self._upcast or x.dtype != self.geometry.dtype
        for height, walk in rows.walks.items():
            if not walk.rows:
                continue
            # without ranks nothing reads it
            hidden = self._vectors.view(1, 1, -1)
            if rows.ranks_max[group]:
                hidden = self._shrink(x, rows, group, height, upcast)
            if rows.expands[group]:
                self._expand(y, hidden, walk, group, height, upcast)
            if rows.mixes[group]:
                self._mix(y, x, hidden, rows, group, height, upcast)

    def scale_input(self, x: Tensor, rows: Rows, site: int) -> Tensor:
        assert isinstance(rows, TritonRows)
        self._check(None, x, rows, self.geometry.group_of[site])
        scaled = x.clone(memory_format=torch.contiguous_format)
        options, wide = self._tiles[False].scale, x.shape[1]
        if rows.input_scaled(site):
            for walk in rows.walks.values():
                if walk.rows:
                    scale_input_kernel[(len(walk.apart), triton.cdiv(wide, options["BN"]))](
                        scaled, self._vectors, self._words, walk.apart, site, scaled.stride(0), FEATURES=wide, **options
                    )
        return scaled

    def _shrink(self, x: Tensor, rows: TritonRows, group: int, height: str, upcast: bool) -> Tensor:
        """h, fp32 [planes, rows of the walk, largest sum of ranks], written as far as a row's own ranks go."""
        members, wide, ranks = self.geometry.members[group], x.shape[1], int(rows.ranks_max[group])
        walk, options = rows.walks[height], self._tiles[upcast].shrink[height]
        span, parts = self._tiles[upcast].split(wide)
        planes, fold = (1, parts) if height == "large" else (parts, 1)
        hidden = torch.empty(planes, walk.rows, ranks, dtype=torch.float32, device=x.device)
        shrink_kernel[(len(walk.merged), triton.cdiv(ranks, options["BN"]), planes)](
            x, self._factors, self._words, walk.merged, hidden,
            members.start, x.stride(0), hidden.stride(0), hidden.stride(1),
            FEATURES=wide, SPAN=span, FOLD=fold, SITES=len(members),
            SITES_CEIL=triton.next_power_of_2(len(members)),
            ITEM=self._factors.itemsize, UPCAST=upcast, **options,
        )  # fmt: skip
        return hidden

    def _expand(self, y: Tensor, hidden: Tensor, walk: Walk, group: int, height: str, upcast: bool) -> None:
        members, talls = self.geometry.members[group], self._talls(group)
        options = self._tiles[upcast].expand[height]
        parts = self._parts_of(talls, options["BN"])
        expand_kernel[(len(walk.merged), len(parts))](
            y, hidden, self._factors, self._vectors, self._words, walk.merged, parts,
            members.start, y.stride(0), hidden.stride(0), hidden.stride(1),
            SPLITS=len(hidden), SITES=len(members), SITES_CEIL=triton.next_power_of_2(len(members)),
            EVEN=all(tall % 16 == 0 for tall in talls),
            ITEM=self._factors.itemsize, UPCAST=upcast, **options,
        )  # fmt: skip

    def _mix(
        self, y: Tensor, x: Tensor, hidden: Tensor, rows: TritonRows, group: int, height: str, upcast: bool
    ) -> None:
        members, options, walk = self.geometry.members[group], self._tiles[upcast].kron, rows.walks[height]
        talls = self._talls(group)
        if talls not in self._columns:
            firsts = [0, *np.cumsum(talls).tolist()][:-1]
            self._columns[talls] = torch.tensor(firsts, dtype=torch.int32, device=y.device)
        most, even = rows.krons(members, options["BM"], options["BN"])
        kron_kernel[(len(walk.apart), len(members), most)](
            y, x, hidden, self._factors, self._vectors, self._words, walk.apart, self._columns[talls],
            members.start, y.stride(0), x.stride(0), hidden.stride(0), hidden.stride(1),
            SPLITS=len(hidden), SITES_CEIL=triton.next_power_of_2(len(members)), EVEN=even,
            ITEM=self._factors.itemsize, UPCAST=upcast, **options,
        )  # fmt: skip

    def _talls(self, group: int) -> tuple[int, ...]:
        return tuple(self.geometry.sites[s].out_features for s in self.geometry.members[group])

    def _parts_of(self, talls: tuple[int, ...], width: int) -> Tensor:
        """The column blocks of a group's outputs: int32 [blocks, 4] (``lowrank``)."""
        if (width, talls) not in self._parts:
            parts, first = [], 0
            for member, tall in enumerate(talls):
                parts += [(member, column, first + column, tall) for column in range(0, tall, width)]
                first += tall
            self._parts[width, talls] = torch.tensor(parts, dtype=torch.int32, device=self.arena.device)
        return self._parts[width, talls]
