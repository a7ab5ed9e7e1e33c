"""Everything that a call can end with, and the one table that says which status becomes which class.

WeftError                   what all of them are; catch this one
├── InvalidRequest          change the request                                  INVALID_ARGUMENT, OUT_OF_RANGE
│   └── FolderInvalid       the folder holds no adapter that can be uploaded    found here, before anything is sent
├── Unauthenticated         send the right token                                UNAUTHENTICATED, PERMISSION_DENIED
├── NotFound                no adapter has this name                            NOT_FOUND
├── AlreadyExists           the name points to other bytes                      ALREADY_EXISTS
├── FailedPrecondition      the adapter does not fit the backbone loaded now    FAILED_PRECONDITION
├── ResourceExhausted       beyond a limit; waiting does not help               RESOURCE_EXHAUSTED
├── Unavailable             nobody answers, or not now: try again               UNAVAILABLE, ABORTED
├── DeadlineExceeded        the timeout of the call or of the server passed     DEADLINE_EXCEEDED
├── Cancelled               the server ended the call                           CANCELLED
├── DataLoss                stored bytes are damaged: register them again       DATA_LOSS
└── ServerFault             a bug of the server, or of the two together         everything else

Details that the server sends along (reason, field violations, when to try again) become attributes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request, by its path, and what is wrong with it."""

    field: str
    description: str


class WeftError(Exception):
    """A call that did not succeed.

    code           canonical gRPC name, e.g. ``NOT_FOUND``
    reason         machine-readable, e.g. ``ADAPTER_NOT_FOUND``; empty when no weft server said it
    violations     the fields at fault
    retry_after_s  when another attempt makes sense, in seconds; None when the server did not say
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = violations
        self.retry_after_s = retry_after_s


class InvalidRequest(WeftError):
    """The request must be changed; ``violations`` names the fields."""


class FolderInvalid(InvalidRequest):
    """The folder holds no adapter that can be uploaded; nothing was sent."""


class Unauthenticated(WeftError):
    """No token, a wrong one, or one that may not do this."""


class NotFound(WeftError):
    """No adapter has this name."""


class AlreadyExists(WeftError):
    """The name points to other bytes."""


class FailedPrecondition(WeftError):
    """The adapter cannot be served by the backbone that is loaded now."""


class ResourceExhausted(WeftError):
    """Beyond a limit of the server; sending the same again does not help."""


class Unavailable(WeftError):
    """Nobody answers at this address, or the server cannot take it now; another attempt may succeed."""


class DeadlineExceeded(WeftError):
    """The timeout of this call, or the server's longest duration, passed."""


class Cancelled(WeftError):
    """The call was ended before it was done."""


class DataLoss(WeftError):
    """The server's stored copy is damaged."""


class ServerFault(WeftError):
    """The server failed, or said something that this client does not understand."""


CLASSES: dict[str, type[WeftError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": Unauthenticated,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "FAILED_PRECONDITION": FailedPrecondition,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "UNAVAILABLE": Unavailable,
    "ABORTED": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "DATA_LOSS": DataLoss,
}


def invalid_field(field: str, message: str) -> InvalidRequest:
    """A field that cannot even be sent; it reads like the server's own refusals."""
    violation = FieldViolation(field, message)
    return InvalidRequest(message, code="INVALID_ARGUMENT", reason="INVALID_REQUEST", violations=(violation,))


def not_understood(what: str) -> ServerFault:
    """The server sent something outside the contract that this client was made for."""
    return ServerFault(f"{what}; is the server of another version than this client?", code="INTERNAL")


@contextmanager
def weft_errors() -> Iterator[None]:
    """Turn the error of a gRPC call, sync or async, into one of ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_call(error) from None
    except grpc.FutureCancelledError:
        raise Cancelled("the client was closed during the call", code="CANCELLED") from None


def from_call(call: grpc.RpcError) -> WeftError:
    """Read status, text and details of a call that ended; ``call`` also answers ``code()`` and its like."""
    code = call.code().name
    reason = ""
    retry_after_s = None
    violations: tuple[FieldViolation, ...] = ()
    for detail in _details(call.trailing_metadata() or ()):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason = detail.reason
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.ToTimedelta().total_seconds()
        elif isinstance(detail, error_details_pb2.BadRequest):
            violations = tuple(FieldViolation(each.field, each.description) for each in detail.field_violations)
    return CLASSES.get(code, ServerFault)(
        call.details() or code, code=code, reason=reason, violations=violations, retry_after_s=retry_after_s
    )


def _details(metadata: Iterable[tuple[str, str | bytes]]) -> Iterator[object]:
    """The details of the kinds that we read; other kinds are for other readers."""
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest)
    packed = next((value for key, value in metadata if key == DETAILS_KEY), None)
    if packed is None:
        return
    try:
        boxes = status_pb2.Status.FromString(packed).details
        for box in boxes:
            for kind in kinds:
                if box.Is(kind.DESCRIPTOR):
                    yield kind.FromString(box.value)
    except DecodeError:
        # whoever answered is no weft server; its code and text still count
        return
