"""The one buffer that adapters live in: who has which bytes of it. Knows sizes, not adapters.

Blocks are contiguous and begin at multiples of ALIGN. Allocation takes the smallest hole that is large enough;
freeing joins a hole with its neighbours. When free bytes are enough but lie scattered, ``plan_hole`` says which blocks
to slide together, of those that may move.
"""

from bisect import bisect_left, insort
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.layout import ALIGN, round_up

MOVE_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Move:
    """Copy a block of ``nbytes`` from ``source`` to ``target``; the two may overlap."""

    source: int
    target: int
    nbytes: int


class Arena:
    """``buffer`` [nbytes] uint8 on the device, and the books on it. One thread keeps the books.

    nbytes:  rounded down to whole ALIGN; 0 is an arena that nothing fits
    """

    def __init__(self, nbytes: int, device: torch.device | str) -> None:
        self.nbytes = nbytes // ALIGN * ALIGN
        # zeros, not empty: bytes that nobody wrote must not look like numbers that are not
        self.buffer: Tensor = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        self._used: dict[int, int] = {}
        self._holes: list[tuple[int, int]] = [(0, self.nbytes)] if self.nbytes else []
        self.used_bytes = 0

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._used)

    @property
    def free_bytes(self) -> int:
        """Bytes in holes, together."""
        return self.nbytes - self.used_bytes

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a new block, or None if no hole is large enough."""
        size = _size(nbytes)
        fitting = [(stop - start, start) for start, stop in self._holes if stop - start >= size]
        if not fitting:
            return None
        _, start = min(fitting)
        self._take(start, size)
        return start

    def free(self, offset: int) -> None:
        """Give a block back."""
        size = self._used.pop(offset)
        self.used_bytes -= size
        start, stop = offset, offset + size
        at = bisect_left(self._holes, (start, stop))
        if at < len(self._holes) and self._holes[at][0] == stop:
            stop = self._holes.pop(at)[1]
        if at > 0 and self._holes[at - 1][1] == start:
            start = self._holes.pop(at - 1)[0]
        insort(self._holes, (start, stop))

    def room_bytes(self, leaving: Collection[int]) -> int:
        """The largest hole there would be if these blocks were freed."""
        largest, at, gone = 0, 0, set(leaving)
        for offset in sorted(self._used):
            if offset not in gone:
                largest = max(largest, offset - at)
                at = offset + self._used[offset]
        return max(largest, self.nbytes - at)

    def plan_hole(self, nbytes: int, movable: Collection[int]) -> list[Move] | None:
        """The cheapest moves that join neighbouring holes to one of this size, in the order to make them; None if
        none can.

        movable:  offsets of blocks that may be moved. The plan is not carried out: see ``move``.
        """
        size, free, used = _size(nbytes), set(movable), sorted(self._used)
        best: tuple[int, int, list[int]] | None = None
        for first, (target, _) in enumerate(self._holes):
            room, cost, between = 0, 0, list[int]()
            for before, (start, stop) in zip([None, *self._holes[first:]], self._holes[first:], strict=False):
                if before is not None:
                    passed = used[bisect_left(used, before[1]) : bisect_left(used, start)]
                    if not free.issuperset(passed):
                        break
                    between += passed
                    cost += start - before[1]
                room += stop - start
                if room >= size:
                    if best is None or cost < best[0]:
                        best = (cost, target, between)
                    break
        return None if best is None else self._slide(*best[1:])

    def move(self, move: Move) -> None:
        """Note that a block lies elsewhere now. ``copy_overlapping`` moves its bytes."""
        assert self._used[move.source] == move.nbytes, "a move is of a whole block"
        self.free(move.source)
        self._take(move.target, move.nbytes)

    def check(self) -> None:
        """Raise AssertionError unless blocks and holes tile the buffer, and no two holes touch."""
        pieces = sorted([(o, o + n, True) for o, n in self._used.items()] + [(a, b, False) for a, b in self._holes])
        at, hole_before = 0, False
        for start, stop, used in pieces:
            assert start == at, f"expected a piece at {at}, got {start}"
            assert stop > start, "pieces are not empty"
            assert start % ALIGN == 0, f"{start} is not aligned"
            assert used or not hole_before, "two holes touch"
            at, hole_before = stop, not used
        assert at == self.nbytes, f"pieces end at {at} of {self.nbytes}"
        assert self.used_bytes == sum(self._used.values()), "used_bytes is off"

    def _take(self, start: int, size: int) -> None:
        at = next(i for i, (a, b) in enumerate(self._holes) if a <= start and start + size <= b)
        a, b = self._holes.pop(at)
        for hole in ((a, start), (start + size, b)):
            if hole[0] < hole[1]:
                insort(self._holes, hole)
        self._used[start] = size
        self.used_bytes += size

    def _slide(self, target: int, offsets: list[int]) -> list[Move]:
        """Put these neighbours side by side, beginning at ``target``."""
        moves = []
        for offset in offsets:
            moves.append(Move(offset, target, self._used[offset]))
            target += self._used[offset]
        return moves


def copy_overlapping(buffer: Tensor, move: Move) -> None:
    """Carry out a move on the bytes. Chunks go through memory of their own, in the order in which none is lost."""
    starts = range(0, move.nbytes, MOVE_CHUNK_BYTES)
    for at in starts if move.target < move.source else reversed(starts):
        stop = min(at + MOVE_CHUNK_BYTES, move.nbytes)
        chunk = buffer[move.source + at : move.source + stop].clone()
        buffer[move.target + at : move.target + stop].copy_(chunk)


def _size(nbytes: int) -> int:
    return max(ALIGN, round_up(nbytes, ALIGN))
