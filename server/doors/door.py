"""The gRPC door: all services behind one edge, on one port, with its credentials and limits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from weft.proto.v1 import adapters_pb2, inference_pb2, server_pb2
from weft.server.config import ConfigError, ServerConfig, parse_address, shown_address
from weft.server.doors import health, reflection
from weft.server.doors.adapters import AdapterService
from weft.server.doors.edge import MESSAGE_BYTES_MAX, Edge, paths
from weft.server.doors.health import Health
from weft.server.doors.inference import InferenceService
from weft.server.doors.info import ServerService
from weft.server.doors.reflection import Reflection

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"]
SERVER = server_pb2.DESCRIPTOR.services_by_name["ServerService"]
SERVICES: tuple[ServiceDescriptor, ...] = (INFERENCE, ADAPTERS, SERVER, health.SERVICE, reflection.SERVICE)
METHODS = paths(SERVICES)

# only a backstop: the queue's own limits come first and say when to come back
CALLS_MAX = 16384
OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
    ("grpc.max_connection_idle_ms", 900_000),
    # two servers on one port would share its callers by chance
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class Servicers:
    """Who answers what."""

    inference: InferenceService
    adapters: AdapterService
    server: ServerService
    health: Health


def build(config: ServerConfig, edge: Edge, servicers: Servicers) -> Any:
    """Return a ``grpc.aio.Server`` with every service registered; it listens nowhere yet."""
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=CALLS_MAX)
    handlers = [
        edge.handlers(INFERENCE, servicers.inference),
        edge.handlers(ADAPTERS, servicers.adapters),
        edge.handlers(SERVER, servicers.server),
        # balancers ask without a token, and learn nothing that their connection does not tell them
        edge.handlers(health.SERVICE, servicers.health, guarded=False),
    ]
    if config.reflection:
        names = [service.full_name for service in SERVICES]
        handlers.append(edge.handlers(reflection.SERVICE, Reflection(names)))
    server.add_generic_rpc_handlers(tuple(handlers))
    return server


def bind(server: Any, config: ServerConfig) -> int:
    """Open the door's port and return its number; raises ConfigError when it cannot be had."""
    host, port = parse_address(config.listen, "listen")
    address = shown_address(host, port)
    try:
        if not config.tls_certificate_file:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials(config)))
    except RuntimeError:
        raise ConfigError(f"listen must be an address that can be bound, got {config.listen!r}") from None


def credentials(config: ServerConfig) -> Any:
    """Server credentials from the config's PEM files, read again for new connections when they change."""

    def current() -> Any:
        roots = _pem(config.tls_client_ca_file, "tls_client_ca_file") if config.tls_client_ca_file else None
        key = _pem(config.tls_key_file, "tls_key_file")
        chain = _pem(config.tls_certificate_file, "tls_certificate_file")
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=roots)

    return grpc.dynamic_ssl_server_credentials(current(), current, bool(config.tls_client_ca_file))


def _pem(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} must be a readable PEM file, got {error}") from None
