"""``weft serve``, ``weft demo`` and ``weft bench``: what runs here and talks to no running server."""

import argparse
from importlib import import_module

from weft.server import config
from weft.server.commands.terminal import Terminal, UsageError

# bench may import the server, never the other way round: named by text, loaded when asked for
BENCHES = {"decode": "weft.bench.decode", "methods": "weft.bench.methods"}


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    text = "serve a backbone and its adapters until told to stop"
    serve = commands.add_parser("serve", help=text, description=text)
    config.add_arguments(serve)
    serve.set_defaults(run=run_serve)

    text = "start a server on the small backbone that weft ships, and let adapters of many methods answer at once"
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument("--keep", action="store_true", help="leave the server running and say how to talk to it")
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    demo.set_defaults(run=run_demo)

    text = "measure; `weft bench decode --help` lists the options of a benchmark"
    bench = commands.add_parser("bench", help=text, description=text)
    bench.add_argument("name", choices=sorted(BENCHES), help="which benchmark")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="its own options")
    bench.set_defaults(run=run_bench)


def run_serve(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Serve until told to stop; returns the server's exit status."""
    try:
        options = config.from_args(arguments)
        from weft.server.app import serve

        return serve(options)
    except config.ConfigError as error:
        raise UsageError(str(error)) from None


def run_demo(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Run the demonstration."""
    from weft.server.demo.run import demonstrate

    return demonstrate(terminal, keep=arguments.keep)


def run_bench(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Run a benchmark with its own options."""
    status: int = import_module(BENCHES[arguments.name]).main(arguments.arguments)
    return status
