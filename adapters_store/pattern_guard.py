"""The other process of ``patterns``: reads a question, runs regular expressions on it, answers, or is killed.

Runs alone (``python -I -S pattern_guard.py cpu_seconds``), imports nothing of ours, and limits itself as well: should
its parent die, it does not go on for ever.
"""

import json
import re
import resource
import sys

MEMORY_BYTES_MAX = 256 << 20

FORMS = {
    "fullmatch": "{}",
    "suffix": r"(.*\.)?({})$",
    "layer": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
}


def main() -> None:
    """One question on standard input, one answer on standard output."""
    seconds = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    question = json.load(sys.stdin)
    form = question["form"]
    rows = []
    for pattern in question["patterns"]:
        try:
            compiled = re.compile(FORMS[form].replace("{}", pattern))
        except (re.error, OverflowError, RecursionError) as error:
            json.dump({"bad": pattern, "why": str(error)[:200]}, sys.stdout)
            return
        matcher = compiled.fullmatch if form == "fullmatch" else compiled.match
        found = [matcher(name) for name in question["names"]]
        rows.append([None if m is None else int(m["idx"]) if form == "layer" else 0 for m in found])
    json.dump({"rows": rows}, sys.stdout)


if __name__ == "__main__":
    main()
