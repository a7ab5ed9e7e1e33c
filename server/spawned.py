"""First function of the engine process. Imports nothing of the front, so that the engine does not carry it along."""

from importlib import import_module
from multiprocessing.connection import Connection

from weft.server.engine.config import EngineConfig


def enter(target: str, connection: "Connection[object, object]", config: EngineConfig) -> None:
    """Run ``module:function`` with its end of the pipe; named by text because the front must not import it."""
    module, _, function = target.partition(":")
    getattr(import_module(module), function)(connection, config)
