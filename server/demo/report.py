"""How the demonstration is told: the table, the lines below it, and the same for programs."""

import os
import shutil
import sys
import textwrap
from pathlib import Path

from rich.table import Table
from rich.text import Text

from weft.server.commands.info import memory_line
from weft.server.commands.terminal import Terminal, table
from weft.server.demo import tasks
from weft.server.demo.launch import Fullest, Server
from weft.server.demo.play import LateArrival, Outcome, Score

LINE_CHARACTERS = 120
INDENT = " " * len("accuracy   ")
GOOD, BAD = "green", "bold red"


def tell(terminal: Terminal, outcome: Outcome, fullest: Fullest) -> None:
    """Print everything but where to look next."""
    terminal.table(answers_table(outcome.scores))
    terminal.line("")
    for line in (*summary(outcome, fullest), ""):
        terminal.line(line)


def answers_table(scores: tuple[Score, ...]) -> Table:
    """One row for each adapter: what it is, one of its answers, and how many were right."""
    shown = table("adapter", "method", "bytes", "prompt", "answer", "", "held-out words", right=("bytes",))
    for each in scores:
        answer = each.example
        shown.add_row(
            each.name or "(bare backbone)",
            _method(each),
            f"{each.adapter.device_bytes:,}" if each.adapter else "0",
            answer.question.prompt,
            answer.text,
            _verdict(each),
            Text(f"{each.right} of {each.asked} right", style=GOOD if each.passed else BAD),
        )
    return shown


def _method(each: Score) -> str:
    """What the method is called, for those who do not know the names of file formats."""
    if each.adapter is None:
        return "-"
    known = _known(each)
    return each.adapter.method if known is None else f"{known.method} {known.detail}".rstrip()


def _known(each: Score) -> tasks.DemoAdapter | None:
    return next((known for known in tasks.DEMO_ADAPTERS if known.name == each.name), None)


