"""Between the doors and the engine: the queue's bounds, who waits for which event, and which versions are in use.

Lives on the event loop's thread and knows neither gRPC nor processes. The engine is reached through ``EngineLink``;
what comes back arrives through ``deliver``. The engine never waits for a reader: every request has one mailbox that
merges what was not taken yet.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from weft.adapters_store import errors as store
from weft.adapters_store.report import AdapterReport
from weft.server import errors
from weft.server.engine.messages import (
    Abort,
    Command,
    Digest,
    EngineInfo,
    Event,
    Failed,
    Failure,
    Forget,
    Prepare,
    Prepared,
    Refused,
    RequestId,
    Scheduled,
    StepStats,
    Submit,
    Tokens,
)
from weft.server.metrics import Metrics
from weft.server.ticket import Ticket

# the slowest part of a start is known to nobody here; callers are told to come back when the table says
DOWN = "expected a running engine, got one that is starting again"
NO_NAMES: Mapping[str, str] = MappingProxyType({})


class EngineLink(Protocol):
    """The way to the engine, whichever process or thread it lives in. Never blocks."""

    def send(self, command: Command) -> None: ...


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may wait before callers are told to come back later."""

    requests_max: int
    tokens_max: int


def raised(failure: Failure, message: str, field: str = "") -> Exception:
    """The error that callers are told for a failure that the engine reports."""
    match failure:
        case Failure.ADAPTER_INVALID:
            return store.AdapterInvalid(message, field)
        case Failure.ADAPTER_TOO_LARGE:
            return store.AdapterTooLarge(message, field)
        case Failure.ADAPTER_CORRUPT:
            return store.AdapterCorrupt(message, field)
        case Failure.REQUEST_TOO_LARGE:
            return errors.RequestTooLarge(message, field=field)
        case Failure.NON_FINITE_LOGITS:
            return errors.NonFiniteLogits(message, field=field)
        case Failure.ADAPTER_INCOMPATIBLE:
            return store.AdapterIncompatible(message, field)
        case Failure.STORE_FULL:
            return store.StoreFull(message, field)
        case Failure.STORE_IO_ERROR:
            return store.StoreIOError(message, field)
        case Failure.OUT_OF_MEMORY:
            return errors.EngineMemory(message, field=field)
        case Failure.BUG:
            return errors.EngineBug(message, field=field)


