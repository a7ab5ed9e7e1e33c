"""The two files of an adapter as bytes: read once into memory of our own, and hashed exactly as they are judged.

A version is named by the sha256 of a manifest of its files' sha256, over bytes as received: no canonical form to get
wrong. Files are read, never mapped: a file that shrinks under a map kills the process.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weft.adapters_store.durable import io_errors
from weft.adapters_store.errors import AdapterCorrupt, AdapterInvalid, AdapterTooLarge
from weft.adapters_store.safetensors_header import LENGTH_BYTES, Header, header_bytes, read_header
from weft.adapters_store.strict_json import CONFIG_BYTES_MAX

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# how AdapterHub calls it; in a store every file has the name above
WEIGHTS_ELSEWHERE = "adapter.safetensors"

# folders of a store
OBJECTS, NAMES, IMAGES, STAGING = "objects", "names", "images", "staging"
# images of derived versions: no name keeps them, and no engine those of another
COMPOSED = "composed"

_CHUNK = 1 << 20


@dataclass(frozen=True)
class AdapterFiles:
    """Config and weights of one version, as read.

    data:    the weights after the header; None when only the header was asked for
    digest:  of the version, likewise
    """

    config: bytes
    header: Header
    data: memoryview | None
    digest: str | None

    @classmethod
    def read(cls, folder: Path, data: bool = True) -> "AdapterFiles":
        """Read a folder. AdapterCorrupt if a file is missing or not a plain file, AdapterInvalid if it is malformed."""
        config = _read_config(folder / CONFIG)
        with _opened(folder / WEIGHTS) as (fd, size):
            first = os.pread(fd, LENGTH_BYTES, 0)
            length = header_bytes(first, size)
            raw = os.pread(fd, length, LENGTH_BYTES)
            header = read_header(raw, size - LENGTH_BYTES - len(raw))
            if not data:
                return cls(config, header, None, None)
            weights = _read_all(fd, size)
        # the bytes that are hashed are the bytes that are parsed
        if weights[: header.data_start] != first + raw:
            raise AdapterCorrupt(f"{WEIGHTS}: expected the same bytes twice, got others", WEIGHTS)
        digest = manifest_digest(hashlib.sha256(config).hexdigest(), hashlib.sha256(weights).hexdigest())
        return cls(config, header, weights[header.data_start :].toreadonly(), digest)


def read_version(root: Path, digest: str, data: bool = True) -> AdapterFiles:
    """The files of a version in the store. AdapterCorrupt if they are not what was registered.

    AdapterInvalid if they were malformed when they came. Without ``data`` nothing of the weights is read or hashed.
    """
    folder = version_folder(root, digest)
    try:
        files = AdapterFiles.read(folder, data)
    except AdapterInvalid:
        # either it came like this, or the disk did it
        if digest_of(folder) != digest:
            raise _corrupt() from None
        raise
    if data and files.digest != digest:
        raise _corrupt()
    return files


def _corrupt() -> AdapterCorrupt:
    return AdapterCorrupt("version: expected the bytes that were registered, got others")


def weights_in(folder: Path) -> Path:
    """The weights of an adapter as some library saved it: under PEFT's name, or AdapterHub's where there is no such."""
    found, other = folder / WEIGHTS, folder / WEIGHTS_ELSEWHERE
    return other if other.is_file() and not found.exists() else found


def version_folder(root: Path, digest: str) -> Path:
    """Where the files of a version lie. A digest is the only thing of an adapter that ever becomes a path."""
    if not is_digest(digest):
        raise AdapterCorrupt("digest: expected 64 hexadecimal digits, got something else", "digest")
    return root / OBJECTS / digest


def is_digest(text: str) -> bool:
    """Whether this is a sha256 in lower-case hexadecimal."""
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def manifest_digest(config_sha256: str, weights_sha256: str) -> str:
    """The name of a version: sha256 over ``sha256  file`` lines, as ``sha256sum`` prints them, in order of file."""
    manifest = f"{config_sha256}  {CONFIG}\n{weights_sha256}  {WEIGHTS}\n"
    return hashlib.sha256(manifest.encode()).hexdigest()


def digest_of(folder: Path) -> str:
    """The version digest of a folder's bytes, in constant memory. AdapterCorrupt if a file is missing."""
    return manifest_digest(_sha256(folder / CONFIG), _sha256(folder / WEIGHTS))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """A plain file and its size. A link, pipe or device where a file should be is damage, not a way elsewhere."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise AdapterCorrupt(f"{path.name}: expected a file, got {_kind(error.errno)}", path.name) from None
        with io_errors(f"opening {path.name}"):
            raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterCorrupt(f"{path.name}: expected a file, got something else", path.name)
        with io_errors(f"reading {path.name}"):
            yield fd, status.st_size
    finally:
        os.close(fd)


def _kind(code: int | None) -> str:
    return "a link" if code == errno.ELOOP else "none"


def _read_config(path: Path) -> bytes:
    with _opened(path) as (fd, size):
        # one byte more than is allowed, so that the reader of the config can refuse it with its own words
        return bytes(_read_all(fd, min(size, CONFIG_BYTES_MAX + 1)))


def _read_all(fd: int, size: int) -> memoryview:
    try:
        view = memoryview(bytearray(size))
    except MemoryError:
        raise AdapterTooLarge(f"expected a file that fits in memory, got {size} bytes") from None
    at = 0
    while at < size:
        count = os.preadv(fd, [view[at : at + (64 * _CHUNK)]], at)
        if count == 0:
            raise AdapterCorrupt(f"expected a file of {size} bytes, got {at}")
        at += count
    return view


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with _opened(path) as (fd, size):
        at = 0
        while chunk := os.pread(fd, _CHUNK, at):
            digest.update(chunk)
            at += len(chunk)
        if at != size:
            raise AdapterCorrupt(f"{path.name}: expected {size} bytes, got {at}", path.name)
    return digest.hexdigest()
