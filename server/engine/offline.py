"""The engine without a server: register folders and run requests in one process, for tests, scripts and benchmarks."""

import time
from collections.abc import Sequence
from pathlib import Path

from weft.adapters_store.catalog import Catalog
from weft.adapters_store.files import CONFIG, weights_in
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.engine import Engine
from weft.server.engine.messages import (
    Abort,
    Digest,
    Failed,
    Forget,
    Prepare,
    Prepared,
    Refused,
    RequestId,
    Submit,
    Tokens,
)

CHUNK_BYTES = 1 << 20
LOAD_POLL_S = 0.002


class RequestFailed(Exception):
    """A request ended with an error; ``event`` says which."""

    def __init__(self, event: Failed):
        super().__init__(f"{event.failure.value}: {event.message}")
        self.event = event


class AdapterRefused(Exception):
    """A folder is not an adapter of this backbone; ``event`` says why."""

    def __init__(self, event: Refused):
        super().__init__(event.message)
        self.event = event


class OfflineEngine:
    """An engine and its store, driven by the thread that calls."""

    def __init__(self, config: EngineConfig, backbone: Backbone | None = None):
        self.engine = Engine.load(config) if backbone is None else Engine(config, backbone)
        self.catalog = Catalog.open(Path(config.store))

    def register(self, name: str, folder: Path) -> Digest:
        """Put an adapter folder in the store under a name and compile it. Raises AdapterRefused or AdapterError."""
        with self.catalog.stage() as upload:
            upload.write_config((folder / CONFIG).read_bytes())
            with weights_in(folder).open("rb") as weights:
                while chunk := weights.read(CHUNK_BYTES):
                    upload.write_weights(chunk)
            digest = Digest(upload.finish())
            report = self._prepare(digest).report
            self.catalog.publish(name, digest, report, self.engine.backbone.info.digest)
        return digest

    def forget(self, name: str) -> None:
        """Remove a name, and the version with it when nothing else names it."""
        digest = self.catalog.delete(name)
        if digest is not None:
            self.engine.handle(Forget(Digest(digest)))
            self.catalog.remove_version(digest)

    def run(self, submits: Sequence[Submit]) -> dict[RequestId, list[int]]:
        """Run requests to their ends and return their tokens. Raises RequestFailed when one ends with an error."""
        tokens: dict[RequestId, list[int]] = {submit.id: [] for submit in submits}
        open_ids = set(tokens)
        for submit in submits:
            self.engine.handle(submit)
        try:
            while open_ids:
                if not self.engine.scheduler.running:
                    time.sleep(LOAD_POLL_S if self.engine.residency.busy() else 0)
                for event in self.engine.step():
                    if isinstance(event, Failed) and event.id in open_ids:
                        raise RequestFailed(event)
                    if isinstance(event, Tokens) and event.id in open_ids:
                        tokens[event.id] += event.tokens
                        if event.finish is not None:
                            open_ids.discard(event.id)
        finally:
            for id in open_ids:
                self.engine.handle(Abort(id))
        return tokens

    def _prepare(self, digest: Digest) -> Prepared:
        self.engine.handle(Prepare(digest))
        while True:
            # stepping without pause would keep the interpreter from the loader's thread
            time.sleep(LOAD_POLL_S)
            for event in self.engine.step():
                if isinstance(event, Prepared) and event.digest == digest:
                    return event
                if isinstance(event, Refused) and event.digest == digest:
                    raise AdapterRefused(event)
