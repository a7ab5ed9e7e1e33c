"""One row of a result file: one fact with all its circumstances."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles

import torch

PACKAGES = ("torch", "transformers", "triton", "peft")
ROOT = Path(__file__).resolve().parent.parent


def circumstances(device: torch.device) -> dict[str, object]:
    """Machine, versions, commit and date of this run."""
    return {
        "machine": _machine(device),
        "threads": torch.get_num_threads(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles."""
    low, high = (values[0], values[0]) if len(values) == 1 else _tails(values)
    return {"p50": round(median(values), 2), "p20": round(low, 2), "p80": round(high, 2)}


def write(path: Path, report: dict[str, object]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _version(name: str) -> str:
    """Empty where the package is not installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return ""


def _tails(values: Sequence[float]) -> tuple[float, float]:
    cuts = quantiles(values, n=5, method="inclusive")
    return cuts[0], cuts[-1]


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit of the source tree, marked when the tree differs from it; ``unknown`` outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
