"""``weft methods``: what is served and what is refused, as the parsers themselves say it; also the README's table."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from weft.adapters_store.formats import served
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.refused import REFUSED
from weft.server.commands.terminal import Terminal, UsageError, table

# the table in a Markdown file stands between these lines
BEGIN, END = "<!-- made by `make methods` -->", "<!-- end of what is made -->"
PRINTED = "-"

_ARXIV = re.compile(r"(?:arXiv )?(\d{4}\.\d{5})")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    text = "list the methods that are served, the files they are read from, and what is refused"
    parser = commands.add_parser("methods", help=text, description=text)
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    shapes.add_argument(
        "--markdown",
        nargs="?",
        const=PRINTED,
        metavar="FILE",
        help="print a Markdown table, or put it between its two markers in FILE",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print or write it."""
    rows = served()
    if arguments.json:
        refused = [{"peft_type": name, "why": why} for name, why in sorted(REFUSED.items())]
        terminal.json({"served": rows, "refused": refused})
    elif arguments.markdown is None:
        _show(rows, terminal)
    elif arguments.markdown == PRINTED:
        terminal.text(markdown(rows))
    else:
        _write(Path(arguments.markdown), rows)
    return 0


def markdown(rows: Sequence[Served]) -> str:
    """The table as Markdown, and the types of PEFT that are refused below it."""
    head = ["| method | read from | operators | reference | refused of it |", "|---|---|---|---|---|"]
    body = [f"| {_name(row)} | {row.format} | {row.operators} | {_linked(row)} | {row.refuses} |" for row in rows]
    refused = ", ".join(f"`{name}`" for name in sorted(REFUSED))
    below = f"Refused, each with its reason (`weft methods` prints it): {refused}."
    return "\n".join([*head, *body, "", _legend(rows), below, ""])


def between_markers(text: str, rows: Sequence[Served]) -> str:
    """The text with the table in its place. ValueError if its markers are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected a line {BEGIN} and, below it, a line {END}")
    return f"{before}{begin}\n{markdown(rows)}{end}{after}"


def _write(path: Path, rows: Sequence[Served]) -> None:
    try:
        path.write_text(between_markers(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"expected a file that can be read and written at {path}, got: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None


def _show(rows: Sequence[Served], terminal: Terminal) -> None:
    shown = table(
        "method", "read from", "operators", "reference", "refused of it", folded=("operators", "refused of it")
    )
    for row in rows:
        shown.add_row(_name(row), row.format, row.operators, _ARXIV.sub(r"\1", row.reference), row.refuses)
    terminal.table(shown)
    terminal.line("")
    refused = table("refused", "why", folded=("why",))
    for name, why in sorted(REFUSED.items()):
        refused.add_row(name, why)
    terminal.table(refused)
    terminal.note(_legend(rows))


def _legend(rows: Sequence[Served]) -> str:
    methods, survey = {row.method for row in rows}, {row.method for row in rows if row.survey}
    return f"{len(methods)} methods, of which the {len(survey)} with a * are of the survey arXiv 2303.15647."


def _name(row: Served) -> str:
    return f"{row.name} *" if row.survey else row.name


def _linked(row: Served) -> str:
    return _ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", row.reference)
