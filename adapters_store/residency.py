"""Which adapters are in the arena: acquired and released by the engine, compiled and loaded by threads of their own.

One thread keeps every book here and never waits; the loader only moves bytes. Who is in use, or is being written, never
moves and never leaves. Of the rest the least recently used leaves first.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from math import inf
from pathlib import Path

import torch

from weft.adapters_store.arena import Arena, Move
from weft.adapters_store.banks import shared_digests
from weft.adapters_store.composition import Members, Source
from weft.adapters_store.errors import AdapterCorrupt, AdapterTooLarge
from weft.adapters_store.leases import Lease, PrepareResult, ResidencyStats
from weft.adapters_store.loader import Done, Loader, LoadJob, MakeJob, MoveJob, PrepareJob, RemoveJob, SizeJob
from weft.adapters_store.sites import SiteCatalogue
from weft.adapters_store.versions import State, Version
from weft.kernels.batch import Block
from weft.kernels.layout import Directory, Geometry

# whoever waits asks again at every step; a block or an error that nobody asked for by then is nobody's
CLAIM_POLLS = 3
ERROR_S = 1.0
# callers make up derived versions at will: of those that nobody asks for, as many are kept as a step has requests by
# default, and no more bytes of images than the arena could hold
COMPOSED_IDLE_MAX = 256


class Residency:
    """Adapters between disk and arena, for one backbone.

    root:      of the store; only ``objects`` is read and only ``images`` and ``staging`` are written
    geometry:  of the backbone; its dtype is the one that is served
    on_evict:  told the key of every block that is gone or has moved
    """

    def __init__(
        self,
        root: Path,
        catalogue: SiteCatalogue,
        geometry: Geometry,
        arena: Arena,
        on_evict: Callable[[int], None],
    ) -> None:
        self._arena, self._on_evict = arena, on_evict
        self._loader = Loader(root, catalogue, geometry, arena.buffer, arena.nbytes)
        self._versions: dict[str, Version] = {}
        # residents that nobody uses, the least recently used first
        self._idle: dict[str, Version] = {}
        # derived versions, those asked for least recently first
        self._composed: dict[str, Version] = {}
        # what several adapters refer to
        self._banks: dict[str, Version] = {}
        # versions without a name that are still in use or under way
        self._forgotten: set[str] = set()
        self._keys = itertools.count(1)
        self._polls = 0
        # no block of this size or above finds room until something changes
        self._no_room_bytes: float = inf
        self._claims_until = 0
        self._loads, self._evictions = 0, 0
        self._load_s: list[float] = []

    def prepare(self, digest: str) -> None:
        """Validate and compile a version on the loader; ``poll`` brings the result."""
        self._forgotten.discard(digest)
        self._loader.submit(PrepareJob(digest))

    def acquire(self, digest: str, members: Members = (), source: Source | None = None) -> Lease | None:
        """A lease, or None while the adapter is being loaded or has to wait for room: ask again at the next step.

        members:  of a derived version, whose digest it is
        source:   of a bank: the version that refers to it, and the members of that
        AdapterTooLarge if it can never fit; AdapterCorrupt, AdapterIncompatible, StoreIOError if it cannot be loaded;
        AdapterInvalid if members do not go together.
        """
        version = self._versions.setdefault(digest, Version(digest, members, source))
        if source is not None:
            # the one before may have lost its files since
            version.source, self._banks[digest] = source, version
            self._forgotten.discard(digest)
        if members:
            self._composed.pop(digest, None)
            self._composed[digest], version.asked = version, self._polls
        if version.error is not None and version.blamed == source and time.monotonic() < version.until:
            raise version.error
        if version.state is State.ABSENT:
            self._bring(version)
        if version.state is not State.RESIDENT:
            return None
        assert version.block is not None
        banks = self._acquire_banks(version)
        if banks is None:
            return None
        version.unclaimed = 0
        version.uses += 1
        self._idle.pop(digest, None)
        block = replace(version.block, banks=tuple(bank.block for bank in banks)) if banks else version.block
        return Lease(digest, block, banks)

    def _acquire_banks(self, version: Version) -> tuple[Lease, ...] | None:
        """Leases on all that a version refers to, or None while any is not there."""
        with ExitStack() as unless_all:
            held: list[Lease] = []
            for digest in version.banks:
                lease = self.acquire(digest, source=(version.digest, version.members))
                if lease is None:
                    # it stays for as long as somebody asks
                    version.unclaimed = self._claims_until = self._polls + CLAIM_POLLS
                    return None
                held.append(lease)
                unless_all.callback(self.release, lease)
            unless_all.pop_all()
        return tuple(held)

    def lacks_room(self, digest: str) -> bool:
        """Whether what ``acquire`` just returned None for waits for room, and not for the loader."""
        version = self._versions[digest]
        if version.state is State.RESIDENT:
            return any(self.lacks_room(bank) for bank in version.banks if bank in self._versions)
        return version.state is State.ABSENT

    def release(self, lease: Lease) -> None:
        """End a use. The block stays until its room is needed, or leaves at once if the version was forgotten."""
        version = self._versions[lease.digest]
        assert version.uses > 0, "release without acquire"
        version.uses -= 1
        for bank in lease.banks:
            self.release(bank)
        if not version.uses:
            self._idle[lease.digest] = version
            self._no_room_bytes = inf
            self._drop_forgotten()

    def forget(self, digest: str) -> None:
        """The version has no name any more: its block leaves when nobody uses it, and its image is deleted.

        So does every version derived from it. Requests that still hold its digest may acquire it as long as its files
        are in the store.
        """
        derived = [v.digest for v in self._composed.values() if any(member == digest for member, _ in v.members)]
        self._forgotten.update(derived)
        if digest in self._versions:
            self._forgotten.add(digest)
        else:
            self._loader.submit(RemoveJob(digest))
        self._drop_forgotten()

    def poll(self) -> list[PrepareResult]:
        """Take in what the loader has done. Call at every step."""
        self._polls += 1
        if self._polls <= self._claims_until:
            self._no_room_bytes = inf
        prepared: list[PrepareResult] = []
        for done in self._loader.take():
            match done.job:
                case PrepareJob(digest):
                    self._prepared(digest, done)
                    prepared.append(PrepareResult(digest, done.report, done.error))
                case SizeJob(digest) | MakeJob(digest):
                    self._sized(self._versions[digest], done)
                case MoveJob(digest):
                    self._moved(self._versions[digest], done)
                case LoadJob(digest):
                    self._loaded(self._versions[digest], done)
                case RemoveJob(digest):
                    # an image that could not be deleted costs disk only, and goes when the store is opened next
                    self._removed(digest)
        self._forget_composed()
        self._drop_forgotten()
        return prepared

    def busy(self) -> bool:
        """Whether the loader has work, or results that ``poll`` has not seen."""
        return self._loader.busy

    def stats(self) -> ResidencyStats:
        """Figures for one engine step; counters start again."""
        composed, shared = (
            [version.nbytes for version in known.values() if version.offset >= 0]
            for known in (self._composed, self._banks)
        )
        stats = ResidencyStats(
            self._arena.used_bytes - sum(composed) - sum(shared),
            self._arena.blocks - len(composed) - len(shared),
            sum(composed),
            sum(shared),
            self._loads,
            self._evictions,
            tuple(self._load_s),
        )
        self._loads, self._evictions, self._load_s = 0, 0, []
        return stats

    def close(self) -> None:
        """Stop the loader after the job under way."""
        self._loader.close()

    def check(self) -> None:
        """Raise AssertionError unless versions and arena agree."""
        self._arena.check()
        placed = {v.offset: v for v in self._versions.values() if v.offset >= 0}
        assert sum(v.nbytes for v in placed.values()) == self._arena.used_bytes, "a block is nobody's"
        derived = {v.digest for v in self._versions.values() if v.members}
        assert derived == set(self._composed), "derived versions are known as such"
        for version in self._versions.values():
            resident = version.state is State.RESIDENT
            assert (version.block is not None) == resident, "resident means that there is a block"
            assert (version.offset >= 0) == (resident or version.state is State.WRITING), "place and state disagree"
            assert resident or not version.uses, "only residents are used"
            assert (version.digest in self._idle) == (resident and not version.uses), "idle is resident and unused"
            if version.block is not None:
                assert version.block.offset == version.offset, "the block is elsewhere"

    def _bring(self, version: Version) -> None:
        if not version.nbytes:
            version.state = State.SIZING
            self._loader.submit(SizeJob(version.digest, version.members))
            return
        if version.nbytes > self._arena.nbytes:
            wanted = f"a block of at most {self._arena.nbytes} bytes"
            raise AdapterTooLarge(f"device memory: expected {wanted}, got one of {version.nbytes}")
        offset = self._make_room(version.nbytes)
        if offset is not None:
            version.offset, version.state = offset, State.WRITING
            self._loader.submit(LoadJob(version.digest, offset, version.nbytes, self._ready(), version.members))

    def _make(self, version: Version, anew: bool) -> None:
        """Have the image made that is not there, or is damaged."""
        version.state = State.SIZING
        self._loader.submit(MakeJob(version.digest, version.members, version.source, anew))

    def _ready(self) -> "torch.cuda.Event | None":
        """When whatever still reads the bytes that may be written from now on has done so."""
        buffer = self._arena.buffer
        return torch.cuda.current_stream(buffer.device).record_event() if buffer.is_cuda else None

    def _make_room(self, nbytes: int) -> int | None:
        """Where a block of this size can go once the moves given to the loader are made; None if it has to wait."""
        offset = self._arena.allocate(nbytes)
        if offset is not None:
            return offset
        if nbytes >= self._no_room_bytes:
            return None
        idle = [version for version in self._idle.values() if self._may_leave(version)]
        if self._arena.room_bytes([version.offset for version in idle]) < nbytes:
            self._no_room_bytes = nbytes
            return None
        while (offset := self._arena.allocate(nbytes)) is None:
            if self._arena.free_bytes >= nbytes:
                moves = self._arena.plan_hole(nbytes, [v.offset for v in idle])
                if moves is not None:
                    self._move(moves)
                    found = self._arena.allocate(nbytes)
                    assert found is not None, "the plan makes a hole"
                    return found
            self._evict(idle.pop(0))
        return offset

    def _may_leave(self, version: Version) -> bool:
        return version.digest in self._idle and version.unclaimed <= self._polls

    def _move(self, moves: list[Move]) -> None:
        at = {v.offset: v for v in self._versions.values() if v.offset >= 0}
        ready = self._ready()
        for move in moves:
            version = at[move.source]
            self._arena.move(move)
            self._hide(version)
            version.offset, version.state = move.target, State.WRITING
            self._loader.submit(MoveJob(version.digest, move, ready))

    def _evict(self, version: Version) -> None:
        """Give the block's room back; the version can be loaded again."""
        self._hide(version)
        self._leave(version)
        self._evictions += 1

    def _leave(self, version: Version) -> None:
        self._arena.free(version.offset)
        version.offset, version.directory, version.state = -1, None, State.ABSENT

    def _hide(self, version: Version) -> None:
        """Whatever was remembered of the block was about the place where it no longer is."""
        assert version.block is not None
        self._on_evict(version.block.key)
        version.block, version.unclaimed = None, 0
        del self._idle[version.digest]

    def _show(self, version: Version, directory: Directory) -> None:
        version.directory, version.state = directory, State.RESIDENT
        version.block = Block(next(self._keys), version.offset, version.nbytes, directory)
        self._idle[version.digest] = version

    def _drop_forgotten(self) -> None:
        """Of a version that nobody names or uses nothing stays: no block, no image, no memory of it."""
        for digest in tuple(self._forgotten):
            version = self._versions[digest]
            if self._may_leave(version):
                self._evict(version)
            if version.state is State.ABSENT:
                self._loader.submit(RemoveJob(digest, version.members))
                self._discard(version)

    def _removed(self, digest: str) -> None:
        """The image is gone; a version that was prepared before it went, and is not there, is nobody's either."""
        version = self._versions.get(digest)
        if version is not None and version.state is State.ABSENT:
            self._discard(version)

    def _discard(self, version: Version) -> None:
        """Remember nothing of a version, nor of banks that no other one refers to: whoever comes makes them again."""
        for known in (self._versions, self._composed, self._banks):
            known.pop(version.digest, None)
        self._forgotten.discard(version.digest)
        kept = {bank for each in self._versions.values() for bank in each.banks}
        for bank in version.banks:
            if bank in self._versions and bank not in kept:
                self._forgotten.add(bank)
            elif bank not in kept:
                self._loader.submit(RemoveJob(bank))

    def _forget_composed(self) -> None:
        """Forget the derived versions that were asked for least recently, down to what is worth keeping."""
        known = self._composed.values()
        if len(known) <= COMPOSED_IDLE_MAX and sum(v.nbytes for v in known) <= self._arena.nbytes:
            return
        # who waits for one asks at every step
        idle = [v for v in known if not v.uses and v.asked + CLAIM_POLLS < self._polls]
        nbytes = sum(version.nbytes for version in idle)
        for left, version in zip(range(len(idle), 0, -1), idle, strict=True):
            if left <= COMPOSED_IDLE_MAX and nbytes <= self._arena.nbytes:
                return
            self._forgotten.add(version.digest)
            nbytes -= version.nbytes

    def _prepared(self, digest: str, done: Done) -> None:
        if done.report is not None:
            version = self._versions.setdefault(digest, Version(digest))
            version.error, version.banks = None, done.report.banks
            if version.state is State.ABSENT:
                version.nbytes = done.nbytes

    def _sized(self, version: Version, done: Done) -> None:
        if done.unusable:
            self._make(version, anew=False)
            return
        version.state, version.nbytes = State.ABSENT, done.nbytes
        version.made = version.made and done.error is None
        if done.report is not None:
            version.banks = done.report.banks
        self._note(version, done)

    def _moved(self, version: Version, done: Done) -> None:
        self._no_room_bytes = inf
        assert version.directory is not None, "only blocks that were written move"
        if done.error is None:
            self._show(version, version.directory)
            return
        # what lies there now is anything; its image is whole
        self._leave(version)
        self._evictions += 1

    def _loaded(self, version: Version, done: Done) -> None:
        self._no_room_bytes = inf
        if done.directory is None:
            self._leave(version)
            version.nbytes = 0
            if done.unusable and not version.made:
                version.made = True
                self._make(version, anew=True)
                return
            version.made = False
            self._note(version, done)
            return
        self._note(version, done)
        self._show(version, done.directory)
        version.made, version.banks = False, shared_digests(done.directory)
        version.unclaimed = self._claims_until = self._polls + CLAIM_POLLS
        self._loads += 1
        self._load_s.append(done.seconds)

    def _note(self, version: Version, done: Done) -> None:
        error = done.error
        if done.unusable:
            error = AdapterCorrupt("image: expected the bytes that were just written, got others")
        version.error, version.until = error, time.monotonic() + ERROR_S
        version.blamed = done.job.source if isinstance(done.job, MakeJob) else version.source
