"""Writes that survive a kill, and that say so when they do not. Files are private to their owner.

A file is written beside its place, synced, renamed onto it, and then its directory is synced: a reader sees the old
bytes or the new ones. A sync that fails is never tried again, because the kernel may have dropped what it was about.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weft.adapters_store.errors import StoreFull, StoreIOError

FILE_MODE, FOLDER_MODE = 0o600, 0o700

_FULL = {errno.ENOSPC, errno.EDQUOT}


class SyncError(OSError):
    """fsync failed: what was written may be gone, whatever later calls say."""


@contextmanager
def io_errors(what: str) -> Iterator[None]:
    """Turn operating-system errors into the store's own. The message names the deed, never a path."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        if error.errno in _FULL:
            raise StoreFull(f"{what}: expected free space, got {reason}") from error
        raise StoreIOError(f"{what}: {reason}") from error


class Writes:
    """Guards every change of a store. After a failure that may have lost data, it lets no further change begin."""

    def __init__(self) -> None:
        self.allowed = True

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Run one change. StoreFull and StoreIOError say what became of it."""
        if not self.allowed:
            raise StoreIOError(f"{what}: the store is read-only since a write failed; restart when the disk is well")
        with io_errors(what):
            try:
                yield
            except OSError as error:
                lost = isinstance(error, SyncError) or error.errno in (errno.EIO, errno.EROFS)
                if lost and error.errno not in _FULL:
                    self.allowed = False
                raise


def create(path: Path) -> int:
    """A new file of ours, open for writing; it must not exist."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync(fd: int) -> None:
    """fsync, once."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise SyncError(error.errno, error.strerror) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, pieces: Iterator[bytes | memoryview], staging: Path) -> None:
    """Put these bytes at ``path``: all of them or none, whatever was there before. ``staging`` is on the same disk."""
    draft = staging / secrets.token_hex(16)
    try:
        fd = create(draft)
        try:
            for piece in pieces:
                write_all(fd, piece)
            sync(fd)
        finally:
            os.close(fd)
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def discard(folder: Path, staging: Path) -> None:
    """Make a folder disappear at once, then delete what was in it."""
    grave = staging / secrets.token_hex(16)
    try:
        os.rename(folder, grave)
    except FileNotFoundError:
        return
    sync_folder(folder.parent)
    # whatever stays is removed when the store is opened next
    shutil.rmtree(grave, ignore_errors=True)
