"""Registers, resolves and removes adapters: the order of steps that leaves a name whole or absent, whatever happens.

An upload goes to the store's staging, is judged by its structure here, compiled by the engine, and only then named.
Knows neither gRPC nor messages; works for uploads and for folders given on the command line.
"""

import asyncio
import logging
import shutil
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

from weft.adapters_store.catalog import Catalog
from weft.adapters_store.composition import derive, label_of
from weft.adapters_store.entry import Entry, check_name
from weft.adapters_store.errors import (
    AdapterError,
    AdapterExists,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    quoted,
)
from weft.adapters_store.files import CONFIG, WEIGHTS, AdapterFiles, version_folder, weights_in
from weft.adapters_store.formats import parse_adapter
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.upload import Upload
from weft.server.config import ConfigError
from weft.server.engine.messages import Digest, EngineInfo
from weft.server.errors import DigestMismatch, EngineRestarting, ServerError, UploadInvalid
from weft.server.metrics import Metrics, StoreUsage
from weft.server.relay import Relay
from weft.server.threads import Threads

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Arrival:
    """An adapter on its way in. ``weights_sha256`` is None when the sender announced none."""

    name: str
    config: bytes
    weights: AsyncGenerator[bytes, None]
    weights_bytes: int
    weights_sha256: bytes | None = None
    replace: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """The version that a request runs with.

    digest:          None is the bare backbone
    members:         what a derived version is made of
    context_tokens:  of the context that it takes for itself
    names:           of the members, by what the engine's messages call them
    """

    digest: Digest | None = None
    members: tuple[tuple[Digest, float], ...] = ()
    context_tokens: int = 0
    names: Mapping[str, str] = field(default_factory=dict)


