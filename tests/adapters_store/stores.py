"""A store and what loads from it, driven by the thread of a test."""

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch

from tests.adapters_store.files import Files, lora
from tests.adapters_store.peft_models import ModelSites
from weft.adapters_store.arena import Arena
from weft.adapters_store.catalog import Catalog
from weft.adapters_store.composition import Members
from weft.adapters_store.entry import Entry
from weft.adapters_store.leases import Lease, PrepareResult
from weft.adapters_store.residency import Residency

ARENA_BYTES = 1 << 20
WAIT_S = 20.0
T = TypeVar("T")


class Store:
    """Catalog, arena and residency over one folder. ``evicted`` are the keys that the kernels were told to forget."""

    def __init__(
        self,
        root: Path,
        sites: ModelSites,
        arena_bytes: int = ARENA_BYTES,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.root, self.sites = root, sites
        self.catalog = Catalog.open(root)
        self.arena = Arena(arena_bytes, device)
        self.evicted: list[int] = []
        self.residency = Residency(root, sites, sites.geometry(dtype), self.arena, self.evicted.append)

    def register(self, name: str, files: Files, replace: bool = False) -> Entry:
        """What the server does for an upload, in one thread."""
        config, weights = files.encode()
        with self.catalog.stage() as upload:
            upload.write_config(config)
            for start in range(0, len(weights), 1 << 16):
                upload.write_weights(weights[start : start + (1 << 16)])
            digest = upload.finish()
            result = self.prepare(digest)
            if result.report is None:
                self.residency.forget(digest)
                self.settle()
                assert result.error is not None
                raise result.error
            entry, before = self.catalog.publish(name, digest, result.report, self.sites.info.digest, replace)
        if before is not None:
            self.residency.forget(before)
            self.catalog.remove_version(before)
        return entry

    def remove(self, name: str) -> None:
        """Forget a name and its version."""
        digest = self.catalog.delete(name)
        if digest is not None:
            self.residency.forget(digest)
            self.settle()
            self.catalog.remove_version(digest)

    def prepare(self, digest: str) -> PrepareResult:
        """Prepare and wait."""
        self.residency.prepare(digest)
        return self._wait(lambda: next((r for r in self.residency.poll() if r.digest == digest), None))

    def acquire(self, digest: str, members: Members = ()) -> Lease:
        """Acquire and wait until it is loaded."""

        def attempt() -> Lease | None:
            self.residency.poll()
            return self.residency.acquire(digest, members)

        return self._wait(attempt)

    def settle(self) -> None:
        """Wait until the loader is idle."""
        while self.residency.busy():
            self.residency.poll()
            time.sleep(0.001)

    def files(self) -> list[str]:
        """Everything that lies in the store, but for its lock."""
        found = [
            str((Path(folder) / file).relative_to(self.root))
            for folder, _, files in os.walk(self.root)
            for file in files
        ]
        folders = [f.name for kind in ("objects", "staging") for f in (self.root / kind).iterdir()]
        return sorted({*found, *folders} - {"lock"})

    def _wait(self, attempt: Callable[[], T | None]) -> T:
        end = time.monotonic() + WAIT_S
        while (found := attempt()) is None:
            assert time.monotonic() < end, "nothing came"
            time.sleep(0.001)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.residency.close()
        self.catalog.close()


def add(store: Store, *seeds: int, rank: int = 4) -> list[str]:
    """Register one adapter per seed; their digests."""
    return [store.register(f"n{seed}-{rank}", lora(rank, seed)).digest for seed in seeds]


def bytes_of(store: Store, lease: Lease) -> bytes:
    """What the arena holds of an adapter."""
    return store.arena.buffer[lease.block.offset :][: lease.block.nbytes].cpu().numpy().tobytes()


def any_order(
    store: Store,
    asked: Sequence[tuple[str, Members]],
    choose: random.Random,
    steps: int,
    wanted: dict[str, bytes],
) -> None:
    """Acquire, release and forget as ``choose`` draws it, checking books and bytes; nothing is held at the end.

    asked:   what may be acquired, derived versions among it; those that are not derived may be forgotten
    wanted:  bytes by digest; of one that is not there, those seen first are
    """
    leases: list[Lease] = []

    def release(lease: Lease) -> None:
        for each in (lease, *lease.banks):
            found = bytes_of(store, each)
            assert wanted.setdefault(each.digest, found) == found
        store.residency.release(lease)

    for _ in range(steps):
        match choose.choice(["acquire", "acquire", "acquire", "release", "release", "poll", "forget", "wait"]):
            case "acquire":
                lease = store.residency.acquire(*choose.choice(asked))
                leases += [lease] if lease is not None else []
            case "release" if leases:
                release(leases.pop(choose.randrange(len(leases))))
            case "poll":
                store.residency.poll()
            case "forget" if choose.random() < 0.25:
                store.residency.forget(choose.choice([digest for digest, members in asked if not members]))
            case "wait":
                store.settle()
        store.residency.check()
        assert all(lease.block.key not in store.evicted for lease in leases)
    for lease in leases:
        release(lease)
