"""The store on disk: names that point to immutable versions, and survive a kill at any moment. Imports no torch.

    root/lock                held by the one server that uses the store
    root/objects/<digest>/   the two files of a version, as received
    root/names/<sha256>      a record of one name; nothing that a client sent ever becomes part of a path
    root/images/             compiled blocks, written by the engine; can be made again
    root/composed/           the same of derived versions; emptied when an engine starts
    root/staging/            what is under way; emptied when the store is opened

What has been acknowledged is there after a kill; what has not is there completely or not at all.
"""

import errno
import os
import secrets
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from contextlib import suppress
from dataclasses import replace as replaced
from pathlib import Path
from types import TracebackType
from typing import Self

from weft.adapters_store.durable import Writes, discard, sync_folder, write_atomically
from weft.adapters_store.entry import Entry, State, check_name, encode, make_entry, record_name
from weft.adapters_store.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    StoreFull,
    StoreIOError,
    quoted,
)
from weft.adapters_store.files import (
    CONFIG,
    NAMES,
    STAGING,
    WEIGHTS,
    AdapterFiles,
    digest_of,
    version_folder,
)
from weft.adapters_store.formats import parse_adapter
from weft.adapters_store.recovery import lock_store, read_records, remove_orphans
from weft.adapters_store.report import AdapterReport
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.upload import Upload


