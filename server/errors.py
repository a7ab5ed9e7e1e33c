"""Everything that can go wrong on the way through the server, and the one table that says what the caller is told.

ServerError
├── InvalidRequest          a field of the request is unacceptable          INVALID_ARGUMENT
│   ├── MalformedMessage    the bytes are not the message of this RPC
│   ├── PromptTooLong       prompt and completion do not fit the context
│   ├── TokenizerMissing    text or chat for a backbone that cannot encode it
│   ├── UploadInvalid       the pieces of an upload do not make up what its header says
│   ├── DigestMismatch      the bytes received are not the bytes announced
│   └── NonFiniteLogits     this adapter on this prompt computes NaN or infinity
├── Unauthenticated         no or wrong bearer token                        UNAUTHENTICATED
├── ServiceUnknown          health was asked of a service we do not have    NOT_FOUND
├── UploadStalled           an upload brought nothing for too long          ABORTED
├── UploadTooLarge          an upload beyond ``adapter_bytes_max``          RESOURCE_EXHAUSTED
├── RequestTooLarge         keys and values can never fit                   RESOURCE_EXHAUSTED
├── AnswerTooLarge          the answer is larger than a message             RESOURCE_EXHAUSTED
├── SlowConsumer            the caller does not read its stream             RESOURCE_EXHAUSTED
├── DeadlineExceeded        the caller's deadline or the server's maximum   DEADLINE_EXCEEDED
├── Unavailable             another attempt or another replica may succeed  UNAVAILABLE
│   ├── Overloaded          the queue is full
│   ├── UploadsBusy         as many uploads as may run are running
│   ├── EngineRestarting    the engine process died or is starting
│   ├── EngineMemory        a step over this request alone found no memory
│   └── Draining            this server is about to stop
└── EngineBug               the engine failed in a way that it should not   INTERNAL

AdapterError and its children, raised by the store, are in the table too. The errors know nothing of gRPC; the table is
the only place where both meet. Anything that is not in the table is a bug: the caller gets INTERNAL and an incident id,
the log gets the trace.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from grpc import StatusCode

from weft.adapters_store import errors as store


class ServerError(Exception):
    """An error that the caller is told about; ``field`` is the path of the request field at fault, or empty."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequest(ServerError):
    """The caller must change the request."""


class MalformedMessage(InvalidRequest):
    """The bytes are not the message of this RPC."""


class PromptTooLong(InvalidRequest):
    """Prompt and completion do not fit the context."""


class TokenizerMissing(InvalidRequest):
    """The backbone came without what this kind of prompt needs."""


class UploadInvalid(InvalidRequest):
    """The pieces of an upload do not make up what its header says."""


class DigestMismatch(InvalidRequest):
    """The bytes received are not the bytes announced."""


class NonFiniteLogits(InvalidRequest):
    """This adapter on this prompt computes NaN or infinity."""


class Unauthenticated(ServerError):
    """No or wrong bearer token."""


class ServiceUnknown(ServerError):
    """Health was asked of a service that is not served here."""


class UploadStalled(ServerError):
    """An upload brought nothing for too long."""


class UploadTooLarge(ServerError):
    """An upload beyond ``adapter_bytes_max``."""


class RequestTooLarge(ServerError):
    """The keys and values of this request can never fit."""


class AnswerTooLarge(ServerError):
    """The answer is larger than a message may be."""


class SlowConsumer(ServerError):
    """The caller does not read its stream."""


class DeadlineExceeded(ServerError):
    """The caller's deadline or the server's longest duration passed."""


class Unavailable(ServerError):
    """Another attempt, or another replica, may succeed."""


class Overloaded(Unavailable):
    """The queue is full."""


class UploadsBusy(Unavailable):
    """As many uploads as may run are running."""


class EngineRestarting(Unavailable):
    """The engine process died or is starting."""


class EngineMemory(Unavailable):
    """A step over this request alone found no memory; others may leave some."""


class Draining(Unavailable):
    """This server is about to stop."""


class EngineBug(ServerError):
    """The engine failed in a way that it should not; the trace is in its log."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the caller is told: the status, the machine-readable reason, and when another attempt makes sense."""

    code: StatusCode
    reason: str
    retry_after_s: float | None = None


BUG = Row(StatusCode.INTERNAL, "BUG")

TABLE: Mapping[type[Exception], Row] = {
    InvalidRequest: Row(StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    MalformedMessage: Row(StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE"),
    PromptTooLong: Row(StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG"),
    TokenizerMissing: Row(StatusCode.INVALID_ARGUMENT, "TOKENIZER_MISSING"),
    UploadInvalid: Row(StatusCode.INVALID_ARGUMENT, "UPLOAD_INVALID"),
    DigestMismatch: Row(StatusCode.INVALID_ARGUMENT, "DIGEST_MISMATCH"),
    NonFiniteLogits: Row(StatusCode.INVALID_ARGUMENT, "NON_FINITE_LOGITS"),
    Unauthenticated: Row(StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID"),
    ServiceUnknown: Row(StatusCode.NOT_FOUND, "SERVICE_UNKNOWN"),
    UploadStalled: Row(StatusCode.ABORTED, "UPLOAD_STALLED"),
    UploadTooLarge: Row(StatusCode.RESOURCE_EXHAUSTED, "UPLOAD_TOO_LARGE"),
    RequestTooLarge: Row(StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE"),
    AnswerTooLarge: Row(StatusCode.RESOURCE_EXHAUSTED, "ANSWER_TOO_LARGE"),
    SlowConsumer: Row(StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER"),
    DeadlineExceeded: Row(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    Overloaded: Row(StatusCode.UNAVAILABLE, "OVERLOADED", retry_after_s=1.0),
    UploadsBusy: Row(StatusCode.UNAVAILABLE, "UPLOADS_BUSY", retry_after_s=5.0),
    EngineRestarting: Row(StatusCode.UNAVAILABLE, "ENGINE_RESTARTING", retry_after_s=2.0),
    EngineMemory: Row(StatusCode.UNAVAILABLE, "ENGINE_MEMORY", retry_after_s=2.0),
    Draining: Row(StatusCode.UNAVAILABLE, "DRAINING", retry_after_s=1.0),
    EngineBug: BUG,
    store.AdapterInvalid: Row(StatusCode.INVALID_ARGUMENT, "ADAPTER_INVALID"),
    store.AdapterTooLarge: Row(StatusCode.RESOURCE_EXHAUSTED, "ADAPTER_MEMORY"),
    store.AdapterCorrupt: Row(StatusCode.DATA_LOSS, "ADAPTER_CORRUPT"),
    store.AdapterNotFound: Row(StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"),
    store.AdapterExists: Row(StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS"),
    store.AdapterIncompatible: Row(StatusCode.FAILED_PRECONDITION, "ADAPTER_INCOMPATIBLE"),
    store.StoreFull: Row(StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
    store.StoreIOError: Row(StatusCode.INTERNAL, "STORE_IO_ERROR"),
    store.StoreBug: BUG,
}


def row(error: Exception) -> Row | None:
    """Return the table's row for the error's class, or for the nearest class above it; None for a bug."""
    for kind in type(error).__mro__:
        found = TABLE.get(kind)
        if found is not None:
            return found
    return None
