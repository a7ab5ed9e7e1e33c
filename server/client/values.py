"""What goes into a call and what comes out of it, as plain frozen values; nothing here knows the wire.

The fields mean what the fields of the same name in ``proto/v1`` say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; the role is usually ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


class FinishReason(StrEnum):
    """Why generation ended without error."""

    STOP = "stop"
    LENGTH = "length"


class AdapterState(StrEnum):
    """Whether requests may name the adapter."""

    ACTIVE = "active"
    INCOMPATIBLE = "incompatible"


@dataclass(frozen=True, slots=True)
class EffectiveParams:
    """The parameters a request ran with after the server filled in its defaults."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a stream: the request was admitted. No digest means the bare backbone."""

    request_id: str
    adapter_digest: str
    prompt_tokens: int
    effective: EffectiveParams


@dataclass(frozen=True, slots=True)
class Delta:
    """More of the completion. The text may be empty while a character or a possible stop string is incomplete."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a stream: the completion is whole."""

    reason: FinishReason
    usage: Usage


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion. The text is empty when the backbone has no tokenizer."""

    text: str
    token_ids: tuple[int, ...]
    reason: FinishReason
    usage: Usage
    request_id: str
    adapter_digest: str
    effective: EffectiveParams


@dataclass(frozen=True, slots=True)
class SiteReport:
    """What an adapter compiled to at one module of the backbone; ``bytes`` are device bytes."""

    module: str
    operators: tuple[str, ...]
    rank: int
    bytes: int
    folds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A registered adapter. ``sites`` is empty in lists; ``create_time_ms`` counts from the Unix epoch."""

    name: str
    method: str
    dialect: str
    digest: str
    disk_bytes: int
    device_bytes: int
    site_count: int
    state: AdapterState
    state_reason: str
    create_time_ms: int
    sites: tuple[SiteReport, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Backbone:
    """The frozen model of the server."""

    name: str
    digest: str
    family: str
    parameters: int
    dtype: str
    vocabulary: int
    context_tokens: int
    site_count: int
    has_tokenizer: bool
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """The caps that requests and uploads meet."""

    upload_bytes_max: int
    uploads_max: int
    queue_requests_max: int
    queue_tokens_max: int
    batch_tokens_max: int
    request_duration_ms_max: int
    adapter_memory_bytes_max: int
    kv_bytes_max: int


@dataclass(frozen=True, slots=True)
class Runtime:
    """What computes; ``versions`` names Python, torch, transformers and triton.

    notes:  lines for the operator on what is slower than it could be, and on settings of the backbone not served
    """

    device: str
    kernels: str
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory by kind, in bytes."""

    backbone_bytes: int
    adapters_bytes: int
    adapters_resident: int
    kv_bytes: int
    working_set_bytes: int
    composed_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is: its backbone, its limits, what computes, and the methods it can register."""

    version: str
    backbone: Backbone
    limits: Limits
    runtime: Runtime
    memory: Memory
    methods: tuple[str, ...]
