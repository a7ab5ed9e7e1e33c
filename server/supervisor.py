"""Starts the engine process, notices when it dies or hangs, and starts it again.

Owns the pipe: a thread reads it and hands events to the event loop, a thread writes it, so that neither side
ever waits for the other. What the events mean is the relay's business.
"""

import asyncio
import logging
import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Command, EngineInfo, Event, Ready, RestartCause, Shutdown, StartFailed
from weft.server.spawned import enter

logger = logging.getLogger(__name__)

ENGINE = "weft.server.engine.process:main"
# time that a process gets to exit after it closed its pipe
CLOSED_S_MAX = 0.5


class EngineFailed(Exception):
    """The engine process cannot be brought to serve; the message says what to do about it."""


class Listener(Protocol):
    """Who hears of the engine; called on the event loop's thread."""

    @property
    def busy(self) -> bool:
        """Whether the engine owes somebody an event."""
        ...

    def engine_ready(self, info: EngineInfo) -> None: ...
    def engine_lost(self) -> None: ...
    def engine_restarting(self, cause: RestartCause) -> None: ...
    def deliver(self, events: list[Event]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When to start again and when to give up. A death within ``quick_s`` of being ready counts as a failure."""

    failures_max: int = 5
    quick_s: float = 60.0
    backoff_s: float = 0.1
    backoff_s_max: float = 10.0
    stall_s_max: float = 300.0
    stop_s_max: float = 5.0


class EngineProcess:
    """One life of the engine: a process, its pipe and the two threads that serve it.

    Raises EngineFailed where the machine has no room for them.
    """

    def __init__(self, target: str, config: EngineConfig, listener: Listener) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        # a start that was given up leaves nobody to hear of it
        self.ready.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        self.heard_s = time.monotonic()
        self.stalled = False
        self._listener = listener
        self._outbox: SimpleQueue[Command | None] = SimpleQueue()
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe(duplex=True)
        self._process = spawn.Process(target=enter, args=(target, theirs, config), name="weft-engine", daemon=True)
        self._threads = [Thread(target=each, name=each.__name__, daemon=True) for each in (self._read, self._write)]
        try:
            # from the loop's own thread: the engine asks to die with the thread that started it
            self._process.start()
            for thread in self._threads:
                thread.start()
        except (OSError, RuntimeError) as error:
            if self._process.pid is not None:
                self._process.kill()
                self._process.join()
                self._process.close()
            self._connection.close()
            raise EngineFailed(f"expected room for another process and its threads, got none: {error}") from error
        finally:
            theirs.close()

    @property
    def pid(self) -> int | None:
        """Id of the process."""
        return self._process.pid

    @property
    def cause(self) -> RestartCause:
        """Why it ended, if it has."""
        if self.stalled:
            return "stall"
        served = self.ready.done() and self.ready.exception() is None
        return "exit" if served else "start"

    def send(self, command: Command) -> None:
        """Queue a command; the engine may be gone, which its exit will tell."""
        self._outbox.put(command)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    async def stop(self, grace_s: float) -> None:
        """Ask the process to end, insist after ``grace_s``, and wait until it is gone."""
        if not self.ready.done():
            # it reads no commands yet, and nobody depends on it
            self._process.kill()
        self._outbox.put(Shutdown())
        await asyncio.wait([self.exited], timeout=grace_s)
        if not self.exited.done():
            logger.warning("the engine did not stop within %g s and is killed", grace_s)
            self._process.kill()
        await asyncio.shield(self.exited)

    def close(self) -> None:
        """Free what the process leaves behind, after its exit."""
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._connection.close()
        self._process.close()

    def _read(self) -> None:
        """Hand over what the engine says until its end, then its exit code."""
        while True:
            # the pipe first: what the engine said before it died still counts
            if self._connection not in wait([self._connection, self._process.sentinel]):
                break
            try:
                said = self._connection.recv()
            except (EOFError, OSError):
                break
            self._loop.call_soon_threadsafe(self._hear, said if isinstance(said, list) else [said])
        # a process that closed its pipe has nothing to live for
        self._process.join(timeout=CLOSED_S_MAX)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._loop.call_soon_threadsafe(self._gone, self._process.exitcode)

    def _write(self) -> None:
        while (command := self._outbox.get()) is not None:
            try:
                self._connection.send(command)
            except OSError:
                return

    def _hear(self, events: list[Event]) -> None:
        self.heard_s = time.monotonic()
        for i, event in enumerate(events):
            if isinstance(event, Ready):
                self._listener.engine_ready(event.info)
                self.ready.set_result(event.info)
                events = events[i + 1 :]
                break
            if isinstance(event, StartFailed):
                self.ready.set_exception(EngineFailed(event.message))
                return
        self._listener.deliver(events)

    def _gone(self, exitcode: int | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(EngineFailed(f"the engine ended before it was ready, exit code {exitcode}"))
        self.exited.set_result(exitcode)


class Supervisor:
    """Keeps one engine running. ``gave_up`` is set with the reason when that is not possible."""

    def __init__(self, config: EngineConfig, listener: Listener, policy: RestartPolicy, target: str = ENGINE) -> None:
        self.gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._config = config
        self._listener = listener
        self._policy = policy
        self._target = target
        self._engine: EngineProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        """Id of the engine process, while there is one."""
        return self._engine.pid if self._engine is not None else None

    def send(self, command: Command) -> None:
        """Pass a command on; without an engine it is dropped, and its caller hears ``engine_lost``."""
        if self._engine is not None:
            self._engine.send(command)

    async def start(self) -> None:
        """Bring the first engine to serve; raises EngineFailed, because trying the same again helps nobody."""
        engine = self._spawn()
        try:
            await asyncio.shield(engine.ready)
        except EngineFailed:
            await self._end(engine)
            raise
        self._tasks = [asyncio.create_task(each) for each in (self._keep(engine), self._watch())]
        for task in self._tasks:
            task.add_done_callback(self._no_longer_looks_after)

    async def stop(self) -> None:
        """End the engine and stop looking after it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._engine is not None:
            await self._end(self._engine)

    def _spawn(self) -> EngineProcess:
        self._engine = EngineProcess(self._target, self._config, self._listener)
        return self._engine

    async def _end(self, engine: EngineProcess) -> None:
        """See a process to its end and free what it leaves."""
        self._engine = None
        await engine.stop(self._policy.stop_s_max)
        engine.close()

    async def _keep(self, engine: EngineProcess) -> None:
        """Start a new engine whenever one ends, more slowly each time it ends soon."""
        failures = 0
        began_s = time.monotonic()
        while True:
            exitcode = await asyncio.shield(engine.exited)
            failures = failures + 1 if time.monotonic() - began_s < self._policy.quick_s else 1
            logger.error("the engine ended with exit code %s (%d in a row)", exitcode, failures)
            self._listener.engine_lost()
            await self._end(engine)
            started, failures = await self._respawn(failures, engine.cause)
            if started is None:
                self.gave_up.set_result(f"the engine ended {failures} times in a row, last exit code {exitcode}")
                return
            engine = started
            try:
                await asyncio.shield(engine.ready)
            except EngineFailed as error:
                logger.error("the engine cannot start: %s", error)
                await engine.stop(self._policy.stop_s_max)
            began_s = time.monotonic()

    async def _respawn(self, failures: int, cause: RestartCause) -> tuple[EngineProcess | None, int]:
        """Another process, or None after too many failures, and how many there were by then."""
        while failures < self._policy.failures_max:
            await asyncio.sleep(min(self._policy.backoff_s * 2 ** (failures - 1), self._policy.backoff_s_max))
            self._listener.engine_restarting(cause)
            try:
                return self._spawn(), failures
            except EngineFailed as error:
                failures, cause = failures + 1, "start"
                logger.error("the engine cannot start: %s (%d in a row)", error, failures)
        return None, failures

    def _no_longer_looks_after(self, task: asyncio.Task[None]) -> None:
        """A defect here must not leave a server that waits for an engine for ever."""
        if task.cancelled() or task.exception() is None or self.gave_up.done():
            return
        logger.error("nobody looks after the engine any more", exc_info=task.exception())
        self.gave_up.set_result("nobody looks after the engine any more: a defect of the server, see its log")

    async def _watch(self) -> None:
        """Kill an engine that owes somebody an answer and says nothing."""
        while True:
            await asyncio.sleep(self._policy.stall_s_max / 10)
            engine = self._engine
            if engine is None or not engine.ready.done():
                continue
            if not self._listener.busy:
                # silence counts from the moment that somebody waits
                engine.heard_s = time.monotonic()
            elif time.monotonic() - engine.heard_s > self._policy.stall_s_max:
                logger.error("the engine said nothing for %g s and is killed", self._policy.stall_s_max)
                engine.stalled = True
                engine.kill()