class Catalog:
    """Names, their versions and the files of these. Readers never wait; changes are made one at a time.

    Any thread may call any method. Changes touch the disk and take as long as it does.
    """

    def __init__(self, root: Path, lock: int, entries: dict[str, Entry], problems: tuple[str, ...]) -> None:
        self._root, self._lock_fd = root, lock
        self._entries, self._names = entries, sorted(entries)
        self._versions = Counter(entry.digest for entry in entries.values())
        # versions held by uploads that are not over
        self._held: Counter[str] = Counter()
        self._change = threading.RLock()
        self._writes = Writes()
        self.problems = problems

    @classmethod
    def open(cls, root: Path) -> "Catalog":
        """Take the store over and clean up after whoever was killed. StoreIOError if it cannot be used.

        What cannot be understood is left where it is, and said in ``problems``.
        """
        lock = lock_store(root)
        entries, problems = read_records(root)
        problems += remove_orphans(root, entries.values(), all_read=not problems)
        return cls(root, lock, entries, tuple(problems))

    def close(self) -> None:
        """Let another server have the store."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def writable(self) -> bool:
        """False once a write failed in a way that may have lost data; reads go on."""
        return self._writes.allowed

    def names(self) -> tuple[str, ...]:
        """Every name, in order."""
        return tuple(self._names)

    def get(self, name: str) -> Entry:
        """The entry of a name. AdapterNotFound if there is none."""
        entry = self._entries.get(name)
        if entry is None:
            raise AdapterNotFound(f"name: expected a registered adapter, got {quoted(name, 140)!r}", "name", name)
        return entry

    def list(self, after: str = "", limit: int = 100, method: str = "") -> tuple[Entry, ...]:
        """Up to ``limit`` entries in order of name, from the first behind ``after``; of one method if it is given."""
        names = self.names()
        found: list[Entry] = []
        for name in names[bisect_right(names, after) :]:
            entry = self._entries.get(name)
            if entry is not None and method in ("", entry.method):
                found.append(entry)
            if len(found) == limit:
                break
        return tuple(found)

    def is_named(self, digest: str) -> bool:
        """Whether any name points to this version."""
        return self._versions[digest] > 0

    def stage(self) -> Upload:
        """Begin an upload; use it as a context manager, and publish inside the context."""
        return Upload(self._staging / secrets.token_hex(16), self._writes, self._keep, self._let_go)

    def publish(
        self, name: str, digest: str, report: AdapterReport, backbone_digest: str, replace: bool = False
    ) -> tuple[Entry, str | None]:
        """Point a name to a version, durably. Returns its entry, and the version before it if nobody names that now.

        Publishing what the name already points to changes nothing. AdapterExists if it points elsewhere and
        ``replace`` is not set; AdapterCorrupt if the version's files are not in the store.
        """
        check_name(name)
        with self._change:
            before = self._entries.get(name)
            if before is not None and before.digest != digest and not replace:
                raise AdapterExists(
                    f"name: expected a new name, or replace, got {quoted(name)}, which is registered", "name"
                )
            if before is not None and (before.digest, before.backbone_digest) == (digest, backbone_digest):
                return before, None
            entry = make_entry(
                name,
                digest,
                report,
                disk_bytes=self._disk_bytes(digest),
                create_time_ms=time.time_ns() // 1_000_000,
                backbone_digest=backbone_digest,
            )
            with self._writes.guard("writing a name"):
                write_atomically(self._record(name), iter([encode(entry)]), self._staging)
            self._entries[name] = entry
            _count(self._versions, digest, 1)
            if before is None:
                insort(self._names, name)
                return entry, None
            _count(self._versions, before.digest, -1)
            return entry, None if self.is_named(before.digest) else before.digest

    def delete(self, name: str) -> str | None:
        """Forget a name, durably. Returns its version if nobody names that now. AdapterNotFound if there is none."""
        with self._change:
            entry = self.get(name)
            with self._writes.guard("removing a name"):
                self._record(name).unlink(missing_ok=True)
                sync_folder(self._root / NAMES)
            del self._entries[name]
            del self._names[bisect_left(self._names, name)]
            _count(self._versions, entry.digest, -1)
            return None if self.is_named(entry.digest) else entry.digest

    def remove_version(self, digest: str) -> bool:
        """Delete the files of a version that no name points to and no upload holds; whether it did."""
        with self._change:
            if self.is_named(digest) or self._held[digest]:
                return False
            with self._writes.guard("removing a version"):
                discard(version_folder(self._root, digest), self._staging)
            return True

    def judge(self, backbone: CatalogueInfo) -> None:
        """Decide which entries fit the backbone that is loaded: those registered for another one are read again."""
        for name in self.names():
            entry = self._entries.get(name)
            if entry is None:
                continue
            reason = "" if entry.backbone_digest == backbone.digest else self._misfit(entry.digest, backbone)
            with self._change:
                if self._entries.get(name) is entry:
                    state: State = "incompatible" if reason else "active"
                    self._entries[name] = replaced(entry, state=state, reason=reason)

    def _misfit(self, digest: str, backbone: CatalogueInfo) -> str:
        try:
            parse_adapter(AdapterFiles.read(version_folder(self._root, digest), data=False), backbone)
        except AdapterInvalid as error:
            return error.message
        except (AdapterCorrupt, StoreIOError):
            # stays active: whoever asks for it is told that its bytes are damaged, or cannot be read
            return ""
        return ""

    def _keep(self, folder: Path, digest: str) -> None:
        """Hold a version for an upload, and move its files in unless they are there and whole."""
        place = version_folder(self._root, digest)
        with self._change:
            _count(self._held, digest, 1)
        try:
            with self._writes.guard("storing a version"):
                self._move_in(folder, place, digest)
        except BaseException:
            self._let_go(digest)
            raise

    def _move_in(self, folder: Path, place: Path, digest: str) -> None:
        with suppress(AdapterCorrupt):
            if place.exists() and digest_of(place) == digest:
                return
        with self._change:
            try:
                os.rename(folder, place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                # another upload of these bytes was faster: taking its files away, even for a moment, would fail it
                with suppress(AdapterCorrupt):
                    if digest_of(place) == digest:
                        return
                # damaged on disk, and here are the right bytes
                discard(place, self._staging)
                os.rename(folder, place)
        sync_folder(place.parent)

    def _let_go(self, digest: str) -> None:
        with self._change:
            _count(self._held, digest, -1)
        # what cannot be removed now is removed when the store is opened next
        with suppress(StoreIOError, StoreFull):
            self.remove_version(digest)

    def _disk_bytes(self, digest: str) -> int:
        folder = version_folder(self._root, digest)
        try:
            return sum((folder / name).lstat().st_size for name in (CONFIG, WEIGHTS))
        except OSError:
            raise AdapterCorrupt("version: expected its files in the store, got none", "digest") from None

    def _record(self, name: str) -> Path:
        return self._root / NAMES / record_name(name)

    @property
    def _staging(self) -> Path:
        return self._root / STAGING


def _count(counts: Counter[str], key: str, by: int) -> None:
    counts[key] += by
    if not counts[key]:
        del counts[key]
