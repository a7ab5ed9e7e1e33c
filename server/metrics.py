"""What the server counts and measures, for Prometheus. The only module that knows Prometheus.

Every label set exists from the start and no label holds a name that callers choose, so the number of series
is a constant: it does not grow with adapters, requests or callers. Figures per adapter belong to an RPC.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import get_args
from wsgiref.simple_server import WSGIServer

from grpc import StatusCode
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from weft.server.engine.messages import EngineInfo, RestartCause, StepStats
from weft.server.errors import TABLE
from weft.server.version import VERSION, commit

# edges of the OpenTelemetry conventions for generative models where they name some
TTFT_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    30.0,
    60.0,
)
PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION_S = tuple(0.01 * 2**i for i in range(17))
TOKENS = tuple(float(4**i) for i in range(9))
ROWS = tuple(float(2**i) for i in range(12))

FINISHES = ("stop", "length", "cancelled", "deadline", "error")
MEMORY_KINDS = ("backbone", "adapters", "composed", "shared", "kv", "working_set")
# on a CPU the host is the device
MEMORY_TIERS = ("device",)
ADAPTER_STATES = ("active", "incompatible")
IMPLEMENTATIONS = ("torch", "triton")


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """How full the store is."""

    bytes: int
    objects: int
    free_bytes: int


class Metrics:
    """All instruments of one server in a registry of their own. Methods say what happened, not what to count."""

    def __init__(self, methods: Sequence[str]) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._methods = tuple(methods)
        self._kv_bytes_max = 0
        self._define_requests()
        self._define_engine()
        self._define_adapters()
        self._define_server()

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"weft_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"weft_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"weft_{name}", text, labels, registry=self.registry, buckets=buckets)

    def _define_requests(self) -> None:
        self._running = self._gauge("requests_running", "Requests in the engine's batch.")
        self._waiting = self._gauge("requests_waiting", "Requests accepted and not yet in the batch.")
        self._tokens_waiting = self._gauge("tokens_waiting", "Prompt plus completion tokens of waiting requests.")
        self._finished = self._counter("requests_finished", "Requests by how they ended.", ["finish_reason"])
        for finish in FINISHES:
            self._finished.labels(finish)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._request_generation = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", TOKENS
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Admission to first token.", TTFT_S)
        self._gap = self._histogram("inter_token_latency_seconds", "Gap between two tokens.", PER_TOKEN_S)
        self._prefill = self._histogram("request_prefill_seconds", "Leaving the queue to first token.", TTFT_S)
        self._decode = self._histogram("request_decode_seconds", "First to last token.", DURATION_S)
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Mean gap between the tokens of a request that has several.", PER_TOKEN_S
        )
        self._duration = self._histogram("request_duration_seconds", "Admission to last token.", DURATION_S)
        self._queue = self._histogram("request_queue_seconds", "Admission to the batch.", TTFT_S)
        self._adapter_wait = self._histogram(
            "request_adapter_wait_seconds", "Part of the queue time spent on loading the adapter.", TTFT_S
        )

    def _define_engine(self) -> None:
        self._step = self._histogram("step_seconds", "Duration of one engine step.", PER_TOKEN_S)
        self._rows = self._histogram("batch_rows", "Token rows computed in one step.", ROWS)
        self._distinct = self._histogram("batch_adapters", "Distinct adapters in one step.", ROWS)
        self._rows_max = self._gauge("batch_rows_max", "Most token rows that one step has had.")
        self._distinct_max = self._gauge("batch_adapters_max", "Most distinct adapters that one step has had.")
        self._most_rows = self._most_distinct = 0
        self._kv_ratio = self._gauge("kv_cache_usage_ratio", "Part of the memory for keys and values in use.")
        self._memory = self._gauge("memory_bytes", "Memory in use.", ["kind", "tier"])
        for kind in MEMORY_KINDS:
            for tier in MEMORY_TIERS:
                self._memory.labels(kind, tier)
        self._misses = self._counter("working_set_misses", "Adapters of a step without room in the working set.")
        self._engine_up = self._gauge("engine_up", "1 while the engine process serves.")
        text = "Times the engine process was started again because it ended, did not start, or was silent."
        self._engine_restarts = self._counter("engine_restarts", text, ["cause"])
        for cause in get_args(RestartCause):
            self._engine_restarts.labels(cause)
        self._last_step = self._gauge("engine_last_step_timestamp_seconds", "Unix time of the last engine step.")
        self._kernels = self._gauge("kernels_info", "1 for the kernels in use.", ["implementation"])
        for implementation in IMPLEMENTATIONS:
            self._kernels.labels(implementation)

    def _define_adapters(self) -> None:
        self._adapters = self._gauge("adapters", "Registered names by state.", ["state"])
        for state in ADAPTER_STATES:
            self._adapters.labels(state)
        self._resident = self._gauge("adapters_resident", "Adapters in the engine's memory.")
        self._loads = self._counter("adapter_loads", "Adapters loaded into the engine's memory.")
        self._evictions = self._counter("adapter_evictions", "Adapters evicted from the engine's memory.")
        self._hits = self._counter("adapter_hits", "Requests that found their adapter loaded.")
        self._load_s = self._histogram("adapter_load_seconds", "Time to load one adapter.", TTFT_S)
        self._store_bytes = self._gauge("store_bytes", "Bytes of the files of all versions that have a name.")
        self._store_objects = self._gauge("store_objects", "Versions that have a name.")
        self._store_free = self._gauge("store_free_bytes", "Bytes left where the store lies.")
        self._uploads = self._gauge("uploads_in_progress", "Uploads running.")
        self._upload_bytes = self._counter("upload_bytes", "Bytes of weights received.")

    def _define_server(self) -> None:
        self._rpc_started = self._counter("rpc_started", "Calls begun.", ["method"])
        self._rpc_completed = self._counter("rpc_completed", "Calls ended.", ["method", "code"])
        self._rpc_duration = self._histogram("rpc_duration_seconds", "Duration of a call.", DURATION_S, ["method"])
        for method in self._methods:
            self._rpc_started.labels(method)
            self._rpc_duration.labels(method)
            for code in StatusCode:
                self._rpc_completed.labels(method, code.name)
        self._streams = self._gauge("streams_open", "Answers that are being streamed.", ["method"])
        self._errors = self._counter("errors", "Calls ended with an error, by its reason.", ["code", "reason"])
        for row in TABLE.values():
            self._errors.labels(row.code.name, row.reason)
        self._ready = self._gauge("ready", "1 while the server takes requests.")
        self._draining = self._gauge("draining", "1 while the server finishes its last requests.")
        self._loop_lag = self._histogram("event_loop_lag_seconds", "Lateness of the front's timers.", PER_TOKEN_S)
        build = self._gauge(
            "build_info", "1 for the version and, in a checkout, commit that run.", ["version", "commit"]
        )
        build.labels(VERSION, commit()).set(1)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def serve(self, host: str, port: int) -> tuple[WSGIServer, Thread]:
        """Serve ``/metrics`` from a thread; raises OSError when the port is taken."""
        return start_http_server(port, host, self.registry)

    # calls

    def rpc_started(self, method: str) -> None:
        """A call reached the edge."""
        self._rpc_started.labels(method).inc()

    def rpc_completed(self, method: str, code: StatusCode, duration_s: float) -> None:
        """A call left the edge."""
        self._rpc_completed.labels(method, code.name).inc()
        self._rpc_duration.labels(method).observe(duration_s)

    def streaming(self, method: str, change: int) -> None:
        """A streamed answer began (+1) or ended (-1); 0 makes the series of a method that streams."""
        self._streams.labels(method).inc(change)

    def error(self, code: StatusCode, reason: str) -> None:
        """A caller was told an error."""
        self._errors.labels(code.name, reason).inc()

    def uploading(self, change: int) -> None:
        """An upload began (+1) or ended (-1)."""
        self._uploads.inc(change)

    def uploaded(self, nbytes: int) -> None:
        """Bytes of weights arrived."""
        self._upload_bytes.inc(nbytes)

    # requests

    def admitted(self, prompt_tokens: int) -> None:
        """A request entered the queue."""
        self._prompt_tokens.inc(prompt_tokens)
        self._request_prompt.observe(prompt_tokens)

    def queued(self, requests: int, tokens: int) -> None:
        """The queue has this length now."""
        self._waiting.set(requests)
        self._tokens_waiting.set(tokens)

    def running(self, requests: int) -> None:
        """This many requests left the queue and have not ended."""
        self._running.set(requests)

    def scheduled(self, queue_s: float, adapter_wait_s: float) -> None:
        """A request left the queue."""
        self._queue.observe(queue_s)
        self._adapter_wait.observe(adapter_wait_s)

    def first_token(self, ttft_s: float, prefill_s: float) -> None:
        """A request has its first token, this long after its admission and after it left the queue."""
        self._ttft.observe(ttft_s)
        self._prefill.observe(prefill_s)

    def more_tokens(self, count: int, gap_s: float) -> None:
        """A request has more tokens, the first of them this long after the last."""
        for _ in range(count):
            self._gap.observe(gap_s / count)

    def generated(self, count: int) -> None:
        """Tokens arrived from the engine."""
        self._generation_tokens.inc(count)

    def finished(self, finish: str, duration_s: float, tokens: int) -> None:
        """A request ended; ``finish`` is one of FINISHES."""
        self._finished.labels(finish).inc()
        self._duration.observe(duration_s)
        self._request_generation.observe(tokens)

    def decoded(self, decode_s: float, tokens: int) -> None:
        """A request that has tokens ended, this long between the first and the last of them."""
        self._decode.observe(decode_s)
        if tokens > 1:
            self._per_token.observe(decode_s / (tokens - 1))

    # engine

    def engine_ready(self, info: EngineInfo) -> None:
        """An engine process serves from now on."""
        self._engine_up.set(1)
        self._kv_bytes_max = info.kv_bytes_max
        for implementation in IMPLEMENTATIONS:
            self._kernels.labels(implementation).set(implementation == info.kernels)

    def engine_lost(self) -> None:
        """The engine process died; its memory went with it."""
        self._engine_up.set(0)
        self._kv_ratio.set(0)
        self._resident.set(0)
        for kind in MEMORY_KINDS:
            for tier in MEMORY_TIERS:
                self._memory.labels(kind, tier).set(0)

    def engine_restarted(self, cause: RestartCause) -> None:
        """The engine process is being started again."""
        self._engine_restarts.labels(cause).inc()

    def step(self, stats: StepStats) -> None:
        """The engine made a step."""
        self._last_step.set_to_current_time()
        if stats.rows:
            # the others only tell how things stand
            self._step.observe(stats.step_s)
            self._rows.observe(stats.rows)
            self._distinct.observe(stats.distinct_adapters)
        self._most_rows = max(self._most_rows, stats.rows)
        self._most_distinct = max(self._most_distinct, stats.distinct_adapters)
        self._rows_max.set(self._most_rows)
        self._distinct_max.set(self._most_distinct)
        self._kv_ratio.set(stats.kv_bytes / self._kv_bytes_max if self._kv_bytes_max else 0)
        self._resident.set(stats.adapters_resident)
        values = (
            stats.backbone_bytes,
            stats.adapters_bytes,
            stats.composed_bytes,
            stats.shared_bytes,
            stats.kv_bytes,
            stats.working_set_bytes,
        )  # fmt: skip
        for kind, value in zip(MEMORY_KINDS, values, strict=True):
            self._memory.labels(kind, MEMORY_TIERS[0]).set(value)
        self._misses.inc(stats.working_set_misses)
        self._loads.inc(stats.adapter_loads)
        self._evictions.inc(stats.adapter_evictions)
        self._hits.inc(stats.adapter_hits)
        for load_s in stats.adapter_load_s:
            self._load_s.observe(load_s)

    # server

    def count_adapters(self, counts: Callable[[], dict[str, int]]) -> None:
        """Ask ``counts`` for the names by state whenever metrics are read, from the reading thread."""
        for state in ADAPTER_STATES:
            self._adapters.labels(state).set_function(partial(_count, counts, state))

    def measure_store(self, usage: Callable[[], StoreUsage]) -> None:
        """Ask ``usage`` how full the store is whenever metrics are read, from the reading thread."""
        self._store_bytes.set_function(lambda: usage().bytes)
        self._store_objects.set_function(lambda: usage().objects)
        self._store_free.set_function(lambda: usage().free_bytes)

    def ready(self, ready: bool) -> None:
        """The server takes requests, or does not."""
        self._ready.set(ready)

    def draining(self) -> None:
        """The server began to drain."""
        self._draining.set(1)

    def loop_lag(self, lag_s: float) -> None:
        """A timer of the event loop fired this late."""
        self._loop_lag.observe(lag_s)


def _count(counts: Callable[[], dict[str, int]], state: str) -> int:
    return counts()[state]
