"""Reads an adapter's folder for upload: checks that it can be sent, hashes it, cuts it into messages.

The folder is what ``save_pretrained`` of peft or ``save_adapter`` of AdapterHub writes. Whether its contents make sense
is the server's to judge.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from os import PathLike
from pathlib import Path

from weft.client.errors import FolderInvalid
from weft.proto.v1 import adapters_pb2

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# as peft calls it, and AdapterHub
_WEIGHTS_NAMES = (WEIGHTS_NAME, "adapter.safetensors")
PICKLE_NAMES = ("adapter_model.bin", "pytorch_adapter.bin", "pytorch_model_head.bin")
CONFIG_BYTES_MAX = 1 << 20
CHUNK_BYTES = 1 << 20
# how often somebody is told how far an upload got
PROGRESS_S = 0.1

Progress = Callable[[int, int], None]


def _invalid(message: str) -> FolderInvalid:
    return FolderInvalid(message, code="INVALID_ARGUMENT", reason="FOLDER_INVALID")


@dataclass(frozen=True, slots=True)
class Upload:
    """An adapter on disk, ready to be sent."""

    name: str
    replace: bool
    config: bytes
    weights: Path
    weights_bytes: int
    weights_sha256: str

    def header(self) -> adapters_pb2.RegisterAdapterRequest:
        """The first message."""
        return adapters_pb2.RegisterAdapterRequest(
            header=adapters_pb2.AdapterHeader(
                name=self.name,
                config=self.config,
                weights_size=self.weights_bytes,
                weights_sha256=self.weights_sha256,
                replace=self.replace,
            )
        )

    def chunks(self) -> Iterator[adapters_pb2.RegisterAdapterRequest]:
        """The messages after the first. Holds no file open between them: an upload may be given up at any of them."""
        for offset in range(0, self.weights_bytes, CHUNK_BYTES):
            with _opened(self.weights) as file:
                file.seek(offset)
                chunk = file.read(CHUNK_BYTES)
            if len(chunk) != min(CHUNK_BYTES, self.weights_bytes - offset):
                raise _invalid(f"expected {self.weights} to stay as it is while it is sent, got another size")
            yield adapters_pb2.RegisterAdapterRequest(chunk=chunk)


def read_folder(name: str, folder: str | PathLike[str], *, replace: bool) -> Upload:
    """Check and hash the folder; takes about half a second for each GiB. Raises FolderInvalid."""
    root = Path(folder)
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing there"
        raise _invalid(f"expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME} at {root}, got {got}")
    weights = next((path for name in _WEIGHTS_NAMES if (path := root / name).is_file()), None)
    if weights is None:
        raise _invalid(_why_no_weights(root))
    with _opened(root / CONFIG_NAME) as file:
        config = file.read(CONFIG_BYTES_MAX + 1)
    if len(config) > CONFIG_BYTES_MAX:
        raise _invalid(f"{root / CONFIG_NAME} must be at most {CONFIG_BYTES_MAX} bytes, got more")
    with _opened(weights) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    return Upload(name, replace, config, weights, size, digest)


def _why_no_weights(root: Path) -> str:
    pickles = [each for each in PICKLE_NAMES if (root / each).is_file()]
    if pickles:
        return (
            f"expected {WEIGHTS_NAME} in {root}, got only {pickles[0]}, which can run code when it is read; "
            f"`weft convert pickle {root} FOLDER` makes one that cannot, and runs nothing of it"
        )
    names = sorted(each.name for each in root.iterdir())
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"expected {CONFIG_NAME} and {WEIGHTS_NAME} in {root}, got {listed or 'an empty folder'}"


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open for reading; whatever goes wrong while it is open, too, is told as ours."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise _invalid(f"expected a readable file at {path}, got: {error.strerror}") from None


class Sending(Iterator[adapters_pb2.RegisterAdapterRequest]):
    """The messages of an upload, for gRPC's thread; knows how far it got and what went wrong here."""

    def __init__(self, upload: Upload) -> None:
        self.sent_bytes = 0
        self.total_bytes = upload.weights_bytes
        self.error: FolderInvalid | None = None
        self._messages = chain((upload.header(),), upload.chunks())

    def __next__(self) -> adapters_pb2.RegisterAdapterRequest:
        try:
            message = next(self._messages)
        except FolderInvalid as error:
            # gRPC would only log it; ended here, the upload is short and the server refuses it
            self.error = error
            raise StopIteration from None
        self.sent_bytes += len(message.chunk)
        return message
