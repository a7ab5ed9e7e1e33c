"""Compiled blocks on disk: named by what they depend on, carrying their own checksum, always possible to make again.

8 bytes    magic
8 bytes    length of the block, little endian
32 bytes   sha256 of the block
zeros to HEAD_BYTES, then the block
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weft.adapters_store.durable import FOLDER_MODE, io_errors, write_atomically
from weft.adapters_store.errors import AdapterCorrupt
from weft.adapters_store.files import IMAGES, STAGING, version_folder
from weft.kernels.layout import ALIGN, IMAGE_FORMAT

MAGIC = b"weftimg\x01"
HEAD_BYTES = 256
_LENGTH_AT, _SHA_AT, _SHA_END = 8, 16, 48


class ImageMissing(Exception):
    """There is no image of this version for this backbone yet."""


@dataclass(frozen=True)
class Images:
    """The images in one folder of a store, for one backbone and dtype.

    An image is of (version, backbone, format of blocks, dtype): folds read the backbone's weights.
    """

    root: Path
    backbone_digest: str
    dtype: torch.dtype
    folder: str = IMAGES

    def clear(self) -> None:
        """Delete all of them."""
        with io_errors("clearing images"):
            for path in (self.root / self.folder).glob("*"):
                path.unlink()

    def path(self, digest: str) -> Path:
        """Where the image of a version lies; its name begins with the version's digest."""
        version = version_folder(self.root, digest).name
        rest = hashlib.sha256(f"{self.backbone_digest} {IMAGE_FORMAT} {self.dtype}".encode()).hexdigest()
        return self.root / self.folder / f"{version}-{rest[:16]}"

    def write(self, digest: str, block: Tensor) -> None:
        """Put an image in place, completely or not at all."""
        data = block.numpy().data
        head = MAGIC + len(data).to_bytes(8, "little") + hashlib.sha256(data).digest()
        with io_errors("writing an image"):
            self.path(digest).parent.mkdir(FOLDER_MODE, exist_ok=True)
            pieces: Iterator[bytes | memoryview] = iter((head.ljust(HEAD_BYTES, b"\0"), data))
            write_atomically(self.path(digest), pieces, self.root / STAGING)
        # of one version for one backbone at a time, so that images cannot pile up
        self._remove(digest, but=self.path(digest).name)

    def nbytes(self, digest: str) -> int:
        """Length of the block. ImageMissing if there is no image, AdapterCorrupt if it is damaged."""
        with self.opened(digest) as image:
            return image.nbytes

    def remove(self, digest: str) -> None:
        """Delete the version's image, whatever backbone it is for."""
        self._remove(digest, but="")

    def _remove(self, digest: str, but: str) -> None:
        with io_errors("removing an image"):
            for path in (self.root / self.folder).glob(f"{digest}-*"):
                if path.name != but:
                    path.unlink(missing_ok=True)

    @contextmanager
    def opened(self, digest: str) -> Iterator["ImageFile"]:
        """Open an image for reading."""
        try:
            fd = os.open(self.path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise ImageMissing from None
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise AdapterCorrupt("image: expected a file, got something else") from None
            with io_errors("opening an image"):
                raise
        try:
            with io_errors("reading an image"):
                yield ImageFile(fd)
        finally:
            os.close(fd)


class ImageFile:
    """An open image. ``read_into`` must fill all of its bytes before ``verify`` can judge them."""

    def __init__(self, fd: int) -> None:
        head, status = os.pread(fd, HEAD_BYTES, 0), os.fstat(fd)
        self.nbytes = int.from_bytes(head[_LENGTH_AT:_SHA_AT], "little")
        whole = stat.S_ISREG(status.st_mode) and status.st_size == HEAD_BYTES + self.nbytes
        if head[:_LENGTH_AT] != MAGIC or not whole or self.nbytes % ALIGN or not self.nbytes:
            raise AdapterCorrupt("image: expected a whole image, got a damaged one")
        self._fd, self._at = fd, 0
        self._expected, self._sha256 = head[_SHA_AT:_SHA_END], hashlib.sha256()

    def read_into(self, target: Tensor) -> None:
        """Read the next bytes: uint8 on the host, contiguous."""
        view = target.numpy().data
        while view:
            count = os.preadv(self._fd, [view], HEAD_BYTES + self._at)
            if count == 0:
                raise AdapterCorrupt(f"image: expected {self.nbytes} bytes, got {self._at}")
            self._sha256.update(view[:count])
            self._at += count
            view = view[count:]

    def verify(self) -> None:
        """AdapterCorrupt unless everything was read and is what was written."""
        if self._at != self.nbytes or self._sha256.digest() != self._expected:
            raise AdapterCorrupt("image: expected the bytes that were written, got others")
