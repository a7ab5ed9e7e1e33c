"""What runs in the next step: admission, chunked prefill beside decode, and what becomes of the tokens.

Owns the queue and the running requests. Knows adapters only as leases and memory only as pages.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from weft.adapters_store.composition import Members
from weft.adapters_store.errors import AdapterError
from weft.adapters_store.leases import Lease
from weft.adapters_store.traits import traits_of
from weft.kernels.batch import Block
from weft.server.engine.failures import failure_of
from weft.server.engine.messages import Event, Failed, Failure, FinishReason, RequestId, Scheduled, Tokens
from weft.server.engine.pages import PagePool
from weft.server.engine.request import NO_TRAITS, Request, acts_from

# an adapter that has waited this long for room waits for room that others keep taking
ADAPTER_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class Item:
    """A request's part in a step: ``count`` tokens from position ``start``.

    samples:  the last of them is followed by a new one
    block:    the adapter's operators, None for base rows
    """

    request: Request
    start: int
    count: int
    samples: bool
    block: Block | None


@dataclass(frozen=True, slots=True)
class Batch:
    """The plan for one step, complete when built; items of one adapter are neighbours, base rows come first."""

    items: tuple[Item, ...]

    @property
    def tokens(self) -> int:
        """Rows of the step."""
        return sum(item.count for item in self.items)

    @property
    def distinct_adapters(self) -> int:
        """Adapters that its rows carry, the bare backbone not counted."""
        return len({item.block.key for item in self.items if item.block is not None})


class AdapterSource(Protocol):
    """Where adapters come from: ``Residency``, as far as the scheduler needs it."""

    def acquire(self, digest: str, members: Members = ()) -> Lease | None: ...
    def lacks_room(self, digest: str) -> bool: ...
    def release(self, lease: Lease) -> None: ...


class Scheduler:
    """Continuous batching over a token budget; requests join and leave at every step."""

    def __init__(
        self,
        pages: PagePool,
        adapters: AdapterSource,
        batch_tokens_max: int,
        batch_requests_max: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        if batch_requests_max >= batch_tokens_max:
            # a step in which everybody decodes must leave room for prompts
            wanted = f"fewer requests than the {batch_tokens_max} of batch_tokens_max"
            raise ValueError(f"batch_requests_max: expected {wanted}, got {batch_requests_max}")
        self._pages = pages
        self._adapters = adapters
        self._batch_tokens_max = batch_tokens_max
        self._batch_requests_max = batch_requests_max
        self._clock = clock
        self._waiting: dict[RequestId, Request] = {}
        self._running: dict[RequestId, Request] = {}
        self._events: list[Event] = []
        self._hits = 0

    @property
    def waiting(self) -> Sequence[Request]:
        """Requests not admitted yet, oldest first."""
        return tuple(self._waiting.values())

    @property
    def running(self) -> Sequence[Request]:
        """Admitted requests, oldest first."""
        return tuple(self._running.values())

    def submit(self, request: Request) -> None:
        """Queue a request; one that can never fit ends with REQUEST_TOO_LARGE instead."""
        id = request.submit.id
        assert id not in self._waiting, "ids name one request at a time"
        assert id not in self._running, "ids name one request at a time"
        assert len(request.submit.prompt) * request.submit.max_new_tokens > 0, "the door lets nothing else through"
        problem = self._too_large(request)
        if problem is not None:
            self._events.append(Failed(request.submit.id, Failure.REQUEST_TOO_LARGE, problem))
            return
        self._waiting[request.submit.id] = request

    def abort(self, id: RequestId) -> None:
        """Forget a request and free what it holds; unknown ids are those that just ended."""
        request = self._waiting.pop(id, None) or self._running.pop(id, None)
        if request is not None:
            self._free(request)

    def plan(self) -> Batch:
        """Admit what fits, then give every decoding request its token and the rest of the budget to prompts."""
        self._admit()
        budget = self._batch_tokens_max
        items: list[Item] = []
        for request in sorted(self._running.values(), key=lambda request: request.pending > 1):
            count = min(request.pending, budget)
            if count < request.pending and request.traits.whole_prompt:
                continue
            if count:
                items.append(_item(request, count))
                budget -= count
        items.sort(key=_adapter_order)
        return Batch(tuple(items))

    def commit(self, batch: Batch, sampled: Sequence[int | None]) -> list[Event]:
        """Take in the tokens of a step, one per sampling item, None where the logits were not finite."""
        tokens = iter(sampled)
        for item in batch.items:
            item.request.computed += item.count
            if item.samples:
                self._take(item.request, next(tokens))
        return self.drain_events()

    def fail(self, batch: Batch, failure: Failure, message: str) -> list[Event]:
        """End every request of a batch that could not be run."""
        for item in batch.items:
            self._retire(item.request, Failed(item.request.submit.id, failure, message))
        return self.drain_events()

    def drain_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def drain_hits(self) -> int:
        """Requests admitted since the last call that found their adapter loaded."""
        hits, self._hits = self._hits, 0
        return hits

    def _take(self, request: Request, token: int | None) -> None:
        id = request.submit.id
        if token is None:
            message = "the logits are not finite: the adapter's weights, or the backbone's, overflow on this prompt"
            self._retire(request, Failed(id, Failure.NON_FINITE_LOGITS, message))
            return
        request.output.append(token)
        finish = None
        if token in request.submit.stop_ids:
            finish = FinishReason.STOP
        elif len(request.output) == request.submit.max_new_tokens:
            finish = FinishReason.LENGTH
        event = Tokens(id, (token,), finish)
        if finish is None:
            self._events.append(event)
        else:
            self._retire(request, event)

    def _retire(self, request: Request, event: Event) -> None:
        self._running.pop(request.submit.id, None)
        self._waiting.pop(request.submit.id, None)
        self._free(request)
        self._events.append(event)

    def _free(self, request: Request) -> None:
        self._pages.release(request.pages)
        request.pages, request.slots = (), None
        if request.lease is not None:
            self._adapters.release(request.lease)
            request.lease = None

    def _admit(self) -> None:
        """Oldest first. A request that lacks pages is not overtaken; one that lacks its adapter is.

        Where the adapter lacks room that is for a while: then nobody behind it is admitted, so that leases end and a
        large adapter finds room among small ones. Who waits for the loader keeps nobody waiting.
        """
        now = self._clock()
        for request in tuple(self._waiting.values()):
            full = len(self._running) >= self._batch_requests_max
            if full or not self._pages.fits(request.slots_max):
                return
            # the lease comes last: one held in the queue would keep room from whoever is ahead
            if not self._hold_adapter(request, now):
                if self._has_lost_patience(request, now):
                    return
                continue
            if not self._fits_with_adapter(request):
                if request.submit.id in self._waiting:
                    return
                continue
            request.pages = self._pages.allocate(request.slots_max)
            request.slots = self._slots(request.pages)
            del self._waiting[request.submit.id]
            self._running[request.submit.id] = request
            self._hits += request.lease is not None and request.missed_s is None
            wait_s = 0.0 if request.missed_s is None else now - request.missed_s
            self._events.append(Scheduled(request.submit.id, now - request.submitted_s, wait_s))

    def _too_large(self, request: Request) -> str | None:
        """Why a request can never run, or None."""
        if self._pages.count(request.slots_max) > self._pages.total:
            limit = self._pages.total * self._pages.page_tokens
            beside = request.slots_max - request.length_max
            also = f" and {beside} more for the adapter's side network" if beside else ""
            return f"prompt plus max_new_tokens: kv_bytes_max holds {limit} tokens, got {request.length_max}{also}"
        whole = self._batch_tokens_max - self._batch_requests_max
        if request.traits.whole_prompt and request.length > whole:
            return f"prompt: this adapter's gates need it in one step, which holds {whole} tokens, got {request.length}"
        return None

    def _fits_with_adapter(self, request: Request) -> bool:
        """Take in what the adapter just held asks of its requests; give it back while they do not fit."""
        assert request.slots is None
        if request.lease is None:
            return True
        request.traits = traits_of(request.lease.block.directory)
        request.acts_from = acts_from(request.traits, request.submit.prompt, request.length_max)
        problem = self._too_large(request)
        if problem is not None:
            self._retire(request, Failed(request.submit.id, Failure.REQUEST_TOO_LARGE, problem))
            return False
        if self._pages.fits(request.slots_max):
            return True
        self._adapters.release(request.lease)
        request.lease, request.traits = None, NO_TRAITS
        return False

    def _hold_adapter(self, request: Request, now: float) -> bool:
        digest = request.submit.adapter
        if digest is None:
            return True
        try:
            request.lease = self._adapters.acquire(digest, request.submit.members)
        except AdapterError as error:
            self._retire(request, Failed(request.submit.id, failure_of(error), str(error)))
            return False
        if request.lease is None and request.missed_s is None:
            request.missed_s = now
        return request.lease is not None

    def _has_lost_patience(self, request: Request, now: float) -> bool:
        """Whether a request that could not have its adapter just now has waited long enough for the room."""
        adapter = request.submit.adapter
        if adapter is None or request.submit.id not in self._waiting or not self._adapters.lacks_room(adapter):
            return False
        if request.cramped_s is None:
            request.cramped_s = now
        return now - request.cramped_s > ADAPTER_PATIENCE_S

    def _slots(self, pages: tuple[int, ...]) -> torch.Tensor:
        size = self._pages.page_tokens
        return (torch.tensor(pages)[:, None] * size + torch.arange(size)).flatten()


def _item(request: Request, count: int) -> Item:
    block = None if request.lease is None else request.lease.block
    return Item(request, request.computed, count, count == request.pending, block)


def _adapter_order(item: Item) -> int:
    return -1 if item.block is None else item.block.key
