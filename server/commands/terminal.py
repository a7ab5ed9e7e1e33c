"""Where commands speak: tables for people, one JSON object for programs, errors that say what to do."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from weft.client import WeftError
from weft.server.commands.hints import hint

# a table in a pipe or a file must not be folded to the 80 columns that rich assumes
WIDTH_OF_FILES = 200
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UsageError(Exception):
    """The command line cannot be understood; the message says what was expected."""


class Terminal:
    """Standard output for results, standard error for everything else."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    def line(self, text: str) -> None:
        """Print a line of a result."""
        self.out.print(self._safe(self.out, text), soft_wrap=True)

    def text(self, text: str) -> None:
        """Print a piece of a text as it is, at once and without a line's end."""
        self.out.file.write(self._safe(self.out, text))
        self.out.file.flush()

    def table(self, table: Table) -> None:
        """Print a table."""
        self.out.print(table)

    def json(self, value: object) -> None:
        """Print one JSON object."""
        self.out.file.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        self.out.file.flush()

    def note(self, text: str) -> None:
        """Say something beside the result."""
        self.err.print(Text(self._safe(self.err, text), style="dim"), soft_wrap=True)

    def fail(self, text: str, code: str) -> None:
        """Say what went wrong here, without a server's part in it."""
        if self.as_json:
            self.json({"error": {"code": code, "message": text}})
        else:
            self._error(text)

    def refuse(self, error: WeftError, address: str) -> None:
        """Say what the server, or the way to it, had against the request, and what to do about it."""
        advice = hint(error, address)
        if self.as_json:
            self.json({"error": vars(error) | {"what_to_do": advice}})
            return
        self._error(error.message)
        names = " ".join(each for each in (error.code, error.reason) if each)
        fields = ", ".join(each.field for each in error.violations)
        self.note(f"  status: {names}" + (f", field: {fields}" if fields else ""))
        if advice:
            self.err.print(Text(f"  what to do: {advice}"), soft_wrap=True)

    @contextmanager
    def upload(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar while something is sent; yields what the client calls with (sent, total) bytes."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        shown = self.err.is_terminal and not self.as_json
        with Progress(*columns, console=self.err, transient=True, disable=not shown) as progress:
            task = progress.add_task(label, total=None)
            yield lambda sent, total: progress.update(task, completed=sent, total=total)

    def _error(self, text: str) -> None:
        self.err.print(Text("error: ", style="bold red") + Text(self._safe(self.err, text)), soft_wrap=True)

    @staticmethod
    def _safe(console: Console, text: str) -> str:
        """What a server sends must not steer the terminal; files and pipes get it unchanged."""
        return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if console.is_terminal else text


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH_OF_FILES
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def plain(value: object) -> Any:
    """Make a value of dataclasses, tuples and mappings ready for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value


def table(*columns: str, right: tuple[str, ...] = (), folded: tuple[str, ...] = ()) -> Table:
    """A table without vertical rules. ``right`` columns hold numbers; only ``folded`` ones may take several lines."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for each in columns:
        made.add_column(each, justify="right" if each in right else "left", no_wrap=each not in folded)
    return made


def pairs(rows: Mapping[str, str]) -> Table:
    """A list of names and values."""
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(name, value)
    return made


def size(count: int) -> str:
    """Bytes as people read them, e.g. ``2.0 MiB``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
