"""Turn a batch into tensors, run the backbone over it, and pick the new tokens. Holds keys, values and kernels."""

from collections import OrderedDict

import torch
from torch import Tensor

from weft.kernels.batch import Rows, Segment
from weft.kernels.dispatch import Kernels
from weft.server.backbone.model import Backbone
from weft.server.backbone.step import DecodeSpan, PagedKV, PrefillSpan, Step
from weft.server.engine.request import Request
from weft.server.engine.sampler import pick
from weft.server.engine.scheduler import Batch, Item

# steady decoding needs one entry for the body and one for the head; prompts passing through need a few more
ROWS_KEPT = 8


class Runner:
    """Runs one batch at a time on the backbone's device."""

    def __init__(self, backbone: Backbone, kernels: Kernels, kv: PagedKV, page_tokens: int):
        self._backbone = backbone
        self._kernels = kernels
        self._kv = kv
        self._page_tokens = page_tokens
        self._rows: OrderedDict[tuple[tuple[int, int, int, int], ...], Rows] = OrderedDict()
        self._table: tuple[tuple[Request, ...], Tensor] | None = None

    def run(self, batch: Batch) -> list[int | None]:
        """One token per sampling item, in the batch's order; None where the logits were not finite."""
        starts, ids, positions, slots = self._layout(batch)
        sampling = [
            (item, start + item.count - 1) for item, start in zip(batch.items, starts, strict=True) if item.samples
        ]
        step = Step(
            kv=self._kv,
            write_slots=self._tensor(slots),
            decode=self._decode_span(batch, starts),
            prefill=self._prefill_spans(batch, starts),
            kernels=self._kernels,
            rows=self._adapter_rows([(item, item.count) for item in batch.items]),
            head_rows=self._adapter_rows([(item, 1) for item, _ in sampling]),
        )
        keep = self._tensor([row for _, row in sampling])
        logits = self._backbone.forward(self._tensor(ids), self._tensor(positions), keep, step)
        requests = [item.request for item, _ in sampling]
        return pick(logits, [r.submit.sampling for r in requests], [r.length for r in requests])

    def forget(self, key: int) -> None:
        """The block loaded under this key is gone, or moved."""
        self._kernels.forget(key)
        for kept in [kept for kept in self._rows if any(part[2] == key for part in kept)]:
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
            request, pages = item.request, item.request.pages
            for position in range(item.start, item.start + item.count):
                ids.append(request.token(position))
                positions.append(position)
                slots.append(pages[position // size] * size + position % size)
        return starts, ids, positions, slots

    def _decode_span(self, batch: Batch, starts: list[int]) -> DecodeSpan | None:
        picked = [(item, start) for item, start in zip(batch.items, starts, strict=True) if item.count == 1]
        if not picked:
            return None
        table = self._slot_table(tuple(item.request for item, _ in picked))
        lengths = self._tensor([item.start + 1 for item, _ in picked])
        context = max(item.start + 1 for item, _ in picked)
        hidden = torch.arange(context, device=table.device) >= lengths[:, None]
        slots = table[:, :context].masked_fill(hidden, 0).flatten()
        rows = None if len(picked) == batch.tokens else self._tensor([start for _, start in picked])
        return DecodeSpan(rows, slots, lengths, hidden)

    def _prefill_spans(self, batch: Batch, starts: list[int]) -> tuple[PrefillSpan, ...]:
        spans = []
        for item, start in zip(batch.items, starts, strict=True):
            if item.count > 1:
                assert item.request.slots is not None
                known = item.request.slots[: item.start + item.count].to(self._backbone.device)
                spans.append(PrefillSpan(start, start + item.count, known))
        return tuple(spans)

    def _slot_table(self, requests: tuple[Request, ...]) -> Tensor:
        """[requests, longest] KV slots of all positions each request may reach; kept while membership lasts."""
        if self._table is None or self._table[0] != requests:
            slots = [request.slots for request in requests if request.slots is not None]
            padded = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True)
            self._table = (requests, padded.to(self._backbone.device))
        return self._table[1]

    def _adapter_rows(self, parts: list[tuple[Item, int]]) -> Rows | None:
        """The kernels' view of which rows carry which block; the same object while nothing changes."""
        segments: list[Segment] = []
        start = 0
        for item, count in parts:
            lease = item.request.lease
            segments.append(Segment(start, start + count, None if lease is None else lease.block))
            start += count
        if all(segment.block is None for segment in segments):
            return None
        key = tuple(
            (
                s.start,
                s.stop,
                -1 if s.block is None else s.block.key,
                -1 if s.block is None else s.block.offset,
            )
            for s in segments
        )
        rows = self._rows.pop(key, None)
        if rows is None:
            rows = self._kernels.rows(segments)
        self._rows[key] = rows
        if len(self._rows) > ROWS_KEPT:
            self._rows.popitem(last=False)
        return rows

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._backbone.device, non_blocking=True)
