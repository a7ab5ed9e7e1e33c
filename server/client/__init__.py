"""weft for Python programs: ``Client`` for plain code, ``AsyncClient`` for asyncio, and the values both speak in.

    with Client("127.0.0.1:8470") as client:
        client.register("fr-legal", "adapters/fr-legal")
        for event in client.stream("Bonjour", adapter="fr-legal"):
            ...

Knows the contract (``weft.proto``) and nothing else of the project; imports no torch.
"""

from weft.client.aio import AsyncClient, AsyncStream
from weft.client.connection import DEFAULT_ADDRESS, Tls
from weft.client.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    FolderInvalid,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    ServerFault,
    Unauthenticated,
    Unavailable,
    WeftError,
)
from weft.client.requests import Adapters, GenerateOptions, Prompt
from weft.client.sync import Client, Stream
from weft.client.values import (
    Adapter,
    AdapterState,
    Backbone,
    Completion,
    Delta,
    EffectiveParams,
    Event,
    Finished,
    FinishReason,
    Limits,
    Memory,
    Message,
    Runtime,
    ServerInfo,
    SiteReport,
    Started,
    Usage,
)

__all__ = [
    "DEFAULT_ADDRESS",
    "Adapter",
    "AdapterState",
    "Adapters",
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "Backbone",
    "Cancelled",
    "Client",
    "Completion",
    "DataLoss",
    "DeadlineExceeded",
    "Delta",
    "EffectiveParams",
    "Event",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "FolderInvalid",
    "GenerateOptions",
    "InvalidRequest",
    "Limits",
    "Memory",
    "Message",
    "NotFound",
    "Prompt",
    "ResourceExhausted",
    "Runtime",
    "ServerFault",
    "ServerInfo",
    "SiteReport",
    "Started",
    "Stream",
    "Tls",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "WeftError",
]
