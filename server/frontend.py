"""The front process put together: store, engine, doors. Whoever starts it decides when it stops.

Start: the port is taken and health says NOT_SERVING, the engine loads, adapters given on the command line are
registered, health says SERVING. Drain is the way back.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from weft.adapters_store.catalog import Catalog
from weft.adapters_store.errors import AdapterError
from weft.server import errors
from weft.server.config import ConfigError, ServerConfig, parse_address, parse_preload, shown_address
from weft.server.doors import door
from weft.server.doors.adapters import AdapterService
from weft.server.doors.auth import Bearer
from weft.server.doors.edge import Edge
from weft.server.doors.health import Health
from weft.server.doors.inference import InferenceService
from weft.server.doors.info import ServerService
from weft.server.engine.messages import EngineInfo, Event, RestartCause
from weft.server.metrics import Metrics
from weft.server.registration import Registrar, read_folder
from weft.server.relay import QueueLimits, Relay
from weft.server.supervisor import ENGINE, RestartPolicy, Supervisor
from weft.server.text import Tokenizer
from weft.server.threads import Threads

logger = logging.getLogger(__name__)

# what balancers and orchestrators may ask for by name
LIVENESS = "liveness"
READINESS = ("", "readiness", door.INFERENCE.full_name, door.ADAPTERS.full_name, door.SERVER.full_name)
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LAG_PERIOD_S = 0.25
# time for the last bytes of calls that are done
FAREWELL_S = 2.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the server listens; ``metrics`` is empty when its port could not be had."""

    grpc: str
    metrics: str


