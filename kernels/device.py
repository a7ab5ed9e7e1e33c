"""The interface in Triton: a few launches per group of sites, whatever the mix of adapters.

Two where all is low-rank, one more for Kronecker terms, two for those in stages (``kron_staged``); one per site for
deltas that are mostly zero. Long segments have launches of their own, with larger tiles, where a batch holds both.
What remains is torch's (``dispatch``): records of single rows by form, of shared factors by bank, of others by segment.

The arena is handed to the kernels three times, as factors, as fp32 vectors and as int32 directories. A batch is one
packed int32 tensor of tiles (``walks``), copied to the device once; nothing is read back.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from weft.kernels.batch import Rows, Segment
from weft.kernels.dispatch import Kernels
from weft.kernels.extras import Kind
from weft.kernels.kron import kron_kernel
from weft.kernels.kron_staged import fold_kernel, join_kernel
from weft.kernels.layout import Geometry
from weft.kernels.lowrank import expand_kernel, shrink_kernel
from weft.kernels.norms import Norm
from weft.kernels.override import norm_kernel
from weft.kernels.parts import Carried
from weft.kernels.scale import scale_input_kernel
from weft.kernels.sparse import entries_kernel, rows_kernel
from weft.kernels.tiles import SMALL, Tiles, tiles_for
from weft.kernels.walks import TritonRows, Walk


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
        left = 0
        for site, tall in zip(self.geometry.members[group], self._talls(group), strict=True):
            self._scatter(y[:, left : left + tall], x, rows, site, upcast)
            left += tall

    def _scatter(self, y: Tensor, x: Tensor, rows: TritonRows, site: int, upcast: bool) -> None:
        """Add the deltas that are mostly zero to a site's y [tokens, out]."""
        common = {"FEATURES": x.shape[1], "ITEM": self._factors.itemsize, "UPCAST": upcast}
        places = y, x, self._factors, self._words
        options = self._tiles[upcast].entries
        for tiles in rows.carrying(Kind.SPARSE, site):
            entries_kernel[(len(tiles), triton.cdiv(y.shape[1], options["BN"]))](
                *places, tiles, y.shape[1], y.stride(0), x.stride(0), **common, **options
            )
        options, most = self._tiles[upcast].rows, rows.most(Kind.ROWS, site)
        for tiles in rows.carrying(Kind.ROWS, site):
            rows_kernel[(len(tiles), triton.cdiv(most, options["BN"]))](
                *places, tiles, y.stride(0), x.stride(0), **common, **options
            )

    def _add_deltas(self, y: Tensor, x: Tensor, site: int, carried: Sequence[Carried]) -> None:
        # ``_apply`` has added those
        if carried[0].record.kind not in (Kind.SPARSE, Kind.ROWS):
            super()._add_deltas(y, x, site, carried)

    def override_norm(self, out: Tensor, x: Tensor, rows: Rows, place: int, norm: Norm) -> None:
        assert isinstance(rows, TritonRows)
        features = x.shape[2]
        x = x if x.stride(2) == 1 else x.contiguous()
        for tiles in rows.carrying(Kind.NORM, place):
            norm_kernel[(len(tiles), SMALL, x.shape[1])](
                out, x, self._vectors, norm.weight, norm.weight if norm.bias is None else norm.bias, tiles,
                out.stride(0), out.stride(1), x.stride(0), x.stride(1), norm.eps, norm.offset,
                FEATURES=features, CEIL=triton.next_power_of_2(features), CENTRED=norm.centred,
                BIASED=norm.bias is not None, **self._tiles[False].norm,
            )  # fmt: skip

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
        members, tiles, walk = self.geometry.members[group], self._tiles[upcast], rows.walks[height]
        talls = self._talls(group)
        if talls not in self._columns:
            firsts = [0, *np.cumsum(talls).tolist()][:-1]
            self._columns[talls] = torch.tensor(firsts, dtype=torch.int32, device=y.device)
        mix = rows.mix(members, height, upcast, tiles)
        common = {"ITEM": self._factors.itemsize, "UPCAST": upcast, "EVEN": mix.even}
        ends = {"SPLITS": len(hidden), "SITES_CEIL": triton.next_power_of_2(len(members))}
        way = {"HEIGHT": tiles.kron["BM"], "DEPTH": tiles.kron["BK"]}
        if mix.fused:
            kron_kernel[(len(walk.apart), len(members), mix.fused)](
                y, x, hidden, self._factors, self._vectors, self._words, walk.apart, self._columns[talls],
                members.start, y.stride(0), x.stride(0), hidden.stride(0), hidden.stride(1),
                **common, **ends, **tiles.kron,
            )  # fmt: skip
        if mix.folds:
            folded = torch.empty(len(members), walk.rows, mix.columns, dtype=torch.float32, device=x.device)
            fold_kernel[(len(walk.merged), len(members) * mix.terms, mix.folds)](
                x, folded, self._factors, self._words, walk.merged,
                members.start, mix.terms, x.stride(0), folded.stride(0), folded.stride(1),
                **common, **way, **tiles.fold[height],
            )  # fmt: skip
            join_kernel[(len(walk.merged), len(members), mix.joins)](
                y, folded, hidden, self._factors, self._vectors, self._words, walk.merged, self._columns[talls],
                members.start, y.stride(0), folded.stride(0), folded.stride(1), hidden.stride(0), hidden.stride(1),
                **common, **ends, **way, **tiles.join,
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