class Registrar:
    """The names of the store as requests see them, and all that changes them."""

    def __init__(self, root: Path, catalog: Catalog, relay: Relay, threads: Threads, metrics: Metrics) -> None:
        self._root = root
        self._catalog = catalog
        self._relay = relay
        self._threads = threads
        self._metrics = metrics
        # versions that the loaded backbone's engine refused, and why
        self._refused: dict[str, str] = {}
        # registrations under way
        self.arriving = 0
        self._arrived = asyncio.Event()
        # held while a name changes
        self._changes = asyncio.Lock()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._review: asyncio.Task[None] | None = None
        metrics.count_adapters(self.counts)
        metrics.measure_store(self.usage)

    def state(self, entry: Entry) -> tuple[bool, str]:
        """Whether requests may use the entry with the loaded backbone, and why not."""
        reason = self._refused.get(entry.digest, entry.reason if entry.state == "incompatible" else "")
        return not reason, reason

    def counts(self) -> dict[str, int]:
        """Names by state."""
        names = self._catalog.names()
        entries = self._catalog.list(limit=len(names))
        active = sum(self.state(entry)[0] for entry in entries)
        return {"active": active, "incompatible": len(entries) - active}

    def usage(self) -> StoreUsage:
        """How full the store is."""
        entries = self._catalog.list(limit=len(self._catalog.names()))
        versions = {entry.digest: entry.disk_bytes for entry in entries}
        return StoreUsage(sum(versions.values()), len(versions), shutil.disk_usage(self._root).free)

    def get(self, name: str) -> Entry:
        """The entry of a name; raises AdapterInvalid for what cannot be a name, AdapterNotFound for no entry."""
        return self._catalog.get(check_name(name))

    def page(self, after: str, limit: int, method: str) -> tuple[Entry, ...]:
        """Entries in order of name, from the first behind ``after``."""
        return self._catalog.list(after, limit, method)

    def resolve(self, named: Sequence[tuple[str, float]]) -> Chosen:
        """The version that a request for these names, each with a weight, runs with."""
        entries = [(self._active(name), weight) for name, weight in named]
        digest, members = derive((entry.digest, weight) for entry, weight in entries)
        return Chosen(
            None if digest is None else Digest(digest),
            tuple((Digest(member), weight) for member, weight in members),
            sum(entry.context_tokens for entry, weight in entries if weight != 0),
            {label_of(entry.digest): quoted(entry.name) for entry, _ in entries},
        )

    def _active(self, name: str) -> Entry:
        entry = self.get(name)
        active, reason = self.state(entry)
        if not active:
            raise AdapterIncompatible(f"{quoted(name)} does not fit the backbone that is loaded: {reason}", "adapter")
        return entry

    async def register(self, arrival: Arrival) -> Entry:
        """Bring an adapter in: durable and named when this returns, without a trace when it raises."""
        check_name(arrival.name)
        self._relay.admit()
        self.arriving += 1
        try:
            return await self._register(arrival, self._relay.engine())
        finally:
            self.arriving -= 1
            self._arrived.set()

    async def idle(self) -> None:
        """Wait until no registration is under way."""
        while self.arriving:
            self._arrived.clear()
            await self._arrived.wait()

    async def _register(self, arrival: Arrival, info: EngineInfo) -> Entry:
        uploads: list[Upload] = []
        try:
            # kept by the thread itself: a caller that is cancelled here must still clean up
            await self._threads.run(lambda: uploads.append(self._catalog.stage()))
            digest = await self._receive(arrival, uploads[0])
            if self._is_registered(arrival, digest, info):
                return self._catalog.get(arrival.name)
            async with self._lock(digest):
                try:
                    return await self._admit(arrival, digest, info)
                finally:
                    if not self._catalog.is_named(digest):
                        self._relay.forget(Digest(digest))
        finally:
            for upload in uploads:
                await self._threads.run(upload.abort)

    async def delete(self, name: str) -> None:
        """Forget a name. Requests in flight keep the version until they end."""
        self.get(name)
        freed: list[str] = []

        def delete() -> None:
            if (digest := self._catalog.delete(name)) is not None:
                freed.append(digest)

        try:
            async with self._changes:
                await self._threads.run(delete)
        finally:
            self._retire(freed)
        logger.info("deleted %s", name)

    def review(self, info: EngineInfo) -> None:
        """An engine is ready: see whether what was registered for another backbone fits the one it has."""
        if self._review is not None:
            self._review.cancel()
        self._review = self._background(self._review_all(info))

    async def close(self) -> None:
        """End what goes on in the background; a version that nobody names goes when the store is opened next."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _receive(self, arrival: Arrival, upload: Upload) -> str:
        """Write what arrives to the staging, check it against what was announced, and return the version's digest."""
        await self._threads.run(upload.write_config, arrival.config)
        async with aclosing(arrival.weights) as chunks:
            async for chunk in chunks:
                if upload.weights_bytes + len(chunk) > arrival.weights_bytes:
                    text = f"expected {arrival.weights_bytes} bytes of weights, got more"
                    raise UploadInvalid(text, field="chunk")
                await self._threads.run(upload.write_weights, chunk)
                self._metrics.uploaded(len(chunk))
        if upload.weights_bytes != arrival.weights_bytes:
            text = f"expected {arrival.weights_bytes} bytes of weights, got {upload.weights_bytes}"
            raise UploadInvalid(text, field="header.weights_size")
        if arrival.weights_sha256 not in (None, bytes.fromhex(upload.weights_sha256)):
            text = f"expected weights of the announced sha256, got {upload.weights_sha256}"
            raise DigestMismatch(text, field="header.weights_sha256")
        return await self._threads.run(upload.finish)

    def _is_registered(self, arrival: Arrival, digest: str, info: EngineInfo) -> bool:
        """Whether nothing is left to do; raises AdapterExists when the name may not be taken."""
        entry = self._find(arrival.name)
        if entry is None:
            return False
        if entry.digest != digest and not arrival.replace:
            raise AdapterExists(f"name: expected a new name, or replace, got {quoted(arrival.name)}", "name")
        same = (entry.digest, entry.backbone_digest) == (digest, info.catalogue.digest)
        return same and self.state(entry)[0]

    async def _admit(self, arrival: Arrival, digest: str, info: EngineInfo) -> Entry:
        """Judge, compile and name a version that lies in the store."""
        await self._threads.run(self._judge, digest, info.catalogue)
        report = await self._relay.prepare(Digest(digest))
        freed: list[str] = []

        def publish() -> Entry:
            entry, before = self._catalog.publish(arrival.name, digest, report, info.catalogue.digest, arrival.replace)
            if before is not None:
                freed.append(before)
            return entry

        try:
            async with self._changes:
                entry = await self._threads.run(publish)
        finally:
            self._retire(freed)
        self._refused.pop(digest, None)
        logger.info("registered %s: %s, %d bytes, version %s", entry.name, entry.method, entry.device_bytes, digest)
        return entry

    def _judge(self, digest: str, catalogue: CatalogueInfo) -> None:
        """Refuse by structure what the engine need not see."""
        parse_adapter(AdapterFiles.read(version_folder(self._root, digest), data=False), catalogue)

    def _retire(self, digests: list[str]) -> None:
        """Remove versions that lost their last name, once nobody uses them."""
        for digest in digests:
            self._background(self._remove(digest))

    async def _remove(self, digest: str) -> None:
        await self._relay.unused(Digest(digest))
        async with self._lock(digest):
            if self._catalog.is_named(digest):
                return
            self._relay.forget(Digest(digest))
            self._refused.pop(digest, None)
            try:
                await self._threads.run(self._catalog.remove_version, digest)
            except AdapterError as error:
                logger.warning("version %s stays on disk until the store is opened next: %s", digest, error)

    async def _review_all(self, info: EngineInfo) -> None:
        self._refused.clear()
        await self._threads.run(self._catalog.judge, info.catalogue)
        for name in self._catalog.names():
            entry = self._find(name)
            if entry is None or entry.backbone_digest == info.catalogue.digest or not self.state(entry)[0]:
                continue
            try:
                await self._review_one(entry, info)
            except EngineRestarting:
                # the next engine begins again
                return
            except (AdapterInvalid, AdapterTooLarge) as error:
                self._refused[entry.digest] = error.message
                logger.warning("%s does not fit this backbone: %s", name, error)
            except (AdapterError, ServerError) as error:
                logger.warning("%s could not be compiled for this backbone: %s", name, error)

    async def _review_one(self, entry: Entry, info: EngineInfo) -> None:
        """Compile a version for the loaded backbone and note down that it fits."""
        async with self._lock(entry.digest):
            report = await self._relay.prepare(Digest(entry.digest))
            async with self._changes:
                if self._find(entry.name) is entry:
                    backbone = info.catalogue.digest
                    await self._threads.run(self._catalog.publish, entry.name, entry.digest, report, backbone)

    def _find(self, name: str) -> Entry | None:
        try:
            return self._catalog.get(name)
        except AdapterNotFound:
            return None

    def _lock(self, digest: str) -> asyncio.Lock:
        """One at a time per version: what is compiled must not be forgotten by whoever comes before."""
        return self._locks.setdefault(digest, asyncio.Lock())

    def _background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def read_folder(name: str, folder: Path, threads: Threads) -> Arrival:
    """An adapter that lies in a folder of this machine, as peft or AdapterHub saves it."""
    weights = weights_in(folder)
    try:
        config = await threads.run((folder / CONFIG).read_bytes)
        size = (await threads.run(weights.stat)).st_size
    except OSError as error:
        raise ConfigError(f"adapter {name} must be a folder with {CONFIG} and {WEIGHTS}, got {error}") from None
    return Arrival(name, config, _read(weights, threads), size, replace=True)


async def _read(path: Path, threads: Threads) -> AsyncGenerator[bytes, None]:
    with path.open("rb") as file:
        while chunk := await threads.run(file.read, CHUNK_BYTES):
            yield chunk
