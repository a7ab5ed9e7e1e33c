"""What the operator may choose: one frozen dataclass, from which the command line is made. Imports nothing heavy.

Units stand last in the names; anything derived from these values lives with whoever derives it.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from weft.server.engine.config import EngineConfig


class ConfigError(Exception):
    """The server cannot start with these options; the message says which one, what was expected and what was got."""


def _option(default: Any, text: str) -> Any:
    """A field with a default and its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The options of ``weft serve``."""

    model: str = field(metadata={"help": "backbone: a local folder or a hub name"})
    store: str = _option("weft-store", "folder that keeps adapters; made when missing")
    adapter: tuple[str, ...] = _option((), "NAME=FOLDER: register this adapter before serving; may be repeated")

    listen: str = _option("127.0.0.1:8470", "HOST:PORT of the gRPC door; port 0 picks a free one")
    metrics_listen: str = _option("127.0.0.1:9470", "HOST:PORT of the Prometheus door; port 0 picks a free one")
    token_file: str = _option("", "file with the bearer token that callers must send; empty: none asked")
    tls_certificate_file: str = _option("", "PEM chain of the server; empty: plain text")
    tls_key_file: str = _option("", "PEM key of the server")
    tls_client_ca_file: str = _option("", "PEM roots; when set, callers must show a certificate signed by them")
    reflection: bool = _option(True, "serve gRPC reflection, so that tools can list the services")

    device: str = _option("auto", "cpu, cuda or auto")
    dtype: str = _option("auto", "float32, bfloat16, float16 or auto")
    kernels: str = _option("auto", "torch, triton or auto")
    adapter_memory_bytes_max: int = _option(1 << 30, "device bytes for adapters")
    working_set_bytes_max: int = _option(2 << 30, "bytes for stacked copies of adapters that the CPU kernels keep")
    kv_bytes_max: int = _option(1 << 30, "bytes for keys and values")
    batch_tokens_max: int = _option(2048, "prompt and decode tokens in one step")
    batch_requests_max: int = _option(256, "requests in one step")
    page_tokens: int = _option(16, "tokens in one page of keys and values")

    new_tokens_default: int = _option(256, "max_new_tokens of a request that sets none")
    request_duration_s_max: float = _option(600.0, "longest time a request may take, in seconds")
    queue_requests_max: int = _option(1024, "requests that may wait; beyond this callers get UNAVAILABLE")
    queue_tokens_max: int = _option(1 << 20, "prompt plus completion tokens that may wait")
    write_stall_s_max: float = _option(30.0, "longest time a stream may go unread before it is ended, in seconds")

    adapter_bytes_max: int = _option(2 << 30, "largest weights file of one adapter, in bytes")
    uploads_max: int = _option(4, "uploads that may run at once")
    upload_idle_s_max: float = _option(60.0, "longest gap between two pieces of an upload, in seconds")
    upload_duration_s_max: float = _option(3600.0, "longest time an upload may take, in seconds")

    drain_lag_s: float = _option(0.5, "time between reporting NOT_SERVING and refusing requests, in seconds")
    drain_timeout_s: float = _option(600.0, "time that requests in flight get to finish when stopping, in seconds")
    engine_failures_max: int = _option(5, "engine deaths in a row, each soon after its start, before giving up")
    engine_stall_s_max: float = _option(300.0, "longest engine step before the engine is killed, in seconds")
    log_level: str = _option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        _check_bounds(self)
        parse_address(self.listen, "listen")
        parse_address(self.metrics_listen, "metrics_listen")
        for entry in self.adapter:
            parse_preload(entry)
        if bool(self.tls_certificate_file) != bool(self.tls_key_file):
            raise ConfigError("tls_certificate_file and tls_key_file must be given together, got only one")
        if self.tls_client_ca_file and not self.tls_certificate_file:
            raise ConfigError("tls_client_ca_file needs tls_certificate_file, got none")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")

    def engine(self) -> EngineConfig:
        """The part that the engine process is told."""
        return EngineConfig(**{each.name: getattr(self, each.name) for each in fields(EngineConfig)})


LOG_LEVELS = ("debug", "info", "warning", "error")
POSITIVE = re.compile(r"_(bytes|tokens|requests|failures|s)_max$|^(page_tokens|new_tokens_default|uploads_max)$")
# larger than any adapter of a backbone that one device holds
ADAPTER_BYTES_MAX = 1 << 36


def _check_bounds(config: ServerConfig) -> None:
    if not config.model:
        raise ConfigError("model must name a folder or a hub model, got an empty string")
    for each in fields(config):
        value = getattr(config, each.name)
        if POSITIVE.search(each.name) and not value > 0:
            raise ConfigError(f"{each.name} must be > 0, got {value}")
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise ConfigError(f"{each.name} must be a finite number >= 0, got {value}")
    if config.batch_requests_max >= config.batch_tokens_max:
        text = f"batch_requests_max must be < batch_tokens_max, {config.batch_tokens_max}, so that prompts find room"
        raise ConfigError(f"{text}, got {config.batch_requests_max}")
    if config.adapter_bytes_max > ADAPTER_BYTES_MAX:
        raise ConfigError(f"adapter_bytes_max must be <= {ADAPTER_BYTES_MAX}, got {config.adapter_bytes_max}")


def parse_address(text: str, name: str) -> tuple[str, int]:
    """Split ``HOST:PORT`` (an IPv6 host stands in brackets) and check the port."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name} must be HOST:PORT with a port of 0 to 65535, got {text!r}")
    return host, int(port)


def shown_address(host: str, port: int) -> str:
    """``HOST:PORT`` as ``parse_address`` reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_preload(text: str) -> tuple[str, str]:
    """Split ``NAME=FOLDER``."""
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise ConfigError(f"adapter must be NAME=FOLDER, got {text!r}")
    return name, folder


def parse_bytes(text: str) -> int:
    """Read a size: a number of bytes, or a number followed by KiB, MiB, GiB or TiB."""
    match = re.fullmatch(r"(\d{1,18})\s*(|[KMGT]iB)", text.strip(), flags=re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected bytes, or a number with KiB, MiB, GiB or TiB; got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2][:1]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of ``ServerConfig``; those without default are required."""
    for each in fields(ServerConfig):
        if each.default is MISSING:
            flag = "--" + each.name.replace("_", "-")
            parser.add_argument(flag, required=True, help=each.metadata["help"])
        elif isinstance(each.default, bool):
            flag = "--" + each.name.replace("_", "-")
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=each.default, help=each.metadata["help"]
            )
        elif isinstance(each.default, tuple):
            parser.add_argument("--" + each.name, action="append", default=[], help=each.metadata["help"])
        else:
            _add_scalar(parser, each)


def _add_scalar(parser: argparse.ArgumentParser, each: Field[Any]) -> None:
    read: Callable[[str], object] = type(each.default)
    if "_bytes" in each.name:
        read = parse_bytes
    shown = "none" if each.default == "" else "%(default)s"
    parser.add_argument(
        "--" + each.name.replace("_", "-"),
        type=read,
        default=each.default,
        metavar=each.name.rsplit("_", 1)[-1].upper() if read is str else "N",
        help=f"{each.metadata['help']} (default {shown})",
    )


def from_args(arguments: argparse.Namespace) -> ServerConfig:
    """Build the config from parsed arguments; raises ConfigError."""
    values = {each.name: getattr(arguments, each.name) for each in fields(ServerConfig)}
    return ServerConfig(**values | {"adapter": tuple(values["adapter"])})
