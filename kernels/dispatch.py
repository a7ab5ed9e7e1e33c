"""The door of this room: one interface, one implementation per kind of device."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from weft.kernels import alike, parts
from weft.kernels.alike import Alike, Stacks
from weft.kernels.banked import Banked, Hiddens, banked
from weft.kernels.batch import BatchError, Block, Rows, Segment, SoftSpan
from weft.kernels.extras import Kind, Record
from weft.kernels.kept import Kept
from weft.kernels.layout import ACT, ALIGN, FACTOR_DTYPES, RANK, TAP_SHIFT, Geometry, Views
from weft.kernels.norms import Norm, overridden
from weft.kernels.parts import Carried, Pieces

NAMES = ("auto", "torch", "triton")
# rows of a batch that a CPU multiplies at once with factors that adapters share
TILE = 16


class KernelsUnavailable(RuntimeError):
    """The implementation asked for cannot run here."""


class Kernels(ABC):
    """Applies adapters to rows, straight from the bytes of one arena.

    arena:     uint8 [bytes], where blocks lie; the caller writes blocks, this class only reads
    geometry:  the sites of the backbone
    """

    name: str

    def __init__(self, arena: Tensor, geometry: Geometry) -> None:
        if arena.dtype != torch.uint8 or arena.dim() != 1 or not arena.is_contiguous():
            raise ValueError(f"arena: expected contiguous uint8 [bytes], got {arena.dtype} {list(arena.shape)}")
        if arena.numel() % ALIGN:
            raise ValueError(f"arena: expected a multiple of {ALIGN} bytes, got {arena.numel()}")
        self.arena = arena
        self.geometry = geometry
        self._views = Views(arena, geometry.dtype)
        # views of what blocks' records hold, by the block's key; no two records of a block lie in one place
        self._pieces: dict[int, dict[Record, Pieces]] = {}
        # nothing is kept beside the arena but where a device gains by it
        self._kept = Kept(0)
        # the first column of each site among the outputs of its group
        self._lefts = [left for members in geometry.members for left in _starts(geometry, members)]
        self._hidden_group = len(geometry.groups) - geometry.hidden
        self._widths = [(geometry.out_features(g), geometry.in_features(g)) for g in range(len(geometry.groups))]

    @abstractmethod
    def rows(self, segments: Sequence[Segment]) -> Rows:
        """Prepare a batch. The result may be applied as long as its blocks stay where they are.

        segments:  cover rows 0..tokens in order; one per request, so that a request's rows are computed
                   alike in every batch of this shape
        """

    def apply(self, y: Tensor, x: Tensor, rows: Rows, group: int) -> None:
        """Add the adapters' part to the outputs of a group of sites, in place; base rows keep every bit.

            y = sigma * y + act(x A^T + inner) B^T + sum of x kron(w1, w2)^T + beta + deltas

        y:  [tokens, outputs of the group side by side]   fp32, bf16 or fp16; rows may be strided
        x:  [tokens, in_features]   the input as it was *before* sigma_in; rows may be strided
        """
        self._check(y, x, rows, group)
        self._apply(y, x, rows, group)
        hiddens: Hiddens = {}
        for site, kind in rows.deltas.get(group, ()):
            left = self._lefts[site]
            part = y[:, left : left + self.geometry.sites[site].out_features]
            if kind is Kind.SHARED:
                for each in self._banked(rows, site):
                    each.add(part, x, hiddens)
            elif kind is Kind.GATED:
                together, apart = self._alike(rows, kind, site)
                for rowset in together:
                    rowset.rows.add(part, alike.gated(x, rowset, self._stacks_of(rowset)))
                self._add_deltas(part, x, site, apart)
            else:
                self._add_deltas(part, x, site, self.carried(rows, kind, site))

    @abstractmethod
    def _apply(self, y: Tensor, x: Tensor, rows: Rows, group: int) -> None:
        """All of ``apply`` but the deltas; the tensors fit."""

    def _add_deltas(self, y: Tensor, x: Tensor, site: int, carried: Sequence[Carried]) -> None:
        """Add deltas of one kind at a site, each in its rows of y [tokens, out] and x [tokens, in]."""
        for each in carried:
            parts.add_delta(y[each.rows], x[each.rows], each)

    def _banked(self, rows: Rows, site: int) -> list[Banked]:
        known = rows.banked.get(site)
        if known is None:
            # a device that multiplies a tall tile as fast as a short one gets one of the whole batch
            tile = TILE if self.arena.device.type == "cpu" else rows.tokens
            known = rows.banked[site] = banked(self.carried(rows, Kind.SHARED, site), rows.tokens, tile)
        return known

    def has(self, rows: Rows, kind: Kind, place: int) -> bool:
        """Whether any row's adapter has this record; known on the host, costs no device work."""
        return (kind, place) in rows.records

    def carried(self, rows: Rows, kind: Kind, place: int) -> list[Carried]:
        """The records of this kind at this place, with the rows that they are for."""
        known = rows.carried.get((kind, place))
        if known is None:
            found = rows.records.get((kind, place), ())
            known = [Carried(segment, record, self._pieces_of(segment.block, record)) for segment, record in found]
            rows.carried[kind, place] = known
        return known

    def _pieces_of(self, block: Block | None, record: Record) -> Pieces:
        assert block is not None
        if record.kind is Kind.SHARED:
            bank = block.banks[record.options[0]]
            return (*self._own_pieces_of(block, record), *self._own_pieces_of(bank, bank.directory.records[0]))
        return self._own_pieces_of(block, record)

    def _own_pieces_of(self, block: Block, record: Record) -> Pieces:
        known = self._pieces.setdefault(block.key, {})
        if record not in known:
            known[record] = tuple(None if p is None else self._views.piece(block.offset, p) for p in record.pieces)
        return known[record]

    def override_norm(self, out: Tensor, x: Tensor, rows: Rows, place: int, norm: Norm) -> None:
        """Norm with the adapters' weights and biases, in place, in the rows whose adapter has any.

        out, x:  [tokens, groups, d], what the frozen module made of what
        """
        if not self.has(rows, Kind.NORM, place):
            return
        together, apart = self._alike(rows, Kind.NORM, place)
        for each in together:
            each.rows.put(out, overridden(each.rows.take(x), norm, *self._stacks_of(each).vectors))
        for carried in apart:
            out[carried.rows] = overridden(x[carried.rows], norm, *carried.pieces).to(out.dtype)

    def touches_hidden(self, rows: Rows, place: int) -> bool:
        """Whether any row's adapter does something behind this sublayer."""
        return bool(rows.touched[self._hidden_group + place]) or self.has(rows, Kind.BOTTLENECK, place)

    def hidden(self, h: Tensor, x_res: Tensor | None, ln_x: Tensor | None, rows: Rows, place: int) -> None:
        """Add the adapters' part to a sublayer's output h [tokens, d], in place.

        x_res:  [tokens, d], the residual stream that h will be added to
        ln_x:   [tokens, d], the sublayer's input where a norm made it
        """
        before = h.clone() if self.has(rows, Kind.BOTTLENECK, place) else h
        group = self._hidden_group + place
        if rows.touched[group]:
            self.apply(h, self._tapped(h, x_res, ln_x, rows, group), rows, group)
        # both kinds at one place add up, each to what the sublayer made
        if self.has(rows, Kind.BOTTLENECK, place):
            together, apart = self._alike(rows, Kind.BOTTLENECK, place)
            for each in together:
                each.rows.add(h, alike.bottleneck(before, x_res, ln_x, each, self._stacks_of(each)))
            for carried in apart:
                own = carried.rows
                taken = before[own], None if x_res is None else x_res[own], None if ln_x is None else ln_x[own]
                h[own] = (h[own].float() + parts.bottleneck(*taken, carried)).to(h.dtype)

    def alike(self, carried: Sequence[Carried]) -> Iterator[tuple[Alike, Stacks]]:
        """Single rows with one record each, by the form of those, and their pieces one behind another."""
        together, apart = alike.split(carried, self.arena.device)
        assert not apart, "single rows with one record each"
        for each in together:
            yield each, self._stacks_of(each)

    def _alike(self, rows: Rows, kind: Kind, place: int) -> tuple[list[Alike], list[Carried]]:
        """Single rows by the form of their records, and the segments that are left."""
        known = rows.alike.get((kind, place))
        if known is None:
            known = rows.alike[kind, place] = alike.split(self.carried(rows, kind, place), self.arena.device)
        return known

    def _stacks_of(self, together: Alike) -> Stacks:
        return self._kept.get(together.key, together.blocks, together.stacks)

    def _tapped(self, h: Tensor, x_res: Tensor | None, ln_x: Tensor | None, rows: Rows, group: int) -> Tensor:
        """Each row's tap, as one tensor that shares nothing with h."""
        x = h.clone()
        for start, stop, tap in self._taps(rows, group):
            own = slice(start, stop)
            taken = h[own], None if x_res is None else x_res[own], None if ln_x is None else ln_x[own]
            x[own] = parts.tapped(tap, *taken)
        return x

    def _taps(self, rows: Rows, group: int) -> list[tuple[int, int, int]]:
        """Runs of rows (start, stop) with the same tap, but for those that read h itself."""
        known = rows.taps.get(group)
        if known is None:
            known, site = [], self.geometry.members[group].start
            for segment in rows.segments:
                assert segment.block is not None
                words = segment.block.directory.sites[site]
                tap, start = int(words[ACT]) >> TAP_SHIFT, segment.start
                if words[RANK] and tap:
                    if known and known[-1][1:] == (start, tap):
                        start = known.pop()[0]
                    known.append((start, segment.stop, tap))
            rows.taps[group] = known
        return known

    def prefix(self, rows: Rows, start: int, layer: int, heads: int, x: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Keys and values [heads, p, size] that the segment beginning at row ``start`` attends to first, or None.

        x:  [tokens, d], the attention's input, for prefixes with a gate
        """
        carried = self._at(rows, Kind.PREFIX, layer).get(start)
        return None if carried is None else parts.prefix(carried, heads, None if x is None else x[carried.rows])

    def prefixes(
        self, rows: Rows, starts: Sequence[int], layer: int, heads: int, x: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The same for single rows whose adapters' prefixes are alike: [heads, rows, p, size], or None."""
        known = self._at(rows, Kind.PREFIX, layer)
        carried = [known[start] for start in starts if start in known]
        assert len(carried) in (0, len(starts)), "rows with prefixes alike have them in the same layers"
        return parts.prefixes(carried, heads, x) if carried else None

    def _at(self, rows: Rows, kind: Kind, place: int) -> dict[int, Carried]:
        """The records of this kind at this place by the first row that they are for."""
        known = rows.by_start.get((kind, place))
        if known is None:
            known = {each.segment.start: each for each in self.carried(rows, kind, place)}
            rows.by_start[kind, place] = known
        return known

    def embed(self, out: Tensor, ids: Tensor, rows: Rows, soft: Sequence[SoftSpan]) -> None:
        """The adapters' part in the input embedding, in place: out [tokens, d] for token ids [tokens].

        soft:  rows that are no text: their id means nothing
        """
        changes = (parts.embed_rows, parts.embed_entries, parts.embed_pair)
        for kind, change in zip((Kind.EMBED_ROWS, Kind.EMBED_ENTRIES, Kind.EMBED_PAIR), changes, strict=True):
            for carried in self.carried(rows, kind, 0):
                change(out[carried.rows], ids[carried.rows], carried)
        for span in soft:
            record = next(r for r in span.block.directory.records if r.kind is Kind.SOFT)
            (table,) = self._pieces_of(span.block, record)
            assert table is not None
            out[span.start : span.stop] = table[span.first : span.first + span.stop - span.start].to(out.dtype)

    @abstractmethod
    def scale_input(self, x: Tensor, rows: Rows, site: int) -> Tensor:
        """A copy of x [tokens, in_features] in which rows with sigma_in at this site are multiplied by it."""

    def input_scaled(self, rows: Rows, site: int) -> tuple[tuple[int, int], ...]:
        """Row ranges whose adapter has sigma_in at this site; known on the host, costs no device work."""
        return rows.input_scaled(site)

    def touches(self, rows: Rows, group: int) -> bool:
        """Whether ``apply`` would change anything at this group; known on the host, costs no device work."""
        return bool(rows.touched[group])

    @property
    def working_set_bytes(self) -> int:
        """Bytes held beside the arena, in the form that this device computes fastest on."""
        return 0

    @property
    def working_set_misses(self) -> int:
        """Adapters, counted once per ``rows``, that did not fit the working set's budget and run slower."""
        return 0

    def forget(self, key: int) -> None:
        """The block that was loaded under this key is gone; nothing of it may be kept."""
        self._pieces.pop(key, None)
        self._kept.forget(key)

    def _check(self, y: Tensor | None, x: Tensor, rows: Rows, group: int) -> None:
        tall, wide = self._widths[group]
        if y is not None:
            self._check_one("y", y, rows.tokens, tall)
        self._check_one("x", x, rows.tokens, wide)

    def _check_one(self, name: str, tensor: Tensor, tokens: int, width: int) -> None:
        if tensor.shape != (tokens, width):
            raise BatchError(f"{name}: expected [{tokens}, {width}], got {list(tensor.shape)}")
        if tensor.dtype not in FACTOR_DTYPES:
            raise BatchError(f"{name}: expected fp32, bf16 or fp16, got {tensor.dtype}")
        if tensor.stride(1) != 1 and width > 1 and tokens:
            raise BatchError(f"{name}: expected columns side by side, got strides {tensor.stride()}")
        if tensor.device != self.arena.device:
            raise BatchError(f"{name}: expected a tensor on {self.arena.device}, got {tensor.device}")


def _starts(geometry: Geometry, members: range) -> list[int]:
    talls = [geometry.sites[site].out_features for site in members]
    return [sum(talls[:number]) for number in range(len(talls))]


def load(name: str, arena: Tensor, geometry: Geometry, working_set_bytes_max: int) -> Kernels:
    """The implementation called ``name``: ``torch``, ``triton``, or ``auto`` for the arena's device.

    working_set_bytes_max:  bytes that may be held beside the arena (only ``torch`` does)
    """
    if name not in NAMES:
        raise ValueError(f"kernels: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "auto":
        name = "triton" if arena.device.type == "cuda" else "torch"
    if name == "torch":
        from weft.kernels.twin import TorchKernels

        return TorchKernels(arena, geometry, working_set_bytes_max)
    try:
        import triton
    except ImportError:
        raise KernelsUnavailable("kernels=triton needs the triton package, which is not installed") from None
    if arena.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise KernelsUnavailable("kernels=triton needs a GPU (or TRITON_INTERPRET=1), got an arena on the CPU")
    from weft.kernels.device import TritonKernels

    return TritonKernels(arena, geometry)
