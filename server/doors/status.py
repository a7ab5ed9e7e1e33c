"""Turns errors into what goes over the wire: a status code, a text, and details that machines can read.

Knows gRPC's rich error model; which error gets which code is ``weft.server.errors``'s to say.
"""

import secrets
from dataclasses import dataclass

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from weft.adapters_store.errors import AdapterNotFound
from weft.proto.v1.common_pb2 import Adapter
from weft.server import errors

DOMAIN = "weft"
ADAPTER = Adapter.DESCRIPTOR.full_name
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# the text travels twice, once percent-encoded; together they must stay below gRPC's 8 KiB of metadata
TEXT_BYTES_MAX = 900
FIELD_BYTES_MAX = 200


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a call that failed, ready for ``context.abort``."""

    code: StatusCode
    reason: str
    text: str
    metadata: tuple[tuple[str, str | bytes], ...]


def verdict(error: Exception) -> Verdict:
    """Return what the caller is told about this error; a bug's text is an incident id and nothing else."""
    row = errors.row(error)
    if row is None or row.code is StatusCode.INTERNAL:
        row, text = row or errors.BUG, f"internal error, incident {secrets.token_hex(8)}"
    else:
        text = clipped(str(error), TEXT_BYTES_MAX)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN), *_about(error, row, text)]
    metadata: list[tuple[str, str | bytes]] = []
    if row.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(row.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        metadata.append((PUSHBACK_KEY, str(int(row.retry_after_s * 1000))))
    rich = status_pb2.Status(code=row.code.value[0], message=text, details=[packed(each) for each in details])
    metadata.append((DETAILS_KEY, rich.SerializeToString()))
    return Verdict(row.code, row.reason, text, tuple(metadata))


def _about(error: Exception, row: errors.Row, text: str) -> list[Message]:
    """What the error is about, in the form that the code calls for; nothing where the text says all."""
    field = clipped(str(getattr(error, "field", "")), FIELD_BYTES_MAX)
    match row.code:
        case StatusCode.INVALID_ARGUMENT if field:
            wrong = error_details_pb2.BadRequest.FieldViolation(field=field, description=text, reason=row.reason)
            return [error_details_pb2.BadRequest(field_violations=[wrong])]
        case StatusCode.NOT_FOUND if isinstance(error, AdapterNotFound):
            name = clipped(error.name, FIELD_BYTES_MAX)
            return [error_details_pb2.ResourceInfo(resource_type=ADAPTER, resource_name=name, description=text)]
        case StatusCode.FAILED_PRECONDITION:
            unmet = error_details_pb2.PreconditionFailure.Violation(type=row.reason, subject=field, description=text)
            return [error_details_pb2.PreconditionFailure(violations=[unmet])]
        case StatusCode.RESOURCE_EXHAUSTED:
            over = error_details_pb2.QuotaFailure.Violation(subject=field, description=text)
            return [error_details_pb2.QuotaFailure(violations=[over])]
    return []


def packed(message: Message) -> any_pb2.Any:
    """Wrap a detail as the status proto wants it."""
    box = any_pb2.Any()
    box.Pack(message)
    return box


def clipped(text: str, limit_bytes: int) -> str:
    """Make a text fit for the wire: valid UTF-8 (JSON can smuggle in lone surrogates) of at most this many bytes."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit_bytes:
        return data.decode("utf-8")
    return data[: limit_bytes - 3].decode("utf-8", "ignore") + "..."
