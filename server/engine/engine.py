"""The engine: requests in, tokens out, one step at a time. Runs in its own process, or in yours for tests and scripts.

Knows nothing of gRPC, text or names: adapters are digests of versions that lie in the store.
"""

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
import transformers

from weft.adapters_store.arena import Arena
from weft.adapters_store.leases import PrepareResult
from weft.adapters_store.residency import Residency
from weft.kernels import dispatch
from weft.server.backbone.load import choose_device, choose_dtype, load_model
from weft.server.backbone.model import Backbone, kv_slots
from weft.server.backbone.step import PagedKV
from weft.server.engine.config import EngineConfig
from weft.server.engine.failures import failure_of, out_of_memory
from weft.server.engine.generation import default_sampling, eos_ids, unserved
from weft.server.engine.messages import (
    Abort,
    Command,
    Digest,
    EngineInfo,
    Event,
    Failure,
    Forget,
    Prepare,
    Prepared,
    Refused,
    StepStats,
    Submit,
)
from weft.server.engine.pages import PagePool
from weft.server.engine.request import Request
from weft.server.engine.runner import Runner
from weft.server.engine.scheduler import Batch, Scheduler

HEARTBEAT_S = 1.0

logger = logging.getLogger(__name__)


class Engine:
    """One backbone, its adapters, and the requests on them. Not thread-safe: one thread calls everything."""

    def __init__(self, config: EngineConfig, backbone: Backbone, clock: Callable[[], float] = time.monotonic):
        self.config = config
        self.backbone = backbone
        self._clock = clock
        # an idle engine takes no steps, so what changed the gauges last must still be told
        self._gauges_changed = False
        self._told_s = clock()
        self._misses = 0
        with _room_for("adapter_memory_bytes_max", config.adapter_memory_bytes_max, backbone.device):
            self.arena = Arena(config.adapter_memory_bytes_max, backbone.device)
        geometry = backbone.geometry
        with _room_for("working_set_bytes_max", config.working_set_bytes_max, backbone.device):
            self.kernels = dispatch.load(config.kernels, self.arena.buffer, geometry, config.working_set_bytes_max)
        size = config.page_tokens
        pages = kv_slots(backbone.kv_shapes, config.kv_bytes_max, backbone.dtype) // size
        kv = _allocate_kv(backbone, config, pages)
        self._page_bytes = size * kv.token_bytes(backbone.kv_shapes, backbone.dtype)
        self.runner = Runner(backbone, self.kernels, kv, size)
        self.residency = Residency(Path(config.store), backbone, geometry, self.arena, self.runner.forget)
        self.pages = PagePool(pages, size)
        limits = config.batch_tokens_max, config.batch_requests_max
        self.scheduler = Scheduler(self.pages, self.residency, *limits, clock)

    @classmethod
    def load(cls, config: EngineConfig) -> "Engine":
        """Load the backbone that the configuration names, then the engine around it."""
        device = choose_device(config.device)
        model = load_model(config.model, choose_dtype(config.dtype, device), device)
        return cls(config, Backbone(model))

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do now."""
        return bool(self.scheduler.running or self.scheduler.waiting or self.residency.busy())

    def handle(self, command: Command) -> None:
        """Take in a command from the front; what comes of it is in the events of later steps."""
        match command:
            case Submit():
                self.scheduler.submit(Request(command, self._clock()))
            case Abort(id):
                self.scheduler.abort(id)
                self._gauges_changed = True
            case Prepare(digest):
                self.residency.prepare(digest)
            case Forget(digest):
                self.residency.forget(digest)
                self._gauges_changed = True

    def step(self) -> list[Event]:
        """Run one step: plan, run, commit. Returns what happened; empty when there was nothing to do.

        While only the loader works, figures come every HEARTBEAT_S: whoever waits knows that the engine lives.
        """
        started = self._clock()
        events: list[Event] = list(map(_result_event, self.residency.poll()))
        batch = self.scheduler.plan()
        events += self._run(batch) if batch.items else self.scheduler.drain_events()
        silent = self.residency.busy() and started - self._told_s >= HEARTBEAT_S
        if events or batch.items or self._gauges_changed or silent:
            self._gauges_changed, self._told_s = False, started
            events.append(self._stats(batch, self._clock() - started))
        return events

    def info(self) -> EngineInfo:
        """What the engine is, for the front and its callers."""
        config, model = self.config, self.backbone.model
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": _triton_version(),
        }
        return EngineInfo(
            catalogue=self.backbone.info,
            family=model.config.model_type,
            parameters=self.backbone.parameter_count,
            dtype=self.backbone.info.dtype,
            vocabulary=self.backbone.vocabulary,
            context_tokens=self.backbone.context_tokens,
            eos_ids=eos_ids(model),
            default_sampling=default_sampling(model.generation_config),
            device=_device_name(self.backbone),
            kernels=self.kernels.name,
            notes=(*self.backbone.notes, *unserved(model.generation_config)),
            versions=versions,
            kv_bytes_max=config.kv_bytes_max,
            adapter_bytes_max=config.adapter_memory_bytes_max,
        )

    def stats(self) -> StepStats:
        """The gauges of an engine at rest."""
        return self._stats(Batch(()), 0.0)

    def _run(self, batch: Batch) -> list[Event]:
        """Run the batch; where that fails, its halves, so that only requests that fail alone end.

        Nothing of a batch that failed was committed, and running a token again writes the same keys and values again.
        """
        try:
            sampled = self.runner.run(batch)
        except torch.AcceleratorError:
            # the device's context is lost: only a new process gets a working one
            raise
        except Exception as error:
            # one of the three broad excepts: whatever breaks a step must not take the other requests with it
            if len(batch.items) == 1:
                logger.exception("a step over one request failed: %d rows", batch.tokens)
                return self.scheduler.fail(batch, *_failure_of_step(error))
            said = type(error).__name__, len(batch.items), batch.tokens
            logger.warning("step failed, is run again in halves: %s, %d requests, %d rows", *said)
        else:
            return self.scheduler.commit(batch, sampled)
        half = len(batch.items) // 2
        return self._run(Batch(batch.items[:half])) + self._run(Batch(batch.items[half:]))

    def _stats(self, batch: Batch, step_s: float) -> StepStats:
        memory = self.residency.stats()
        return StepStats(
            step_s=step_s,
            rows=batch.tokens,
            distinct_adapters=batch.distinct_adapters,
            kv_bytes=self.pages.used * self._page_bytes,
            backbone_bytes=self.backbone.parameter_bytes,
            adapters_bytes=memory.adapters_bytes,
            adapters_resident=memory.adapters_resident,
            composed_bytes=memory.composed_bytes,
            shared_bytes=memory.shared_bytes,
            working_set_bytes=self.kernels.working_set_bytes,
            working_set_misses=self._take_misses(),
            adapter_loads=memory.loads,
            adapter_evictions=memory.evictions,
            adapter_hits=self.scheduler.drain_hits(),
            adapter_load_s=memory.load_s,
        )

    def _take_misses(self) -> int:
        """Sections that found no room in the working set since the last call; the first is worth a line."""
        before, self._misses = self._misses, self.kernels.working_set_misses
        if not before and self._misses:
            limit = self.config.working_set_bytes_max
            logger.warning("working_set_bytes_max: %d bytes are too few for the adapters of one step: slower", limit)
        return self._misses - before


@contextmanager
def _room_for(option: str, nbytes: int, device: torch.device) -> Iterator[None]:
    """Raise ValueError naming the option where there is no memory for what it says."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(f"{option}: expected memory for {nbytes} bytes on {device}, got too little") from error


