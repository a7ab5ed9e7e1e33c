"""The options that say which server to talk to, and the client they make."""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.client import DEFAULT_ADDRESS, Client, Tls
from weft.server.commands.terminal import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command that talks to a server takes."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="gRPC door of the server (default %(default)s)"
    )
    group.add_argument(
        "--wait",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="wait so long for the server to be ready (default: not at all)",
    )
    group.add_argument("--token-file", metavar="FILE", help="file with the bearer token that the server asks for")
    group.add_argument("--tls", action="store_true", help="talk TLS and trust the roots that gRPC ships with")
    group.add_argument("--tls-root-file", metavar="FILE", help="talk TLS and trust these PEM roots")
    group.add_argument("--tls-certificate-file", metavar="FILE", help="PEM chain to show to the server")
    group.add_argument("--tls-key-file", metavar="FILE", help="PEM key of that chain")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


@contextmanager
def connect(arguments: argparse.Namespace) -> Iterator[Client]:
    """A client, connected as the options say, once the server is ready if that is to be waited for."""
    token = _read(arguments.token_file).decode("utf-8", "replace").strip() if arguments.token_file else ""
    with Client(arguments.server, tls=_tls(arguments), token=token) as client:
        if arguments.wait:
            client.wait_ready(arguments.wait)
        yield client


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of seconds, 0 or more; got {text!r}")
    return seconds


def _tls(arguments: argparse.Namespace) -> Tls | None:
    root, chain, key = arguments.tls_root_file, arguments.tls_certificate_file, arguments.tls_key_file
    if bool(chain) != bool(key):
        raise UsageError("expected --tls-certificate-file and --tls-key-file together, got only one")
    if not (arguments.tls or root or chain):
        return None
    return Tls(
        roots=_read(root) if root else None,
        certificate=_read(chain) if chain else None,
        key=_read(key) if key else None,
    )


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"expected a readable file at {path}, got: {error.strerror}") from None
