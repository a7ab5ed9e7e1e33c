"""Starts and stops a real ``weft serve`` in a process of its own, as anybody would."""

import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

READY = re.compile(r"^weft ready grpc=(?P<grpc>\S+) metrics=(?P<metrics>\S+)$", re.MULTILINE)
FULLEST = re.compile(r"^weft_batch_(rows|adapters)_max (\S+)$", re.MULTILINE)
READY_S_MAX = 120.0
METRICS_S_MAX = 10.0
STOP_S_MAX = 60.0
POLL_S = 0.05
LOG_LINES_SHOWN = 15


class DemoFailed(Exception):
    """The demonstration could not be carried through; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs; ``folder`` holds its store, its output and its log."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    grpc: str
    metrics: str

    def stop(self) -> None:
        """Ask it to end, as a process manager would, and expect that it ends well."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise DemoFailed(f"expected the server to stop within {STOP_S_MAX:g} s of SIGTERM, got none") from None
        if status != 0:
            raise DemoFailed(f"expected the server to end with 0, got {status}\n{_log(self.folder)}")


@dataclass(frozen=True, slots=True)
class Fullest:
    """The most that one step of the engine has held: rows (tokens of prompts and of answers), distinct adapters."""

    rows: int
    adapters: int


def fullest_step(metrics: str) -> Fullest:
    """Ask the server at this address of its metrics; raises DemoFailed when it does not tell."""
    try:
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=METRICS_S_MAX) as page:
            found = dict(FULLEST.findall(page.read().decode()))
        return Fullest(rows=int(float(found["rows"])), adapters=int(float(found["adapters"])))
    except (OSError, KeyError) as error:
        raise DemoFailed(f"expected metrics of the fullest step at {metrics}, got {error!r}") from None


def start(model: Path, folder: Path, *options: str) -> Server:
    """Start a server on free ports of this machine and return it once it takes requests."""
    command = [
        sys.executable,
        "-m",
        "weft.server.cli",
        "serve",
        "--model",
        str(model),
        "--store",
        str(folder / "store"),
    ]
    command += ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", *options]
    # files, not pipes: with --keep the server outlives whoever would read the pipe. A session of its own: ctrl-C is
    # for the demonstration, which then stops the server itself
    with (folder / "output").open("wb") as out, (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, start_new_session=True)
    try:
        found = _wait_ready(process, folder)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return Server(process, folder, found["grpc"], found["metrics"])


def _wait_ready(process: "subprocess.Popen[bytes]", folder: Path) -> "re.Match[str]":
    deadline_s = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline_s:
        found = READY.search((folder / "output").read_text(encoding="utf-8", errors="replace"))
        if found is not None:
            return found
        if process.poll() is not None:
            raise DemoFailed(f"the server ended with {process.returncode} before it was ready\n{_log(folder)}")
        time.sleep(POLL_S)
    raise DemoFailed(f"expected the server to be ready within {READY_S_MAX:g} s, got none\n{_log(folder)}")


def _log(folder: Path) -> str:
    lines = (folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES_SHOWN:])
