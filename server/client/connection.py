"""How a client reaches a server: address, TLS, token, retries; and the RPCs as callables, sync and async alike."""

import ipaddress
import json
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from weft.client.errors import DeadlineExceeded, invalid_field
from weft.proto.v1 import adapters_pb2, inference_pb2, server_pb2

DEFAULT_ADDRESS = "127.0.0.1:8470"
# what answers from memory or not at all
CONTROL_TIMEOUT_S = 30.0
HEALTH_POLL_S = 0.1
PAGE_SIZE = 1000
RECONNECT_MS_MIN, RECONNECT_MS_MAX = 100, 5_000

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name
SERVER = server_pb2.DESCRIPTOR.services_by_name["ServerService"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

HEALTH_REQUEST = health_pb2.HealthCheckRequest(service=INFERENCE)

# repeating these changes nothing on the server; uploads and deletions are never repeated, and a stream that
# has begun cannot be
REPEATABLE = (
    (INFERENCE, "Generate"),
    (ADAPTERS, "GetAdapter"),
    (ADAPTERS, "ListAdapters"),
    (SERVER, "GetServerInfo"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """What to trust and what to show, as PEM bytes. Without roots: those that gRPC ships with."""

    roots: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the same for gRPC."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key must be given together, got only one")
        return grpc.ssl_channel_credentials(self.roots, self.key, self.certificate)


def service_config() -> str:
    """Retries as gRPC wants to be told of them: a few, soon, and fewer when much fails."""
    names = [{"service": service, "method": method} for service, method in REPEATABLE]
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    throttling = {"maxTokens": 10, "tokenRatio": 0.1}
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}], "retryThrottling": throttling})


def is_loopback(address: str) -> bool:
    """Whether the address stays on this machine."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if host == "localhost" or address.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def channel_options(address: str) -> tuple[tuple[str, str | int], ...]:
    """The options of a channel, sync or async."""
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", service_config()),
        ("grpc.service_config_disable_resolution", 1),
        # finds out about a peer that went silent while a stream is open; a server allows a ping each 30 s
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS_MIN),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
        # a connection of its own: what other clients of this process did to theirs does not delay this one
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if is_loopback(address):
        # gRPC would send even this through the proxy that the environment names
        options.append(("grpc.enable_http_proxy", 0))
    return tuple(options)


def sync_channel(address: str, tls: Tls | None) -> grpc.Channel:
    """Open a channel for plain code."""
    if tls is None:
        return grpc.insecure_channel(address, channel_options(address))
    return grpc.secure_channel(address, tls.credentials(), channel_options(address))


def call_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """What every call carries."""
    if not token:
        return ()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise invalid_field("token", "token must be printable ASCII without spaces, got something else")
    return (("authorization", f"Bearer {token}"),)


def is_serving(answer: health_pb2.HealthCheckResponse) -> bool:
    """Whether the server takes requests."""
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def not_ready(address: str, timeout_s: float) -> DeadlineExceeded:
    """The server did not become ready in time."""
    return DeadlineExceeded(
        f"expected the server at {address} to be ready within {timeout_s:g} s, got no such answer",
        code="DEADLINE_EXCEEDED",
    )


class Calls:
    """The RPCs of one channel. gRPC's callables are untyped; requests and answers are the messages of the contract."""

    def __init__(self, channel: Any) -> None:
        self.generate = _unary(
            channel, f"/{INFERENCE}/Generate", inference_pb2.GenerateRequest, inference_pb2.GenerateResponse
        )
        self.stream_generate = channel.unary_stream(
            f"/{INFERENCE}/StreamGenerate",
            request_serializer=inference_pb2.StreamGenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.StreamGenerateResponse.FromString,
        )
        self.register = channel.stream_unary(
            f"/{ADAPTERS}/RegisterAdapter",
            request_serializer=adapters_pb2.RegisterAdapterRequest.SerializeToString,
            response_deserializer=adapters_pb2.RegisterAdapterResponse.FromString,
        )
        self.get = _unary(
            channel, f"/{ADAPTERS}/GetAdapter", adapters_pb2.GetAdapterRequest, adapters_pb2.GetAdapterResponse
        )
        self.list = _unary(
            channel,
            f"/{ADAPTERS}/ListAdapters",
            adapters_pb2.ListAdaptersRequest,
            adapters_pb2.ListAdaptersResponse,
        )
        self.delete = _unary(
            channel,
            f"/{ADAPTERS}/DeleteAdapter",
            adapters_pb2.DeleteAdapterRequest,
            adapters_pb2.DeleteAdapterResponse,
        )
        self.info = _unary(
            channel,
            f"/{SERVER}/GetServerInfo",
            server_pb2.GetServerInfoRequest,
            server_pb2.GetServerInfoResponse,
        )
        self.health = _unary(channel, f"/{HEALTH}/Check", health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse)


def _unary(channel: Any, path: str, request: type[Message], response: type[Message]) -> Any:
    return channel.unary_unary(
        path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )
