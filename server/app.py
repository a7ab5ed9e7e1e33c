"""``weft serve``: runs the front process from its options to its exit code, and obeys signals.

The first SIGTERM or SIGINT drains, the second stops at once.
"""

import asyncio
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import TypeVar

from weft.adapters_store.errors import AdapterError
from weft.server.config import ConfigError, ServerConfig, parse_address
from weft.server.engine.messages import EngineInfo, StepStats
from weft.server.frontend import Addresses, Frontend
from weft.server.supervisor import ENGINE, EngineFailed
from weft.server.version import VERSION

logger = logging.getLogger(__name__)

T = TypeVar("T")
STOPPED_BY_FORCE = 1


def serve(config: ServerConfig, target: str = ENGINE) -> int:
    """Serve until a signal and return the exit code.

    0 drained, 1 something in flight was cut off, 70 engine lost for good, 78 cannot start.

    target:  the engine process's first function, ``module:function``
    """
    # a closed stderr must not take the server down with it
    logging.raiseExceptions = False
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return asyncio.run(_serve(config, target))
    except (ConfigError, EngineFailed, AdapterError) as error:
        sys.stderr.write(f"weft: {error}\n")
        return os.EX_CONFIG


async def _serve(config: ServerConfig, target: str) -> int:
    signals = Signals()
    frontend = Frontend(config, target)
    say(f"loading {config.model}")
    try:
        addresses = await signals.until(1, frontend.start())
        if addresses is None:
            return 0
        announce(config, frontend, addresses)
        reason = await signals.until(1, _given_up(frontend))
        if reason is not None:
            sys.stderr.write(f"weft: {reason}\n")
            return os.EX_SOFTWARE
        say("weft is draining; a second signal stops it at once")
        cut = await signals.until(2, frontend.drain())
        if cut:
            sys.stderr.write(f"weft: cut off after drain_timeout_s {config.drain_timeout_s:g}: {cut} in flight\n")
        return 0 if cut == 0 else STOPPED_BY_FORCE
    finally:
        await frontend.close()


async def _given_up(frontend: Frontend) -> str:
    return await asyncio.shield(frontend.supervisor.gave_up)


class Signals:
    """Counts the requests to stop."""

    def __init__(self) -> None:
        self._count = 0
        self._came = asyncio.Event()
        for each in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(each, self._receive)

    def _receive(self) -> None:
        self._count += 1
        self._came.set()

    async def until(self, count: int, work: Coroutine[None, None, T]) -> T | None:
        """Do the work, or give it up and return None when so many signals have come."""
        task = asyncio.create_task(work)
        while not task.done() and self._count < count:
            came = asyncio.create_task(self._came.wait())
            await asyncio.wait({task, came}, return_when=asyncio.FIRST_COMPLETED)
            came.cancel()
            self._came.clear()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait([task])
        return None


def say(line: str) -> None:
    """Write a line for whoever started the server."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def announce(config: ServerConfig, frontend: Frontend, addresses: Addresses) -> None:
    """Say what serves and where. The last line is for machines: it appears when requests are taken."""
    info = frontend.relay.engine()
    for line in describe(config, info, frontend.relay.stats):
        say(line)
    for line in (*warnings(config), *(f"note: {note}" for note in info.notes)):
        say(line)
    metrics = addresses.metrics or "off"
    say(f"weft ready grpc={addresses.grpc} metrics={metrics}")


def describe(config: ServerConfig, info: EngineInfo, stats: StepStats | None) -> list[str]:
    """The backbone, what computes, and the memory that is used and set aside."""
    mib = 1 << 20
    backbone = f"backbone {stats.backbone_bytes / mib:.1f} MiB, " if stats is not None else ""
    return [
        f"weft {VERSION}",
        f"backbone {config.model}: {info.family}, {info.parameters:,} parameters, {info.dtype}, "
        f"{len(info.catalogue.sites)} sites, context {info.context_tokens} tokens",
        f"kernels {info.kernels} on {info.device}",
        f"memory: {backbone}at most {info.adapter_bytes_max // mib} MiB of adapters "
        f"and {info.kv_bytes_max // mib} MiB of keys and values",
    ]


def warnings(config: ServerConfig) -> list[str]:
    """What an operator who listens beyond this machine should hear."""
    lines = []
    if _is_open(config.listen):
        if not config.tls_certificate_file:
            lines.append(f"warning: {config.listen} is open to the network without TLS")
        if not config.token_file and not config.tls_client_ca_file:
            lines.append(f"warning: {config.listen} is open to the network and asks nobody for a token or certificate")
    if _is_open(config.metrics_listen):
        lines.append(f"warning: metrics at {config.metrics_listen} are open to the network, in plain text")
    return lines


def _is_open(address: str) -> bool:
    host, _ = parse_address(address, "listen")
    return not _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