def backbone_folder(model: str) -> Path:
    """The folder with the backbone's tokenizer; of a hub name only these few files are fetched here."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    # not for those who serve a local folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=list(TEXT_FILES)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"model must be a local folder or a reachable hub model, got {model!r}: {error}") from None


class Frontend:
    """Everything in the front process. ``stopped`` is set with the reason when the engine cannot be kept up."""

    def __init__(self, config: ServerConfig, target: str = ENGINE) -> None:
        self.health = Health(dict.fromkeys(READINESS, False) | {LIVENESS: True})
        self.metrics = Metrics(door.METHODS)
        self._config = config
        self._tasks: list[asyncio.Task[None]] = []
        self._metrics_server: tuple[WSGIServer, Thread] | None = None
        self._server: Any = None
        self._serving = False
        policy = RestartPolicy(failures_max=config.engine_failures_max, stall_s_max=config.engine_stall_s_max)
        self.supervisor = Supervisor(config.engine(), self, policy, target)
        limits = QueueLimits(config.queue_requests_max, config.queue_tokens_max)
        self.relay = Relay(self.supervisor, limits, self.metrics)
        self._disk = Threads("store", config.uploads_max + 2)
        self._encoders = Threads("encode", 2)
        root = Path(config.store)
        self._catalog = Catalog.open(root)
        for problem in self._catalog.problems:
            logger.warning("store: %s", problem)
        self.registrar = Registrar(root, self._catalog, self.relay, self._disk, self.metrics)

    @property
    def busy(self) -> bool:
        """Whether the engine owes somebody an event."""
        return self.relay.busy

    def engine_ready(self, info: EngineInfo) -> None:
        """An engine serves from now on."""
        self.relay.engine_ready(info)
        self.registrar.review(info)
        self._report()

    def engine_lost(self) -> None:
        """The engine died; what was in flight is told, and nothing is sent here until the next one is ready."""
        self.relay.engine_lost()
        self._report()

    def engine_restarting(self, cause: RestartCause) -> None:
        """Another engine is being started."""
        self.metrics.engine_restarted(cause)

    def deliver(self, events: list[Event]) -> None:
        """Events of the engine."""
        self.relay.deliver(events)

    async def start(self) -> Addresses:
        """Bring everything up, and say where it is. Raises ConfigError, EngineFailed or AdapterError."""
        config = self._config
        tokenizer = await self._encoders.run(lambda: Tokenizer.load(backbone_folder(config.model)))
        edge = Edge(self.metrics, Bearer.from_file(config.token_file), config.write_stall_s_max)
        self._server = door.build(config, edge, self._servicers(tokenizer))
        host, _ = parse_address(config.listen, "listen")
        grpc = shown_address(host, door.bind(self._server, config))
        metrics = self._serve_metrics()
        await self._server.start()
        self._tasks.append(asyncio.create_task(self._watch()))
        await self.supervisor.start()
        for number, each in enumerate(config.adapter, 1):
            name, folder = parse_preload(each)
            logger.info("registering %s, adapter %d of %d", name, number, len(config.adapter))
            await self._preload(name, folder)
        self._serving = True
        self._report()
        return Addresses(grpc, metrics)

    async def drain(self) -> int:
        """Stop in good order: be left alone first, then take nothing new, then wait for what is in flight.

        Returns how many requests and registrations were cut off because they took longer than ``drain_timeout_s``.
        """
        cut = 0
        self._serving = False
        self._report()
        self.metrics.draining()
        await asyncio.sleep(self._config.drain_lag_s)
        self.relay.draining = True
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self.relay.idle()
                await self.registrar.idle()
        except TimeoutError:
            cut = self.relay.in_flight + self.registrar.arriving
            self.relay.fail_all(errors.Draining("the server stopped before the request was done"))
        self.health.end()
        await self._server.stop(FAREWELL_S)
        return cut

    async def close(self) -> None:
        """End everything at once; after ``drain`` nothing is left to lose."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.health.end()
        if self._server is not None:
            await self._server.stop(None)
        await self.registrar.close()
        await self.supervisor.stop()
        self._encoders.close()
        self._disk.close()
        self._catalog.close()
        if self._metrics_server is not None:
            server, thread = self._metrics_server
            server.shutdown()
            server.server_close()
            thread.join()

    def _servicers(self, tokenizer: Tokenizer | None) -> door.Servicers:
        config = self._config
        return door.Servicers(
            inference=InferenceService(
                self.relay,
                self.registrar,
                tokenizer,
                self._encoders,
                new_tokens_default=config.new_tokens_default,
                duration_s_max=config.request_duration_s_max,
            ),
            adapters=AdapterService(
                self.relay,
                self.registrar,
                self.metrics,
                adapter_bytes_max=config.adapter_bytes_max,
                uploads_max=config.uploads_max,
                idle_s_max=config.upload_idle_s_max,
                duration_s_max=config.upload_duration_s_max,
            ),
            server=ServerService(config, self.relay, tokenizer),
            health=self.health,
        )

    def _serve_metrics(self) -> str:
        """Open the Prometheus door; a server without it is still a server."""
        host, port = parse_address(self._config.metrics_listen, "metrics_listen")
        try:
            self._metrics_server = self.metrics.serve(host, port)
        except OSError as error:
            logger.warning("metrics are not served: %s cannot be bound: %s", self._config.metrics_listen, error)
            return ""
        return shown_address(host, self._metrics_server[0].server_port)

    async def _preload(self, name: str, folder: str) -> None:
        arrival = await read_folder(name, Path(folder), self._disk)
        try:
            await self.registrar.register(arrival)
        except (AdapterError, errors.ServerError) as error:
            raise ConfigError(f"adapter {name} cannot be registered: {error}") from None

    def _report(self) -> None:
        """Tell balancers and metrics whether requests are taken."""
        serving = self._serving and self.relay.info is not None
        statuses = dict.fromkeys(READINESS, serving)
        statuses[door.ADAPTERS.full_name] = serving and self._catalog.writable
        self.health.set(statuses)
        self.metrics.ready(serving)

    async def _watch(self) -> None:
        """Measure how late the loop runs its timers, and notice a store that went read-only."""
        writable = True
        while True:
            due_s = time.monotonic() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            self.metrics.loop_lag(max(0.0, time.monotonic() - due_s))
            if self._catalog.writable != writable:
                writable = self._catalog.writable
                self._report()
