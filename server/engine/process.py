"""The engine process: takes commands from the front's end of a pipe, steps, sends what happened. Imports no gRPC."""

import ctypes
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Command, Ready, Shutdown, StartFailed

if TYPE_CHECKING:
    from weft.server.engine.engine import Engine

# waiting for adapter files there is nothing to compute: look for them this often
LOAD_POLL_S = 0.002
PR_SET_PDEATHSIG = 1


def main(connection: "Connection[object, Command]", config: EngineConfig) -> None:
    """Serve until ``Shutdown`` or the death of the front. First message: Ready or StartFailed; then lists of events."""
    # the front decides when to stop; a Ctrl-C in the terminal reaches the whole process group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent()
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    front = Front(connection)
    try:
        _serve(front, config)
    except FrontGone:
        # nobody is left to answer
        return


class FrontGone(Exception):
    """The other end of the pipe is closed."""


class Front:
    """The engine's end of the pipe; tells the pipe's end from any other trouble."""

    def __init__(self, connection: "Connection[object, Command]"):
        self._connection = connection

    def send(self, said: object) -> None:
        """Say something to the front."""
        with _gone_when_closed():
            self._connection.send(said)

    def commands(self, patience_s: float | None) -> Iterator[Command]:
        """What the front has said by now; waits so long for the first, None for ever."""
        with _gone_when_closed():
            while self._connection.poll(patience_s):
                yield self._connection.recv()
                patience_s = 0


@contextmanager
def _gone_when_closed() -> Iterator[None]:
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        raise FrontGone from error


def _serve(front: Front, config: EngineConfig) -> None:
    engine = _start(config)
    if isinstance(engine, StartFailed):
        front.send(engine)
        return
    front.send(Ready(engine.info()))
    front.send([engine.stats()])
    while True:
        idle = not engine.busy
        patience_s = None if idle else 0 if engine.scheduler.running else LOAD_POLL_S
        for command in list(front.commands(patience_s)):
            if isinstance(command, Shutdown):
                return
            engine.handle(command)
        if events := engine.step():
            front.send(events)


def _start(config: EngineConfig) -> "Engine | StartFailed":
    """The engine, or why the operator's choices do not make one."""
    from weft.adapters_store.errors import AdapterError
    from weft.kernels.dispatch import KernelsUnavailable
    from weft.server.backbone.errors import BackboneError
    from weft.server.engine.engine import Engine
    from weft.server.engine.failures import out_of_memory

    try:
        return Engine.load(config)
    except (BackboneError, KernelsUnavailable, ValueError) as error:
        return StartFailed(str(error))
    except AdapterError as error:
        return StartFailed(f"store {config.store}: {error}")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        options = "adapter_memory_bytes_max, working_set_bytes_max and kv_bytes_max"
        return StartFailed(f"expected memory for the backbone beside {options}, got too little: lower one of them")


def _die_with_parent() -> None:
    """Linux: be killed when the front dies in whatever way; elsewhere the closed pipe ends the next step."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
