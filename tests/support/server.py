"""A real `weft serve` in its own process, as an operator starts it, and how tests look at it from outside."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from weft.client import Client
from weft.server.demo import tasks

READY = re.compile(r"weft ready grpc=(\S+) metrics=(\S+)")
START_S = 60.0


class Server:
    """A running server; ``lines`` is what it has printed."""

    def __init__(self, process: subprocess.Popen[str], store: Path):
        self.process = process
        self.store = store
        self.lines: list[str] = []
        self.grpc = self.metrics = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self) -> None:
        """Return when the ready line is out."""
        if not self._ready.wait(START_S) or not self.grpc:
            self.process.kill()
            raise AssertionError("the server did not become ready:\n" + "".join(self.lines))

    def client(self) -> Client:
        """A new connection."""
        return Client(self.grpc)

    def scrape(self) -> dict[str, float]:
        """The metrics page as {sample with labels: value}."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as page:
            lines = [line for line in page.read().decode().splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def engine_pid(self) -> int:
        """The process id of the engine: the server's child that has the engine's entry point's libraries mapped."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                    return int(child)
        raise AssertionError("the server has no engine process")

    def stop(self, signal_: int = signal.SIGTERM, patience_s: float = 40.0) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(signal_)
        return self.process.wait(patience_s)

    def close(self) -> None:
        """Kill the server if it still runs, and free what it leaves."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := READY.search(line):
                self.grpc, self.metrics = found.groups()
                self._ready.set()
        self._ready.set()


@contextmanager
def serving(store: Path, *options: str, model: Path = tasks.ASSETS_DIR / "backbone") -> Iterator[Server]:
    """A server on free ports over the demo backbone in float32; killed at the end if it still runs."""
    command: Sequence[str] = [
        sys.executable, "-m", "weft.server.cli", "serve", "--model", str(model), "--dtype", "float32",
        "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--store", str(store), *options,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    server = Server(process, store)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def until(condition, timeout_s: float = 20.0, every_s: float = 0.02) -> float:
    """Wait for a condition and return how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "the condition did not come true in time"
        time.sleep(every_s)
    return time.monotonic() - started
