"""What crosses between the front process and the engine process: small, immutable, picklable values.

Knows nothing of gRPC, torch or the store. Weights never cross: they lie in the store as files named by digest.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NewType

from weft.adapters_store.report import AdapterReport
from weft.adapters_store.sites import CatalogueInfo

RequestId = NewType("RequestId", str)
Digest = NewType("Digest", str)


# why an engine is started again: it ended, it never came to serve, or it was silent for too long
RestartCause = Literal["exit", "start", "stall"]


class FinishReason(Enum):
    """Why a completion ended without error."""

    STOP = "stop"
    LENGTH = "length"


class Failure(Enum):
    """Why a request or a registration could not be served; the doors translate these to status codes."""

    ADAPTER_INVALID = "adapter_invalid"
    ADAPTER_TOO_LARGE = "adapter_too_large"
    ADAPTER_CORRUPT = "adapter_corrupt"
    ADAPTER_INCOMPATIBLE = "adapter_incompatible"
    STORE_FULL = "store_full"
    STORE_IO_ERROR = "store_io_error"
    REQUEST_TOO_LARGE = "request_too_large"
    NON_FINITE_LOGITS = "non_finite_logits"
    OUT_OF_MEMORY = "out_of_memory"
    BUG = "bug"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to pick each token. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a request. The front has validated it; ``stop_ids`` is empty when end-of-sequence is ignored.

    members:  what ``adapter`` is derived from, versions and their weights in order; empty for a registered version
    """

    id: RequestId
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    adapter: Digest | None = None
    stop_ids: frozenset[int] = frozenset()
    members: tuple[tuple[Digest, float], ...] = ()

    @property
    def versions(self) -> frozenset[Digest]:
        """The registered versions whose files it needs."""
        if self.members:
            return frozenset(digest for digest, _ in self.members)
        return frozenset() if self.adapter is None else frozenset({self.adapter})


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget a request; unknown or finished ids are ignored. No event follows."""

    id: RequestId


@dataclass(frozen=True, slots=True)
class Prepare:
    """Validate, compile and store the image of the version lying in the store under ``digest``."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Forget:
    """The version has no name any more: free its block once no request uses it, and delete its image."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Stop after this message; requests still running are dropped (the front has drained or given up)."""


Command = Submit | Abort | Prepare | Forget | Shutdown


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one request; ``finish`` is set with the last of them."""

    id: RequestId
    tokens: tuple[int, ...]
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error after whatever tokens came before."""

    id: RequestId
    failure: Failure
    message: str


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The request left the queue; times are seconds since submission."""

    id: RequestId
    queue_s: float
    adapter_wait_s: float


@dataclass(frozen=True, slots=True)
class Prepared:
    """Answer to ``Prepare``: the version can be served."""

    digest: Digest
    report: AdapterReport


@dataclass(frozen=True, slots=True)
class Refused:
    """Answer to ``Prepare``: the version cannot be served; ``field`` names the config key or tensor at fault."""

    digest: Digest
    failure: Failure
    message: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine is, sent once when it is ready.

    notes:  lines for the operator on what is slower than it could be, and on settings of the backbone not served
    """

    family: str
    parameters: int
    dtype: str
    vocabulary: int
    context_tokens: int
    eos_ids: tuple[int, ...]
    default_sampling: Sampling
    device: str
    kernels: str
    versions: dict[str, str]
    catalogue: CatalogueInfo
    kv_bytes_max: int
    adapter_bytes_max: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine serves from now on."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The engine cannot start with this configuration, and what to do about it."""

    message: str


@dataclass(frozen=True, slots=True)
class StepStats:
    """Figures of one engine step and gauges at its end; all memory in bytes, all times in seconds."""

    step_s: float
    rows: int
    distinct_adapters: int
    kv_bytes: int
    backbone_bytes: int
    adapters_bytes: int
    adapters_resident: int
    working_set_bytes: int
    composed_bytes: int = 0  # blocks of derived versions, which are not in adapters_bytes
    shared_bytes: int = 0  # blocks that several adapters refer to, neither
    working_set_misses: int = 0  # since the last step
    adapter_loads: int = 0  # since the last step
    adapter_evictions: int = 0  # since the last step
    adapter_hits: int = 0  # since the last step
    adapter_load_s: tuple[float, ...] = field(default=())  # one per load since the last step


Event = Tokens | Failed | Scheduled | Prepared | Refused | Ready | StartFailed | StepStats
