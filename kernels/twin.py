"""The interface in plain torch: what a CPU runs, and what a GPU's results are compared with.

Rows of short segments, decoding ones above all, go through ``bags`` together; a long segment, a piece of a prompt,
is a pair of matmuls straight from the arena. Which of the two a segment takes depends on its own length only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.kernels import joined
from weft.kernels.activation import activate
from weft.kernels.bags import Chosen, Pattern, Places, Plan
from weft.kernels.batch import Block, Rows, Segment
from weft.kernels.dispatch import Kernels
from weft.kernels.extras import Kind
from weft.kernels.kept import Kept
from weft.kernels.layout import (
    A_OFF,
    ACT,
    B_OFF,
    BETA_OFF,
    INNER_OFF,
    KRON_COUNT,
    RANK,
    SIGMA_IN_OFF,
    SIGMA_OFF,
    TAP_SHIFT,
    Geometry,
)
from weft.kernels.parts import Carried
from weft.kernels.working_set import HEAD, GroupForm, Pool, Slot, WorkingSet, fill, forms_of

# up to here reading an adapter once per row is cheaper than setting up matmuls
SHORT_MAX = 16


@dataclass(frozen=True, eq=False)
class Scale:
    """Rows that sigma_in multiplies and the rows of the pool's vectors [.., lanes] that theirs is made of."""

    rows: Chosen
    index: Tensor
    lanes: int


class TorchRows(Rows):
    """Rows and, per group, how to apply them; made when a group is first applied."""

    def __init__(self, geometry: Geometry, segments: Sequence[Segment]) -> None:
        super().__init__(geometry, segments)
        short = [s for s in self.segments if s.stop - s.start <= SHORT_MAX]
        self.long = [s for s in self.segments if s.stop - s.start > SHORT_MAX]
        self.short = [(row, s.block) for s in short if s.block is not None for row in range(s.start, s.stop)]
        self.short_blocks = {block.key: block for _, block in self.short}
        self.slots: dict[int, Slot] = {}
        self.missing: dict[int, tuple[GroupForm, ...]] = {}
        self.epoch = -1
        self.plans: list[tuple[Plan, ...] | None] = []
        self.patterns: dict[tuple[int, ...], Pattern] = {}
        self.places: dict[tuple[object, ...], Places] = {}
        self.scales: dict[int, tuple[Scale | None, tuple[Segment, ...]]] = {}


