"""Turn a batch into tensors, run the backbone over it, and pick the new tokens. Holds keys, values and kernels."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from weft.kernels.batch import Block, Rows, Segment, SoftSpan
from weft.kernels.dispatch import Kernels
from weft.kernels.extras import Kind
from weft.server.backbone.model import Backbone
from weft.server.backbone.step import DecodeSpan, PagedKV, PrefillSpan, SideSpan, Step, padded_context
from weft.server.engine.request import Request
from weft.server.engine.sampler import pick
from weft.server.engine.scheduler import Batch, Item

# steady decoding needs one entry for the body and one for the head; prompts passing through need a few more
ROWS_KEPT = 8

# a prefix's records as (layer, options, shapes); with the context that sequences are padded to, which attend together
Prefixes = tuple[tuple[int, tuple[int, ...], tuple[tuple[int, int] | None, ...]], ...]
Alike = tuple[int, Prefixes]
# rows of a request of which the first are the base's, all of them, and the block of the others: the same while in use
Acting = tuple[int, int, Block | None]


class Runner:
    """Runs one batch at a time on the backbone's device."""

    def __init__(self, backbone: Backbone, kernels: Kernels, kv: PagedKV, page_tokens: int):
        self._backbone = backbone
        self._kernels = kernels
        self._kv = kv
        self._page_tokens = page_tokens
        self._rows: OrderedDict[tuple[Acting, ...], Rows] = OrderedDict()
        self._tables: tuple[dict[Alike, list[Request]], list[Tensor]] = ({}, [])

    def run(self, batch: Batch) -> list[int | None]:
        """One token per sampling item, in the batch's order; None where the logits were not finite."""
        starts, ids, positions, slots = self._layout(batch)
        sampling = [
            (item, start + item.count - 1) for item, start in zip(batch.items, starts, strict=True) if item.samples
        ]
        step = Step(
            kv=self._kv,
            write_slots=self._tensor(slots),
            decode=self._decode_spans(batch, starts),
            prefill=self._prefill_spans(batch, starts),
            kernels=self._kernels,
            rows=self._adapter_rows([(item, item.start, item.count) for item in batch.items]),
            head_rows=self._adapter_rows([(item, item.start + item.count - 1, 1) for item, _ in sampling]),
            soft=_soft_spans(batch, starts),
            side=self._side_spans(batch, starts),
        )
        keep = self._tensor([row for _, row in sampling])
        logits = self._backbone.forward(self._tensor(ids), self._tensor(positions), keep, step)
        assert len(logits) == len(sampling), "the model keeps the logits it is asked for"
        requests = [item.request for item, _ in sampling]
        return pick(logits, [r.submit.sampling for r in requests], [r.length for r in requests])

    def forget(self, key: int) -> None:
        """The block loaded under this key is gone, or moved."""
        self._kernels.forget(key)
        for kept in [kept for kept in self._rows if any(key in _keys(block) for _, _, block in kept)]:
            del self._rows[kept]

    def _layout(self, batch: Batch) -> tuple[list[int], list[int], list[int], list[int]]:
        """First row of each item, and per row its token id, position and KV slot."""
        starts: list[int] = []
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        size = self._page_tokens
        for item in batch.items:
            starts.append(len(ids))
            request, pages, shift = item.request, item.request.pages, item.request.traits.position_offset
            for index in range(item.start, item.start + item.count):
                ids.append(request.token(index))
                positions.append(index + shift)
                slots.append(pages[index // size] * size + index % size)
        return starts, ids, positions, slots

    def _decode_spans(self, batch: Batch, starts: list[int]) -> tuple[DecodeSpan, ...]:
        """Single tokens, by the context that their sequences are padded to: a long one costs no short one."""
        alike: dict[Alike, list[tuple[Item, int]]] = {}
        for item, start in zip(batch.items, starts, strict=True):
            if item.count == 1:
                alike.setdefault((padded_context(item.start + 1), _prefixes(item)), []).append((item, start))
        tables = self._slot_tables({key: [item.request for item, _ in same] for key, same in alike.items()})
        spans = []
        for ((context, prefixes), same), table in zip(alike.items(), tables, strict=True):
            lengths = self._tensor([item.start + 1 for item, _ in same])
            padding = torch.arange(context, device=table.device) >= lengths[:, None]
            rows = None if len(same) == batch.tokens else self._tensor([start for _, start in same])
            prefixed = tuple(start for _, start in same) if prefixes else ()
            shifted = same[0][0].request.traits.position_offset > 0
            slots = table.masked_fill(padding, 0).flatten()
            spans.append(DecodeSpan(rows, slots, lengths, padding, prefixed, shifted))
        return tuple(spans)

    def _prefill_spans(self, batch: Batch, starts: list[int]) -> tuple[PrefillSpan, ...]:
        spans = []
        for item, start in zip(batch.items, starts, strict=True):
            if item.count > 1:
                assert item.request.slots is not None
                known = item.request.slots[: item.start + item.count].to(self._backbone.device)
                shifted = item.request.traits.position_offset > 0
                spans.append(PrefillSpan(start, start + item.count, known, bool(_prefixes(item)), shifted))
        return tuple(spans)

    def _side_spans(self, batch: Batch, starts: list[int]) -> tuple[SideSpan, ...]:
        """Where side networks keep the keys and values of their tokens: in slots behind those of the request."""
        spans = []
        for item, start in zip(batch.items, starts, strict=True):
            request, reduction = item.request, item.request.traits.side_reduction
            if reduction:
                assert request.slots is not None
                index = torch.arange(item.start + item.count)
                slots = request.slots[request.length_max + index // reduction] * reduction + index % reduction
                first = item.start + request.traits.position_offset
                spans.append(SideSpan(start, start + item.count, slots.to(self._backbone.device), first))
        return tuple(spans)

    def _slot_tables(self, alike: dict[Alike, list[Request]]) -> list[Tensor]:
        """Per kind of sequence, [requests, context] KV slots; kept while the same requests stand together."""
        if self._tables[0] != alike:
            tables = []
            for (context, _), requests in alike.items():
                table = torch.zeros(len(requests), context, dtype=torch.int64)
                for row, request in zip(table, requests, strict=True):
                    assert request.slots is not None
                    known = request.slots[:context]
                    row[: known.numel()] = known
                tables.append(table.to(self._backbone.device))
            self._tables = (alike, tables)
        return self._tables[1]

    def _adapter_rows(self, parts: list[tuple[Item, int, int]]) -> Rows | None:
        """The kernels' view of which rows carry which block; the same object while nothing changes.

        parts:  items, the first of their tokens that is meant, and how many are
        """
        key = tuple(_acting(*part) for part in parts)
        if all(block is None for _, _, block in key):
            return None
        rows = self._rows.pop(key, None)
        if rows is None:
            rows = self._kernels.rows(_segments(key))
        self._rows[key] = rows
        if len(self._rows) > ROWS_KEPT:
            self._rows.popitem(last=False)
        return rows

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._backbone.device, non_blocking=True)


def _keys(block: Block | None) -> tuple[int, ...]:
    """Of a block and the banks that it refers to."""
    return () if block is None else (block.key, *(bank.key for bank in block.banks))


def _acting(item: Item, first: int, count: int) -> Acting:
    """How many of an item's tokens stand in front of where its adapter begins to act, how many there are, its block."""
    idle = min(max(item.request.acts_from - first, 0), count)
    return (idle, count, item.block) if idle < count else (0, count, None)


def _segments(key: Sequence[Acting]) -> list[Segment]:
    segments: list[Segment] = []
    start = 0
    for idle, count, block in key:
        # tokens in front of where the adapter begins to act are rows of the base
        if idle:
            segments.append(Segment(start, start + idle, None))
        segments.append(Segment(start + idle, start + count, block))
        start += count
    return segments


def _prefixes(item: Item) -> Prefixes:
    """By layer, the form of the keys and values that the item's adapter brings, if its first token has them."""
    if item.block is None or item.request.acts_from > item.start or Kind.PREFIX not in item.block.directory.kinds:
        return ()
    records = (record for record in item.block.directory.records if record.kind is Kind.PREFIX)
    return tuple((r.place, r.options, tuple(p and (p.rows, p.columns) for p in r.pieces)) for r in records)


def _soft_spans(batch: Batch, starts: list[int]) -> tuple[SoftSpan, ...]:
    """Rows of the step that are an adapter's and no text's."""
    spans = []
    for item, start in zip(batch.items, starts, strict=True):
        count = min(item.request.traits.extra_rows - item.start, item.count)
        if count > 0:
            assert item.block is not None
            spans.append(SoftSpan(start, start + count, item.start, item.block))
    return tuple(spans)
