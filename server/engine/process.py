"""The engine process: takes commands from the front's end of a pipe, steps, sends what happened. Imports no gRPC."""

import ctypes
import logging
import signal
import sys
from multiprocessing.connection import Connection

from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Command, Ready, Shutdown, StartFailed

# waiting for adapter files there is nothing to compute: look for them this often
LOAD_POLL_S = 0.002
PR_SET_PDEATHSIG = 1


def main(connection: Connection, config: EngineConfig) -> None:
    """Serve until ``Shutdown`` or the death of the front. First message: Ready or StartFailed; then lists of events."""
    # the front decides when to stop; a Ctrl-C in the terminal reaches the whole process group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    try:
        _serve(connection, config)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # the front is gone: nobody is left to answer
        return


def _serve(connection: Connection, config: EngineConfig) -> None:
    from weft.kernels.dispatch import KernelsUnavailable
    from weft.server.backbone.errors import BackboneError
    from weft.server.engine.engine import Engine

    try:
        engine = Engine.load(config)
    except (BackboneError, KernelsUnavailable, ValueError) as error:
        connection.send(StartFailed(str(error)))
        return
    connection.send(Ready(engine.info()))
    connection.send([engine.stats()])
    while True:
        idle = not engine.busy
        patience = None if idle else 0 if engine.scheduler.running else LOAD_POLL_S
        while connection.poll(patience):
            command: Command = connection.recv()
            if isinstance(command, Shutdown):
                return
            engine.handle(command)
            patience = 0
        events = engine.step()
        if events:
            connection.send(events)


def _die_with_parent() -> None:
    """Linux: be killed when the front dies in whatever way; elsewhere the closed pipe ends the next step."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