class TorchKernels(Kernels):
    """Owns the working set."""

    name = "torch"

    def __init__(self, arena: Tensor, geometry: Geometry, working_set_bytes_max: int) -> None:
        super().__init__(arena, geometry)
        self._set = WorkingSet(geometry, self._views, working_set_bytes_max, arena.device)
        # what the pool leaves of the budget, up to half of it
        self._bytes_max = working_set_bytes_max
        self._kept = Kept(working_set_bytes_max // 2)
        # one section, written anew for every use
        self._scratch: Pool | None = None

    @property
    def working_set_bytes(self) -> int:
        return self._set.bytes + self._kept.nbytes

    @property
    def working_set_misses(self) -> int:
        return self._set.misses

    def forget(self, key: int) -> None:
        super().forget(key)
        self._set.forget(key)

    def check(self) -> None:
        """The working set is in order."""
        self._set.check()

    def rows(self, segments: Sequence[Segment]) -> TorchRows:
        rows = TorchRows(self.geometry, segments)
        self._settle(rows)
        return rows

    def _apply(self, y: Tensor, x: Tensor, rows: Rows, group: int) -> None:
        assert isinstance(rows, TorchRows)
        if rows.epoch != self._set.epoch:
            self._settle(rows)
        plans = rows.plans[group]
        if plans is None:
            plans = rows.plans[group] = self._plans(rows, group)
        # the bags want one dtype; matmuls take any
        mixed = x.dtype != self.geometry.dtype
        if not mixed:
            for plan in plans:
                plan.run(y, x)
        for segment in rows.segments if mixed else rows.long:
            assert segment.block is not None
            self._apply_long(y[segment.start : segment.stop], x[segment.start : segment.stop], segment.block, group)

    def scale_input(self, x: Tensor, rows: Rows, site: int) -> Tensor:
        assert isinstance(rows, TorchRows)
        self._check(None, x, rows, self.geometry.group_of[site])
        if rows.epoch != self._set.epoch:
            self._settle(rows)
        if site not in rows.scales:
            rows.scales[site] = self._scales(rows, site)
        together, apart = rows.scales[site]
        scaled = x.clone(memory_format=torch.contiguous_format)
        if together is not None:
            part = together.rows.take(scaled)
            vectors = self._set.pool.vectors.view(-1, together.lanes).index_select(0, together.index)
            part.copy_(part.float() * vectors.view(len(part), -1)[:, : x.shape[1]])
            together.rows.give(scaled, part)
        for segment in apart:
            assert segment.block is not None
            offset = int(segment.block.directory.sites[site, SIGMA_IN_OFF])
            vector = self._views.vector(segment.block.offset, offset, x.shape[1])
            part = scaled[segment.start : segment.stop]
            assert vector is not None
            part.copy_(part.float() * vector)
        return scaled

    def _scales(self, rows: TorchRows, site: int) -> tuple[Scale | None, tuple[Segment, ...]]:
        """(rows scaled together from the working set, segments scaled from the arena)."""
        group = self.geometry.group_of[site]
        member = site - self.geometry.members[group].start
        chosen: list[int] = []
        starts: list[int] = []
        apart, lanes = [], 0
        for segment in rows.segments:
            assert segment.block is not None
            slot = rows.slots.get(segment.block.key)
            if not segment.block.directory.sites[site, SIGMA_IN_OFF]:
                continue
            if slot is None or segment.stop - segment.start > SHORT_MAX:
                apart.append(segment)
                continue
            lanes = slot.forms[group].lanes
            start = slot.starts[group] // 4 // lanes + slot.forms[group].sites[member].sigma_in
            chosen += range(segment.start, segment.stop)
            starts += [start] * (segment.stop - segment.start)
        if not chosen:
            return None, tuple(apart)
        pieces = np.arange(-(-self.geometry.in_features(group) // lanes))
        index = torch.from_numpy((np.array(starts)[:, None] + pieces).reshape(-1)).to(self.arena.device)
        return Scale(Chosen(chosen, self.arena.device), index, lanes), tuple(apart)

    def _add_deltas(self, y: Tensor, x: Tensor, site: int, carried: Sequence[Carried]) -> None:
        left = carried
        if carried and carried[0].record.kind is Kind.SPARSE:
            left = joined.add(self._kept, y, x, site, carried)
        super()._add_deltas(y, x, site, left)

    def _settle(self, rows: TorchRows) -> None:
        rows.slots = self._set.acquire(rows.short_blocks)
        self._kept.trim(min(self._bytes_max // 2, self._bytes_max - self._set.bytes))
        missing = [block for key, block in rows.short_blocks.items() if key not in rows.slots]
        rows.missing = {block.key: forms_of(self.geometry, block.directory) for block in missing}
        rows.plans = [None] * len(self.geometry.groups)
        # the keys of these name forms that may be gone
        rows.patterns.clear()
        rows.places.clear()
        rows.scales.clear()
        rows.epoch = self._set.epoch

    def _plans(self, rows: TorchRows, group: int) -> tuple[Plan, ...]:
        plans = []
        kept: list[tuple[int, GroupForm, int]] = []
        missing: dict[int, list[int]] = {}
        for row, block in rows.short:
            slot = rows.slots.get(block.key)
            if slot is None:
                missing.setdefault(block.key, []).append(row)
            elif slot.forms[group].active:
                kept.append((row, slot.forms[group], slot.starts[group]))
        if kept:
            starts = np.array([start for _, _, start in kept], dtype=np.int64)
            pattern, places = self._place(rows, [form for _, form, _ in kept], starts)
            plans.append(Plan(pattern, places, self._set.pool, [row for row, _, _ in kept], starts))
        for key, its_rows in missing.items():
            form = rows.missing[key][group]
            if form.active:
                plans.append(self._plan_missing(rows, rows.short_blocks[key], its_rows, group))
        return tuple(plans)

    def _plan_missing(self, rows: TorchRows, block: Block, its_rows: list[int], group: int) -> Plan:
        """The same sums from a section that is written anew each time: slower, equal bit for bit."""
        form = rows.missing[block.key][group]
        starts = np.full(len(its_rows), HEAD, dtype=np.int64)
        pattern, places = self._place(rows, [form] * len(its_rows), starts)
        if self._scratch is None or self._scratch.nbytes < HEAD + form.nbytes:
            self._scratch = Pool(HEAD + form.nbytes, self.geometry.dtype, self.arena.device)
        scratch = self._scratch

        def refill() -> None:
            fill(scratch, HEAD, form, self._views, block, self.geometry.members[group])

        return Plan(pattern, places, scratch, its_rows, starts, refill)

    def _place(
        self, rows: TorchRows, forms: list[GroupForm], starts: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> tuple[Pattern, Places]:
        key = tuple(id(form) for form in forms)
        pattern = rows.patterns.get(key)
        if pattern is None:
            exact = self.geometry.dtype == torch.float32
            pattern = rows.patterns[key] = Pattern(forms, exact, self.arena.device)
        shifts = (starts - starts.min()) // self.geometry.dtype.itemsize
        where = (key, shifts.tobytes())
        places = rows.places.get(where)
        if places is None:
            places = rows.places[where] = pattern.at(shifts)
        return pattern, places

    def _apply_long(self, y: Tensor, x: Tensor, block: Block, group: int) -> None:
        members = self.geometry.members[group]
        words = block.directory.sites[members.start : members.stop].tolist()
        hidden = None
        ranks = sum(row[RANK] for row in words)
        if ranks:
            first = min(row[A_OFF] for row in words if row[A_OFF])
            a = self._views.matrix(block.offset, first, ranks, x.shape[1])
            # bf16 is the one short dtype that CPUs multiply fast
            native = x.dtype == a.dtype == torch.bfloat16
            hidden = x @ a.T if native else x.float() @ a.float().T
        left = top = 0
        for site, row in zip(members, words, strict=True):
            right, rank = left + self.geometry.sites[site].out_features, row[RANK]
            part = None
            if hidden is not None and rank:
                part = self._bend_long(hidden[:, top : top + rank], block, row)
            if row[KRON_COUNT] or row[SIGMA_OFF] or row[BETA_OFF]:
                self._add_long(y[:, left:right], x, part, block, site)
            elif part is not None:
                b = self._views.matrix(block.offset, row[B_OFF], rank, right - left)
                _add_product(y[:, left:right], part, b)
            left, top = right, top + rank

    def _bend_long(self, hidden: Tensor, block: Block, row: list[int]) -> Tensor:
        """act(hidden + inner) of a site with this row of the directory: in fp32, and back to hidden's dtype."""
        inner = self._views.vector(block.offset, row[INNER_OFF], row[RANK])
        act = row[ACT] % (1 << TAP_SHIFT)
        if inner is None and not act:
            return hidden
        raised = hidden.float() if inner is None else hidden.float() + inner
        return activate(raised, act).to(hidden.dtype)

    def _add_long(self, y: Tensor, x: Tensor, hidden: Tensor | None, block: Block, site: int) -> None:
        row, tall = block.directory.sites[site].tolist(), y.shape[1]
        total = y.float()
        sigma = self._views.vector(block.offset, row[SIGMA_OFF], tall)
        if sigma is not None:
            total = total * sigma
        if hidden is not None:
            b = self._views.matrix(block.offset, row[B_OFF], row[RANK], tall)
            total = torch.addmm(total, hidden.float(), b.float())
        for term in block.directory.krons[site]:
            w1 = self._views.matrix(block.offset, term.w1_off, term.o1, term.i1).float()
            w2 = self._views.matrix(block.offset, term.w2_off, term.o2, term.i2).float()
            folded = x.reshape(-1, term.i2).float() @ w2.T
            total = total + torch.matmul(w1, folded.view(-1, term.i1, term.o2)).view(-1, tall)
        beta = self._views.vector(block.offset, row[BETA_OFF], tall)
        y.copy_(total if beta is None else total + beta)


def _add_product(y: Tensor, hidden: Tensor, b: Tensor) -> None:
    """y += hidden b, rounded once."""
    if y.dtype == hidden.dtype == b.dtype:
        y.addmm_(hidden, b)
    else:
        y.copy_(torch.addmm(y.float(), hidden.float(), b.float()))
