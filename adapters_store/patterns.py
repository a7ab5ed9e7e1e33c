"""Matches module names against patterns that somebody else wrote, exactly as PEFT does, without trusting them.

PEFT reads these strings as regular expressions. A plain one (letters, digits, ``_``, ``-`` and dots, where a dot
stands for any one character) has an answer that needs no engine. Anything else is compiled and run in another process,
which is killed when it overruns: a pattern that backtracks for ever costs its sender an error.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from weft.adapters_store.errors import AdapterError, StoreIOError, expected, quoted

PATTERNS_MAX = 2048
PATTERN_LENGTH_MAX = 1024
CPU_S_MAX = 1
# a machine that is busy with other things is no fault of the pattern
WALL_S_MAX = 20.0

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")
_GUARD = Path(__file__).with_name("pattern_guard.py")


class Form(Enum):
    """How PEFT builds its regular expression from a pattern, and how it asks. ``{}`` is the pattern."""

    # target_modules, exclude_modules and feedforward_modules when they are strings
    WHOLE = "fullmatch"
    # keys of rank_pattern and alpha_pattern
    SUFFIX = "suffix"
    # layers_pattern: the match is the number of the layer
    LAYER = "layer"


def match(patterns: Sequence[str], names: Sequence[str], form: Form, field: str) -> list[list[int | None]]:
    """For each pattern, for each name: None where it does not match, else 0 or, for LAYER, the number of the layer.

    AdapterInvalid under ``field`` if a pattern is no regular expression, or takes too long.
    """
    if len(patterns) > PATTERNS_MAX:
        raise expected(field, f"at most {PATTERNS_MAX} patterns", len(patterns))
    for pattern in patterns:
        if len(pattern) > PATTERN_LENGTH_MAX:
            raise expected(field, f"patterns of at most {PATTERN_LENGTH_MAX} characters", len(pattern))
    wild = [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]
    judged = dict(zip(wild, _run(wild, names, form, field), strict=True)) if wild else {}
    return [
        judged[pattern] if pattern in judged else [_plain(pattern, name, form) for name in names]
        for pattern in patterns
    ]


def _plain(pattern: str, name: str, form: Form) -> int | None:
    """The answer of the regular expression for a pattern in which only the dot is special."""
    if form is Form.WHOLE:
        return 0 if _same(pattern, name) else None
    if form is Form.SUFFIX:
        at = len(name) - len(pattern)
        begins = at == 0 or (at > 0 and name[at - 1] == ".")
        return 0 if begins and _same(pattern, name[at:]) else None
    starts = [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
    for at in starts:
        rest = name[at + len(pattern) :]
        if _same(pattern, name[at : at + len(pattern)]) and (number := re.match(r"\.([0-9]+)\.", rest)):
            return int(number[1])
    return None


def _same(pattern: str, text: str) -> bool:
    if "." not in pattern:
        return pattern == text
    return len(pattern) == len(text) and all(p in (".", c) for p, c in zip(pattern, text, strict=True))


def _run(patterns: Sequence[str], names: Sequence[str], form: Form, field: str) -> list[list[int | None]]:
    question = json.dumps({"patterns": list(patterns), "names": list(names), "form": form.value})
    try:
        # isolated and without site: nothing of the environment or of any package runs in there
        answer = subprocess.run(
            [sys.executable, "-I", "-S", str(_GUARD), str(CPU_S_MAX)],
            input=question.encode(),
            capture_output=True,
            timeout=WALL_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _overrun(patterns, field) from None
    except OSError as error:
        raise StoreIOError("patterns: cannot start the process that matches them") from error
    if answer.returncode != 0:
        # its own limits on time and memory end it with a signal or an exit code
        raise _overrun(patterns, field)
    result = json.loads(answer.stdout)
    if "bad" in result:
        raise expected(field, "regular expressions", quoted(result["bad"]), quoted(result["why"]))
    rows: list[list[int | None]] = result["rows"]
    return rows


def _overrun(patterns: Sequence[str], field: str) -> AdapterError:
    shown = quoted(patterns[0], 80) if len(patterns) == 1 else f"{len(patterns)} patterns"
    wanted = f"patterns that match this backbone's module names within {CPU_S_MAX} s"
    return expected(field, wanted, shown, "name the modules in a list instead")
