"""One upload: the files of a version on their way into the store, invisible until they are complete."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from weft.adapters_store.durable import FOLDER_MODE, Writes, create, sync, sync_folder, write_all
from weft.adapters_store.errors import expected
from weft.adapters_store.files import CONFIG, WEIGHTS, manifest_digest
from weft.adapters_store.safetensors_header import LENGTH_BYTES, header_bytes
from weft.adapters_store.strict_json import CONFIG_BYTES_MAX


class Upload:
    """``write_config``, ``write_weights`` until all is there, ``finish``; leaving the context forgets what is unnamed.

    keep:     moves a complete folder into the store under its digest, and holds it there
    release:  lets go of that hold: a version that nobody has named by then disappears
    """

    def __init__(
        self,
        folder: Path,
        writes: Writes,
        keep: Callable[[Path, str], None],
        release: Callable[[str], None],
    ) -> None:
        self._folder, self._writes, self._keep, self._release = folder, writes, keep, release
        self._config: str | None = None
        self._first = b""
        self._sha256 = hashlib.sha256()
        self._digest: str | None = None
        self.weights_bytes = 0
        with writes.guard("starting an upload"):
            os.mkdir(folder, FOLDER_MODE)
            self._fd: int | None = create(folder / WEIGHTS)

    @property
    def weights_sha256(self) -> str:
        """Of the weights written so far."""
        return self._sha256.hexdigest()

    def write_config(self, config: bytes) -> None:
        """Write the config, once."""
        if len(config) > CONFIG_BYTES_MAX:
            raise expected(CONFIG, f"at most {CONFIG_BYTES_MAX} bytes", len(config))
        with self._writes.guard("writing an upload"):
            fd = create(self._folder / CONFIG)
            try:
                write_all(fd, config)
                sync(fd)
            finally:
                os.close(fd)
        self._config = hashlib.sha256(config).hexdigest()

    def write_weights(self, chunk: bytes) -> None:
        """Append to the weights. AdapterInvalid as soon as the first bytes show that they are no safetensors file."""
        assert self._fd is not None, "write_weights after finish"
        if len(self._first) < LENGTH_BYTES:
            self._first += chunk[: LENGTH_BYTES - len(self._first)]
            if len(self._first) == LENGTH_BYTES:
                header_bytes(self._first)
        with self._writes.guard("writing an upload"):
            write_all(self._fd, chunk)
        self._sha256.update(chunk)
        self.weights_bytes += len(chunk)

    def finish(self) -> str:
        """Make the version durable and return its digest; it stays at least until this context is left."""
        if self._config is None:
            raise expected(CONFIG, "a config", "none")
        header_bytes(self._first, self.weights_bytes)
        assert self._fd is not None, "finish twice"
        with self._writes.guard("finishing an upload"):
            sync(self._fd)
            os.close(self._fd)
            self._fd = None
            sync_folder(self._folder)
        digest = manifest_digest(self._config, self.weights_sha256)
        self._keep(self._folder, digest)
        self._digest = digest
        return digest

    def abort(self) -> None:
        """Forget the upload. Nothing of it is left, unless it has been named. Safe to call again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        # what cannot be removed now is removed when the store is opened next
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._digest is not None:
            digest, self._digest = self._digest, None
            self._release(digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