def by_method(scores: tuple[Score, ...]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each method, all its adapters together."""
    found: dict[str, tuple[int, int]] = {}
    for each in scores:
        if each.adapter is not None:
            known = _known(each)
            method = each.adapter.method if known is None else known.method
            right, asked = found.get(method, (0, 0))
            found[method] = (right + each.right, asked + each.asked)
    return found


def _verdict(each: Score) -> Text:
    if each.example.right:
        return Text("right", style=GOOD)
    if each.adapter is None:
        return Text("wrong, as it must be", style=GOOD)
    return Text(f"wrong: {each.example.question.expected}", style=BAD)


def summary(outcome: Outcome, fullest: Fullest) -> list[str]:
    """Accuracy, batch, speed, memory, and what happened while the stream ran."""
    served = [each for each in outcome.scores if each.adapter is not None]
    right, asked = sum(each.right for each in served), sum(each.asked for each in served)
    requests = sum(each.asked for each in outcome.scores)
    methods = by_method(outcome.scores)
    adapters = f"{len(served)} adapters of {len(methods)} methods"
    lines = [
        f"accuracy   {right / asked:.1%} of {asked} held-out requests to {adapters}:",
        *_method_lines(methods),
        f"batch      {requests} requests sent at once, {requests - asked} of them to the bare backbone; "
        f"the fullest step had {fullest.rows:,} rows and {fullest.adapters} adapters",
        f"speed      {outcome.batch_tokens / outcome.batch_s:,.0f} tokens/s: "
        f"{outcome.batch_tokens:,} tokens in {outcome.batch_s:.2f} s",
        f"memory     {memory_line(outcome.info)}",
        f"live       {_late_line(outcome.late)}",
    ]
    for each in outcome.scores:
        if not each.passed:
            word = "at most" if each.adapter is None else "at least"
            lines.append(
                f"FAILED     {each.name or 'bare backbone'}: expected {word} {each.bar:.0%}, got {each.share:.1%}"
            )
    if not outcome.late.passed:
        lines.append(f"FAILED     {outcome.late.adapter}: expected a right answer before the stream ended")
    return lines


def _method_lines(methods: dict[str, tuple[int, int]]) -> list[str]:
    """The accuracy of each method, as many to a line as fit."""
    # spaces where no line may end
    glued = (f"{name} {100 * right / asked:.0f} %".replace(" ", "\xa0") for name, (right, asked) in methods.items())
    lines = textwrap.wrap(", ".join(glued), LINE_CHARACTERS, initial_indent=INDENT, subsequent_indent=INDENT)
    return [line.replace("\xa0", " ") for line in lines]


def _late_line(late: LateArrival) -> str:
    meanwhile = late.tokens_while_registering + late.tokens_until_answer
    return (
        f"{late.adapter} was registered (in {late.registered_s:.2f} s) and answered {late.answer.text!r} "
        f"while a stream ran: {late.tokens_before} tokens before, {meanwhile} meanwhile, {late.tokens_after} after"
    )


def where_next(server: Server | None) -> list[str]:
    """How to go on: with the server that was kept, or with one of one's own."""
    weft, assets = _weft(), _shown(tasks.ASSETS_DIR)
    lines = ["Where to look next:"]
    if server is None:
        lines.append(f"  {weft} serve --model {assets / 'backbone'} --dtype float32 &")
        lines.append(f"  {weft} adapters add --wait 60 reverse {assets / 'adapters' / 'reverse-lora-r2'}")
        lines.append(f"  {weft} generate --adapter reverse --prompt hello=")
    else:
        lines.append(f"  {weft} adapters list --server {server.grpc}")
        lines.append(f"  {weft} generate --server {server.grpc} --adapter reverse-lora-r2 --prompt hello=")
        lines.append(f"  curl http://{server.metrics}/metrics")
        lines.append(f"  kill {server.process.pid}   # the server stays until then; its files are in {server.folder}")
    lines.append("  README.md says how a request flows and how to operate a server; proto/v1 is the contract")
    return lines


def for_programs(outcome: Outcome, fullest: Fullest, server: Server | None, seconds: float) -> dict[str, object]:
    """The same as one JSON object; sizes in bytes."""
    rows = [
        {
            "adapter": each.name,
            "method": each.adapter.method if each.adapter else "",
            "device_bytes": each.adapter.device_bytes if each.adapter else 0,
            "asked": each.asked,
            "right": each.right,
            "bar": each.bar,
            "passed": each.passed,
            "example": {
                "prompt": each.example.question.prompt,
                "expected": each.example.question.expected,
                "answer": each.example.text,
            },
        }
        for each in outcome.scores
    ]
    found: dict[str, object] = {
        "passed": outcome.passed,
        "seconds": round(seconds, 3),
        "rows": rows,
        "methods": {
            name: {"right": right, "asked": asked} for name, (right, asked) in by_method(outcome.scores).items()
        },
        "fullest_step": fullest,
        "batch": {
            "requests": sum(each.asked for each in outcome.scores),
            "tokens": outcome.batch_tokens,
            "seconds": round(outcome.batch_s, 3),
            "tokens_per_s": round(outcome.batch_tokens / outcome.batch_s, 1),
        },
        "late": outcome.late,
        "memory": outcome.info.memory,
    }
    if server is not None:
        found["server"] = {"grpc": server.grpc, "metrics": server.metrics, "pid": server.process.pid}
    return found


def _weft() -> str:
    """How this program was called, so that the lines can be pasted."""
    name = Path(sys.argv[0])
    if name.name != "weft":
        return f"{_shown(Path(sys.executable))} -m weft.server.cli"
    return "weft" if shutil.which("weft") == str(name.absolute()) else str(_shown(name.absolute()))


def _shown(path: Path) -> Path:
    """The shorter of a path and the way to it from here."""
    return min(path, Path(os.path.relpath(path)), key=lambda each: len(str(each)))
