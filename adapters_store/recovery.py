"""Opens a store that was left at any moment: takes the lock, reads the names, clears what is nobody's."""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from weft.adapters_store.durable import FILE_MODE, FOLDER_MODE, discard, io_errors, sync_folder
from weft.adapters_store.entry import Entry, decode, record_name
from weft.adapters_store.errors import AdapterCorrupt, AdapterError, StoreIOError, quoted
from weft.adapters_store.files import IMAGES, NAMES, OBJECTS, STAGING, is_digest, version_folder

RECORD_BYTES_MAX = 64 << 20


def lock_store(root: Path) -> int:
    """Make the folders if need be and take the lock: its descriptor. StoreIOError says what is in the way."""
    with io_errors("opening the store"):
        os.makedirs(root.parent, exist_ok=True)
        for folder in (root, *(root / name for name in (OBJECTS, NAMES, IMAGES, STAGING))):
            _make_folder(folder)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StoreIOError("opening the store: expected it to be free, got another server using it") from None
        sync_folder(root)
    return lock


def read_records(root: Path) -> tuple[dict[str, Entry], list[str]]:
    """Every entry that can be read, and a line on everything else."""
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    with io_errors("reading the names"):
        files = sorted(os.listdir(root / NAMES))
    for file in files:
        try:
            entry = decode(_read(root / NAMES / file))
            if record_name(entry.name) != file:
                raise AdapterCorrupt("record: expected it under the hash of its name, got another")
        except (AdapterError, ValueError, KeyError, TypeError) as error:
            # the message of ours, or only the type: a stranger's file may hold anything
            said = error.message if isinstance(error, AdapterError) else type(error).__name__
            problems.append(f"names/{quoted(file, 80)}: {said}")
            continue
        entries[entry.name] = entry
        if not version_folder(root, entry.digest).is_dir():
            problems.append(f"{entry.name}: its files are not in the store")
    return entries, problems


def remove_orphans(root: Path, entries: Iterable[Entry], all_read: bool) -> list[str]:
    """Remove what nobody names: staging, images and, only if every name could be read, versions."""
    named = {entry.digest: entry.banks for entry in entries}
    kept = {*named, *chain(*named.values())}
    problems: list[str] = []
    with io_errors("clearing the store"):
        for path in (root / STAGING).iterdir():
            _remove(path)
        for path in (root / IMAGES).iterdir():
            if path.name[:64] not in kept:
                _remove(path)
        for path in sorted((root / OBJECTS).iterdir()):
            if path.name in named:
                continue
            if not is_digest(path.name):
                problems.append(f"objects/{quoted(path.name, 80)}: not ours, left alone")
            elif all_read:
                discard(path, root / STAGING)
    return problems


def _make_folder(folder: Path) -> None:
    try:
        os.mkdir(folder, FOLDER_MODE)
    except FileExistsError:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise StoreIOError(
                "opening the store: expected folders, got a link or a file in the place of one"
            ) from None
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise StoreIOError("opening the store: expected folders that can be written, got one that cannot")


def _read(path: Path) -> bytes:
    with io_errors("reading a name"):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > RECORD_BYTES_MAX:
                raise AdapterCorrupt("record: expected a file, got something else")
            return os.read(fd, status.st_size)
        finally:
            os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
