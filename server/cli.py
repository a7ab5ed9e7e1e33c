"""The command line: ``weft serve | adapters | generate | info | methods | convert | demo | bench``.

Exit status: 0 done, 1 the server refused or the work failed, 2 the command line is wrong, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.server.commands.terminal import Terminal

OK, REFUSED, USAGE, INTERRUPTED = 0, 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    # imported here: a process that `weft serve` spawns imports this module again and must not carry gRPC along
    from weft.server.commands import adapters, convert, generate, info, local, methods
    from weft.server.version import VERSION

    parser = argparse.ArgumentParser(
        prog="weft",
        description="Serves one frozen language model with hundreds of adapters of many methods in one batch.",
    )
    parser.add_argument("--version", action="version", version=f"weft {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    local.add_parsers(commands)
    for each in (adapters, generate, info, methods, convert):
        each.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; a command line that does not parse exits with 2 at once."""
    try:
        arguments = build_parser().parse_args(argv)
        from weft.server.commands.terminal import Terminal

        return run(arguments, Terminal(as_json=getattr(arguments, "json", False)))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def run(arguments: argparse.Namespace, terminal: "Terminal") -> int:
    """Run a parsed command; errors become a text and an exit status."""
    from weft.client import WeftError
    from weft.server.commands.terminal import UsageError

    try:
        status: int = arguments.run(arguments, terminal)
    except UsageError as error:
        terminal.fail(str(error), "USAGE")
        return USAGE
    except WeftError as error:
        terminal.refuse(error, getattr(arguments, "server", ""))
        return REFUSED
    except BrokenPipeError:
        # whoever read our output has seen enough; the interpreter must not complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    return status


if __name__ == "__main__":
    sys.exit(main())
