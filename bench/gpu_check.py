"""`make gpu-check`: on a machine with a GPU, prove that the kernels and the engine are right; one JSON row per test.

Writes to ``$OUT`` (or bench/results) after every test, so that a run that is cut short has still said something.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from weft.bench import record

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """Collects what each test came to."""

    def __init__(self, path: Path):
        self._path = path
        self._rows: list[dict[str, object]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of a test; a failing set-up counts, a passing one does not."""
        if report.when == "call" or report.outcome != "passed":
            row = {"case": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            self._rows.append(row | ({"why": report.longreprtext[-2000:]} if report.outcome == "failed" else {}))
            record.write(self._path, {**record.circumstances(torch.device("cuda")), "rows": self._rows})


def main() -> int:
    """Run every test marked ``gpu``; the exit status is pytest's."""
    if not torch.cuda.is_available():
        sys.stderr.write("gpu-check: expected a CUDA device, got none\n")
        return 1
    out = Path(os.environ.get("OUT", ROOT / "bench" / "results"))
    os.chdir(ROOT)
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/kernels", "tests/server/engine"]
    return int(pytest.main(arguments, plugins=[Recorder(out / "gpu_check.json")]))


if __name__ == "__main__":
    sys.exit(main())
