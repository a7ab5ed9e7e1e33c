"""The arena's books: blocks never overlap, holes join, and moves keep every byte."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weft.adapters_store import arena as module
from weft.adapters_store.arena import Arena, Move, copy_overlapping
from weft.kernels.layout import ALIGN

UNITS = 32


class Books(RuleBasedStateMachine):
    """Any order of allocations, frees and compactions, beside a list of what must be where."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(UNITS * ALIGN + 100, "cpu")
        self.held: dict[int, tuple[int, int]] = {}
        self.next = 1

    def fill(self, offset: int, nbytes: int) -> None:
        self.arena.buffer[offset : offset + nbytes].fill_(self.next)
        self.held[offset] = (nbytes, self.next)
        self.next = self.next % 250 + 1

    @rule(nbytes=st.integers(1, 9 * ALIGN))
    def allocate(self, nbytes: int) -> None:
        offset = self.arena.allocate(nbytes)
        if offset is None:
            largest = self.arena.room_bytes([])
            assert largest < nbytes
            return
        assert offset % ALIGN == 0
        self.fill(offset, nbytes)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[offset]
        self.arena.free(offset)

    @rule(nbytes=st.integers(1, UNITS * ALIGN), data=st.data())
    def compact(self, nbytes: int, data: st.DataObject) -> None:
        movable = [offset for offset in self.held if data.draw(st.booleans())]
        fixed = [offset for offset in self.held if offset not in movable]
        plan = self.arena.plan_hole(nbytes, movable)
        if plan is None:
            return
        for move in plan:
            assert move.source in movable
            self.arena.move(move)
            copy_overlapping(self.arena.buffer, move)
            self.held[move.target] = self.held.pop(move.source)
        assert all(offset in self.held for offset in fixed)
        offset = self.arena.allocate(nbytes)
        assert offset is not None
        self.fill(offset, nbytes)

    @invariant()
    def books_are_right(self) -> None:
        self.arena.check()
        at = 0
        for offset in sorted(self.held):
            nbytes, value = self.held[offset]
            assert offset >= at
            at = offset + nbytes
            assert bool((self.arena.buffer[offset : offset + nbytes] == value).all())
        assert at <= self.arena.nbytes
        assert self.arena.used_bytes + self.arena.free_bytes == self.arena.nbytes


Books.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestBooks = Books.TestCase


def allocate(arena: Arena, *sizes: int) -> list[int]:
    """Blocks of these sizes, in units of ALIGN, one behind the other."""
    offsets = []
    for size in sizes:
        offset = arena.allocate(size * ALIGN)
        assert offset is not None
        offsets.append(offset)
    return offsets


def test_an_allocation_takes_the_smallest_hole_that_is_large_enough():
    arena = Arena(10 * ALIGN, "cpu")
    blocks = allocate(arena, 3, 1, 2, 1, 3)
    assert arena.allocate(1) is None
    for i in (0, 2, 4):
        arena.free(blocks[i])
    assert arena.allocate(2 * ALIGN) == blocks[2]
    assert arena.allocate(1) == blocks[0]


def test_freed_neighbours_become_one_hole():
    arena = Arena(3 * ALIGN, "cpu")
    first, second, third = allocate(arena, 1, 1, 1)
    for offset in (first, third, second):
        arena.free(offset)
    assert arena.allocate(3 * ALIGN) == 0


def test_an_arena_of_nothing_fits_nothing():
    arena = Arena(ALIGN - 1, "cpu")
    assert arena.nbytes == 0
    assert arena.allocate(1) is None
    arena.check()


def test_the_cheapest_compaction_is_chosen():
    arena = Arena(12 * ALIGN, "cpu")
    blocks = allocate(arena, 1, 3, 1, 1, 1, 1, 4)
    for i in (0, 2, 5):
        arena.free(blocks[i])
    # holes of one at 0, 4 and 7: between the first two lies a block of three, between the last two lie two of one
    movable = [blocks[1], blocks[3], blocks[4]]
    assert arena.plan_hole(2 * ALIGN, movable) == [
        Move(5 * ALIGN, 4 * ALIGN, ALIGN),
        Move(6 * ALIGN, 5 * ALIGN, ALIGN),
    ]
    assert arena.plan_hole(2 * ALIGN, [blocks[1]]) == [Move(ALIGN, 0, 3 * ALIGN)]
    assert len(arena.plan_hole(3 * ALIGN, movable) or []) == 3
    assert arena.plan_hole(4 * ALIGN, movable) is None
    assert arena.plan_hole(2 * ALIGN, [blocks[3]]) is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_a_move_keeps_every_byte_however_it_overlaps(source, target, nbytes):
    buffer = torch.arange(100, dtype=torch.uint8)
    wanted = buffer[source : source + nbytes].clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOVE_CHUNK_BYTES", 7)
        copy_overlapping(buffer, Move(source, target, nbytes))
    assert torch.equal(buffer[target : target + nbytes], wanted)
