"""What a scheduler must know of an adapter, read from the head of its block; nothing else of it reaches the engine."""

from weft.adapters_store.report import Traits
from weft.kernels.extras import Kind, Record
from weft.kernels.layout import Directory

# where the gate's weight stands among a record's pieces
_GATE = {Kind.GATED: 2, Kind.PREFIX: 2, Kind.BOTTLENECK: 2}


def traits_of(head: Directory) -> Traits:
    """The traits of the adapter with this directory."""
    first = {record.kind: record for record in head.records}
    soft, prefix, mask = first.get(Kind.SOFT), first.get(Kind.PREFIX), first.get(Kind.MASK)
    rows = 0 if soft is None or soft.pieces[0] is None else soft.pieces[0].rows
    shifts = 0 if prefix is None else prefix.options[0] * prefix.options[1]
    gated = any(_gated(record) for record in head.records)
    side = first.get(Kind.SIDE)
    reduction = 0 if side is None else side.options[0]
    # the network beside the backbone has read the whole prompt too
    cacheable = not gated and side is None
    return Traits(rows, shifts, gated, cacheable, () if mask is None else mask.options, reduction)


def _gated(record: Record) -> bool:
    at = _GATE.get(record.kind)
    return at is not None and record.pieces[at] is not None
