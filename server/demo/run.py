"""``weft demo``: a real server on the backbone that weft ships, adapters of many methods, asked all at once."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from weft.server.commands.terminal import Terminal
from weft.server.demo import report, tasks
from weft.server.demo.launch import DemoFailed, Server, fullest_step, start
from weft.server.demo.play import Outcome, play

# room in one step for all that the demonstration asks at once
OPTIONS = ("--dtype", "float32", "--batch-requests-max", "512", "--batch-tokens-max", "4096")


def demonstrate(terminal: Terminal, *, keep: bool) -> int:
    """Run it and return 0 if every adapter did what it was trained for, else 1."""
    try:
        return _demonstrate(terminal, keep=keep)
    except DemoFailed as error:
        terminal.fail(str(error), "DEMO_FAILED")
        return 1


def _demonstrate(terminal: Terminal, *, keep: bool) -> int:
    began_s = time.monotonic()
    with _server(terminal, keep=keep) as server:
        terminal.note(f"a server is ready at {server.grpc} after {time.monotonic() - began_s:.1f} s")
        outcome = _play(terminal, server)
        fullest = fullest_step(server.metrics)
        if not terminal.as_json:
            report.tell(terminal, outcome, fullest)
    kept = server if keep else None
    seconds = time.monotonic() - began_s
    if terminal.as_json:
        terminal.json(report.for_programs(outcome, fullest, kept, seconds))
    else:
        for line in report.where_next(kept):
            terminal.line(line)
        ended = "left running" if keep else "stopped"
        terminal.note(f"{'done' if outcome.passed else 'FAILED'} in {seconds:.1f} s, server {ended}")
    return 0 if outcome.passed else 1


@contextmanager
def _server(terminal: Terminal, *, keep: bool) -> Iterator[Server]:
    """A server with a store of its own; both are gone in the end unless they are to be kept and nothing failed."""
    folder = Path(tempfile.mkdtemp(prefix="weft-demo-"))
    kept = False
    try:
        with terminal.err.status("starting weft serve on the backbone that weft ships"):
            server = start(tasks.ASSETS_DIR / "backbone", folder, *OPTIONS)
        try:
            yield server
            kept = keep
        finally:
            if not kept:
                server.stop()
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _play(terminal: Terminal, server: Server) -> Outcome:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = terminal.as_json or not terminal.err.is_terminal
    with Progress(*columns, console=terminal.err, transient=True, disable=hidden) as bar:
        task = bar.add_task("registering adapters", total=None)
        return asyncio.run(play(server.grpc, lambda done, total: bar.update(task, completed=done, total=total)))
