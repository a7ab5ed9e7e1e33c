"""Builds Python values from the messages of the contract; what is outside it is a ``ServerFault``, never a guess."""

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

from weft.client.errors import not_understood
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
    Runtime,
    ServerInfo,
    SiteReport,
    Started,
    Usage,
)
from weft.proto.v1 import common_pb2, inference_pb2, server_pb2

T = TypeVar("T")

REASONS: Mapping[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
STATES: Mapping[int, AdapterState] = {
    common_pb2.ADAPTER_STATE_ACTIVE: AdapterState.ACTIVE,
    common_pb2.ADAPTER_STATE_INCOMPATIBLE: AdapterState.INCOMPATIBLE,
}


def _fields(message: Message) -> dict[str, Any]:
    """All fields of a message by name, zeros included."""
    return {field.name: _plain(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain(value: Any) -> Any:
    # the wire has 32-bit floats: 0.7 comes back as 0.699999988 unless it is cut to the digits they hold
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _chosen(table: Mapping[int, T], value: int, what: str) -> T:
    if value not in table:
        raise not_understood(f"expected {what} to be one of {sorted(table)}, got {value}")
    return table[value]


def started(message: inference_pb2.Started) -> Started:
    """Convert the first event."""
    return Started(
        message.request_id,
        message.adapter_digest,
        message.prompt_tokens,
        EffectiveParams(**_fields(message.effective)),
    )


def event(message: inference_pb2.StreamGenerateResponse) -> Event:
    """Convert one event of a stream."""
    match message.WhichOneof("event"):
        case "started":
            return started(message.started)
        case "delta":
            return Delta(message.delta.text, tuple(message.delta.token_ids))
        case "finished":
            reason = _chosen(REASONS, message.finished.reason, "the finish reason")
            return Finished(reason, Usage(**_fields(message.finished.usage)))
        case _:
            raise not_understood("expected started, delta or finished in a stream, got none of them")


def completion(message: inference_pb2.GenerateResponse) -> Completion:
    """Convert a whole completion."""
    first = started(message.started)
    return Completion(
        text=message.text,
        token_ids=tuple(message.token_ids),
        reason=_chosen(REASONS, message.reason, "the finish reason"),
        usage=Usage(**_fields(message.usage)),
        request_id=first.request_id,
        adapter_digest=first.adapter_digest,
        effective=first.effective,
    )


def _site(message: common_pb2.SiteReport) -> SiteReport:
    return SiteReport(message.module, tuple(message.operators), message.rank, message.bytes, tuple(message.folds))


def adapter(message: common_pb2.Adapter) -> Adapter:
    """Convert an adapter, with its sites if it came with them."""
    values = _fields(message) | {
        "state": _chosen(STATES, message.state, "the adapter's state"),
        "sites": tuple(_site(each) for each in message.sites),
        "notes": tuple(message.notes),
    }
    return Adapter(**values)


def server_info(message: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """Convert what a server says of itself."""
    runtime = message.runtime
    return ServerInfo(
        version=message.version,
        backbone=Backbone(**_fields(message.backbone)),
        limits=Limits(**_fields(message.limits)),
        runtime=Runtime(runtime.device, runtime.kernels, dict(runtime.versions), tuple(runtime.notes)),
        memory=Memory(**_fields(message.memory)),
        methods=tuple(message.methods),
    )
