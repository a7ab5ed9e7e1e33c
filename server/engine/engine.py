"""The engine: requests in, tokens out, one step at a time. Runs in its own process, or in yours for tests and scripts.

Knows nothing of gRPC, text or names: adapters are digests of versions that lie in the store.
"""

import logging
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from weft.adapters_store.arena import Arena
from weft.adapters_store.leases import PrepareResult
from weft.adapters_store.residency import Residency
from weft.kernels import dispatch
from weft.server.backbone.load import choose_device, choose_dtype, load_model
from weft.server.backbone.model import Backbone, kv_slots
from weft.server.backbone.step import PagedKV
from weft.server.engine.config import EngineConfig
from weft.server.engine.failures import failure_of
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
    Sampling,
    StepStats,
    Submit,
)
from weft.server.engine.pages import PagePool
from weft.server.engine.request import Request
from weft.server.engine.runner import Runner
from weft.server.engine.scheduler import Batch, Scheduler

logger = logging.getLogger(__name__)


class Engine:
    """One backbone, its adapters, and the requests on them. Not thread-safe: one thread calls everything."""

    def __init__(self, config: EngineConfig, backbone: Backbone, clock: Callable[[], float] = time.monotonic):
        self.config = config
        self.backbone = backbone
        self._clock = clock
        # an idle engine takes no steps, so what changed the gauges last must still be told
        self._gauges_changed = False
        self.arena = Arena(config.adapter_memory_bytes_max, backbone.device)
        geometry = backbone.geometry
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
        """Run one step: plan, run, commit. Returns what happened; empty when there was nothing to do."""
        started = self._clock()
        events: list[Event] = list(map(_result_event, self.residency.poll()))
        batch = self.scheduler.plan()
        events += self._run(batch) if batch.items else self.scheduler.drain_events()
        if events or batch.items or self._gauges_changed:
            self._gauges_changed = False
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
            eos_ids=_eos_ids(model),
            default_sampling=_default_sampling(model),
            device=_device_name(self.backbone),
            kernels=self.kernels.name,
            versions=versions,
            kv_bytes_max=config.kv_bytes_max,
            adapter_bytes_max=config.adapter_memory_bytes_max,
        )

    def stats(self) -> StepStats:
        """The gauges of an engine at rest."""
        return self._stats(Batch(()), 0.0)

    def _run(self, batch: Batch) -> list[Event]:
        try:
            sampled = self.runner.run(batch)
        except torch.AcceleratorError:
            # the device's context is lost: only a new process gets a working one
            raise
        except Exception:
            # one of the three broad excepts: whatever breaks a step must not take the other requests with it
            logger.exception("step failed: %d requests, %d rows", len(batch.items), batch.tokens)
            return self.scheduler.fail(batch, Failure.BUG, "the step that this request was part of failed")
        return self.scheduler.commit(batch, sampled)

    def _stats(self, batch: Batch, step_s: float) -> StepStats:
        memory = self.residency.stats()
        waiting = self.scheduler.waiting
        return StepStats(
            step_s=step_s,
            rows=batch.tokens,
            prefill_tokens=batch.prefill_tokens,
            distinct_adapters=batch.distinct_adapters,
            requests_running=len(self.scheduler.running),
            requests_waiting=len(waiting),
            tokens_waiting=sum(request.length_max for request in waiting),
            kv_bytes=self.pages.used * self._page_bytes,
            backbone_bytes=self.backbone.parameter_bytes,
            adapters_bytes=memory.adapters_bytes,
            adapters_resident=memory.adapters_resident,
            composed_bytes=memory.composed_bytes,
            shared_bytes=memory.shared_bytes,
            working_set_bytes=self.kernels.working_set_bytes,
            adapter_loads=memory.loads,
            adapter_evictions=memory.evictions,
            adapter_hits=self.scheduler.drain_hits(),
            adapter_load_s=memory.load_s,
        )


def _allocate_kv(backbone: Backbone, config: EngineConfig, pages: int) -> PagedKV:
    """The pages of all keys and values; raises ValueError naming kv_bytes_max where it cannot be."""
    size, limit = config.page_tokens, config.kv_bytes_max
    if pages < 2:
        raise ValueError(f"kv_bytes_max: expected room for at least 2 pages of {size} tokens, got {limit} bytes")
    try:
        kv = PagedKV(backbone.kv_shapes, pages * size, backbone.dtype, backbone.device)
    except RuntimeError as error:
        raise ValueError(f"kv_bytes_max: expected memory for {limit} bytes on {backbone.device}, got none") from error
    kv.clear_scratch(size)
    return kv


def _result_event(result: PrepareResult) -> Event:
    if result.error is None:
        assert result.report is not None
        return Prepared(Digest(result.digest), result.report)
    error = result.error
    return Refused(Digest(result.digest), failure_of(error), str(error), error.field)


def _eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    generation = model.generation_config
    found = None if generation is None else generation.eos_token_id
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def _default_sampling(model: PreTrainedModel) -> Sampling:
    """What generation_config says, greedy where it does not ask for sampling."""
    generation = model.generation_config
    if generation is None or not generation.do_sample:
        return Sampling()
    return Sampling(
        temperature=1.0 if generation.temperature is None else float(generation.temperature),
        top_k=generation.top_k or 0,
        top_p=1.0 if generation.top_p is None else float(generation.top_p),
    )


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