def _allocate_kv(backbone: Backbone, config: EngineConfig, pages: int) -> PagedKV:
    """The pages of all keys and values; raises ValueError naming kv_bytes_max where it cannot be."""
    size, limit = config.page_tokens, config.kv_bytes_max
    if pages < 2:
        raise ValueError(f"kv_bytes_max: expected room for at least 2 pages of {size} tokens, got {limit} bytes")
    with _room_for("kv_bytes_max", limit, backbone.device):
        kv = PagedKV(backbone.kv_shapes, pages * size, backbone.dtype, backbone.device)
    kv.clear_scratch(size)
    return kv


def _result_event(result: PrepareResult) -> Event:
    if result.error is None:
        assert result.report is not None
        return Prepared(Digest(result.digest), result.report)
    error = result.error
    return Refused(Digest(result.digest), failure_of(error), str(error), error.field)


def _failure_of_step(error: Exception) -> tuple[Failure, str]:
    """What a request is told that a step over it alone could not be run."""
    if out_of_memory(error):
        return Failure.OUT_OF_MEMORY, "expected memory for a step over this request alone, got none"
    return Failure.BUG, "the step that this request was part of failed"


def _device_name(backbone: Backbone) -> str:
    device = backbone.device
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device}, linears by {backbone.linears}"


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"