class Relay:
    """Everything in flight between the doors and one engine at a time."""

    def __init__(self, link: EngineLink, limits: QueueLimits, metrics: Metrics) -> None:
        self.info: EngineInfo | None = None
        self.stats: StepStats | None = None
        self.draining = False
        self._link = link
        self._limits = limits
        self._metrics = metrics
        self._tickets: dict[RequestId, Ticket] = {}
        # tokens of requests that are not tickets yet
        self._places: list[int] = []
        self._prepares: dict[Digest, asyncio.Future[AdapterReport]] = {}
        self._users: Counter[Digest] = Counter()
        self._left = asyncio.Event()
        self._waiting_requests = 0
        self._waiting_tokens = 0
        self._serial = 0

    @property
    def busy(self) -> bool:
        """Whether the engine owes somebody an event."""
        return bool(self._tickets or self._prepares)

    @property
    def in_flight(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._tickets) + len(self._places)

    def engine(self) -> EngineInfo:
        """What the running engine is; raises EngineRestarting while there is none."""
        if self.info is None:
            raise errors.EngineRestarting(DOWN)
        return self.info

    def next_id(self) -> RequestId:
        """An id that no other request of this server has."""
        self._serial += 1
        return RequestId(f"r{self._serial}")

    def admit(self) -> None:
        """Raise Draining when nothing new is taken any more."""
        if self.draining:
            raise errors.Draining("expected a serving server, got one that is stopping")

    @contextmanager
    def place(self, tokens: int) -> Iterator[None]:
        """Stand in the queue with this many tokens while a request is made ready; raises Overloaded when it is full.

        Who goes on to ``submit`` in the same breath finds the place still free.
        """
        self._check_room(tokens)
        self._places.append(tokens)
        self._count_waiting(1, tokens)
        try:
            yield
        finally:
            self._places.remove(tokens)
            self._count_waiting(-1, -tokens)
            self._left.set()

    def submit(self, submit: Submit, names: Mapping[str, str] = NO_NAMES) -> Ticket:
        """Queue an admitted request, or say why not. ``names`` as for its ticket."""
        self.engine()
        ticket = Ticket(submit, names, self.leave)
        self._check_room(ticket.tokens_max)
        self._tickets[submit.id] = ticket
        self._users.update(submit.versions)
        self._count_waiting(1, ticket.tokens_max)
        self._metrics.admitted(len(submit.prompt))
        self._link.send(submit)
        return ticket

    def leave(self, ticket: Ticket, outcome: str) -> None:
        """Strike a request off, once; abort it in the engine unless it ended there."""
        if self._tickets.pop(ticket.submit.id, None) is None:
            return
        if not ticket.ended and self.info is not None:
            self._link.send(Abort(ticket.submit.id))
        self._unqueue(ticket)
        for digest in ticket.submit.versions:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]
        self._metrics.running(self.in_flight - self._waiting_requests)
        self._metrics.finished(outcome, time.monotonic() - ticket.began_s, ticket.received)
        if ticket.received:
            self._metrics.decoded(ticket.last_s - ticket.first_s, ticket.received)
        self._left.set()

    async def unused(self, digest: Digest) -> None:
        """Wait until no request in flight uses the version."""
        while self._users[digest]:
            self._left.clear()
            await self._left.wait()

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        while self.in_flight:
            self._left.clear()
            await self._left.wait()

    async def prepare(self, digest: Digest) -> AdapterReport:
        """Have the engine compile a version; raises the store's errors when it is refused."""
        self.engine()
        future = self._prepares.get(digest)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            # nobody may be left to hear of it
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._prepares[digest] = future
            self._link.send(Prepare(digest))
        return await asyncio.shield(future)

    def forget(self, digest: Digest) -> None:
        """Tell the engine that a version has no name any more."""
        # whoever prepares it after this must not be told what was true before
        self._prepares.pop(digest, None)
        if self.info is not None:
            self._link.send(Forget(digest))

    def check(self) -> None:
        """Assert that what is counted is what is there."""
        waiting = [*self._places, *(ticket.tokens_max for ticket in self._tickets.values() if ticket.waiting)]
        assert (len(waiting), sum(waiting)) == (self._waiting_requests, self._waiting_tokens)
        assert self._users == Counter(digest for t in self._tickets.values() for digest in t.submit.versions)

    def engine_ready(self, info: EngineInfo) -> None:
        """An engine serves from now on."""
        self.info = info
        self._metrics.engine_ready(info)

    def engine_lost(self) -> None:
        """The engine is gone, and with it all that was in flight."""
        self.info = None
        self.stats = None
        self._metrics.engine_lost()
        lost = errors.EngineRestarting("the engine stopped before the request was done; it is starting again")
        for ticket in self._tickets.values():
            ticket.ended = True
        self.fail_all(lost)

    def fail_all(self, error: Exception) -> None:
        """End everything in flight with an error."""
        for ticket in self._tickets.values():
            ticket.fail(error)
        for future in self._prepares.values():
            if not future.done():
                future.set_exception(error)
        self._prepares.clear()

    def deliver(self, events: Iterable[Event]) -> None:
        """Hand the engine's events to whoever waits for them; events of requests that left are dropped."""
        for event in events:
            match event:
                case Tokens():
                    self._tokens(event)
                case Scheduled():
                    self._scheduled(event)
                case Failed():
                    self._failed(event)
                case StepStats():
                    self.stats = event
                    self._metrics.step(event)
                case Prepared():
                    self._settle(event.digest, event.report, None)
                case Refused():
                    self._settle(event.digest, None, raised(event.failure, event.message, event.field))

    def _tokens(self, event: Tokens) -> None:
        self._metrics.generated(len(event.tokens))
        ticket = self._tickets.get(event.id)
        if ticket is None:
            return
        self._unqueue(ticket)
        ticket.ended = event.finish is not None
        if event.tokens:
            ticket.count(len(event.tokens), self._metrics)
        ticket.add(event.tokens, event.finish)

    def _scheduled(self, event: Scheduled) -> None:
        self._metrics.scheduled(event.queue_s, event.adapter_wait_s)
        ticket = self._tickets.get(event.id)
        if ticket is not None:
            ticket.scheduled_s = time.monotonic()
            self._unqueue(ticket)

    def _failed(self, event: Failed) -> None:
        ticket = self._tickets.get(event.id)
        if ticket is None:
            return
        if ticket.submit.members:
            # here the request may well be to blame: it chose them
            error = raised(event.failure, ticket.named(event.message), "adapters")
        elif event.failure is Failure.ADAPTER_INVALID:
            # but not for what its one adapter has become
            error = store.AdapterIncompatible(event.message, "adapter")
        else:
            error = raised(event.failure, event.message)
        ticket.ended = True
        ticket.fail(error)

    def _settle(self, digest: Digest, report: AdapterReport | None, error: Exception | None) -> None:
        future = self._prepares.pop(digest, None)
        if future is None or future.done():
            return
        if error is not None:
            future.set_exception(error)
        elif report is not None:
            future.set_result(report)

    def _check_room(self, tokens: int) -> None:
        if self._waiting_requests >= self._limits.requests_max:
            raise errors.Overloaded(f"queue_requests_max is {self._limits.requests_max}, and as many wait")
        # a request larger than the whole queue may wait alone: whether it can run is the engine's to say
        left = self._limits.tokens_max - self._waiting_tokens
        if tokens > left and self._waiting_requests:
            raise errors.Overloaded(f"request needs {tokens} tokens, queue_tokens_max leaves {left}")

    def _unqueue(self, ticket: Ticket) -> None:
        if ticket.waiting:
            ticket.waiting = False
            self._count_waiting(-1, -ticket.tokens_max)

    def _count_waiting(self, requests: int, tokens: int) -> None:
        self._waiting_requests += requests
        self._waiting_tokens += tokens
        self._metrics.queued(self._waiting_requests, self._waiting_tokens)
        self._metrics.running(self.in_flight - self._waiting_requests)
