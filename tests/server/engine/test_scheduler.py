"""The scheduler alone: admission, the token budget, order, what a step's end does, and that nothing is ever lost."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.adapters_store.errors import AdapterTooLarge
from weft.adapters_store.report import Traits
from weft.kernels.extras import Kind, Piece, Record
from weft.server.engine.messages import (
    Digest,
    Failed,
    Failure,
    FinishReason,
    RequestId,
    Sampling,
    Scheduled,
    Submit,
    Tokens,
)
from weft.server.engine.pages import PagePool
from weft.server.engine.request import Request, acts_from
from weft.server.engine.scheduler import ADAPTER_PATIENCE_S, Scheduler


@dataclass
class FakeResidency:
    """Adapters that are there, are on their way, or can never come."""

    there: set[str] = field(default_factory=set)
    impossible: set[str] = field(default_factory=set)
    loading: set[str] = field(default_factory=set)
    held: list[str] = field(default_factory=list)
    records: dict[str, tuple[Record, ...]] = field(default_factory=dict)

    def acquire(self, digest, members=()):
        if digest in self.impossible:
            raise AdapterTooLarge("adapter needs 9 bytes, got 1")
        if digest not in self.there:
            return None
        self.held.append(digest)
        directory = SimpleNamespace(records=self.records.get(digest, ()))
        block = SimpleNamespace(key=sorted(self.there).index(digest), directory=directory)
        return SimpleNamespace(digest=digest, block=block)

    def lacks_room(self, digest):
        return digest not in self.loading

    def release(self, lease):
        self.held.remove(lease.digest)


def make(pages=64, tokens=16, requests=8, there=("a", "b"), clock=lambda: 1.0):
    residency = FakeResidency(set(there))
    pool = PagePool(pages, 4)
    return Scheduler(pool, residency, tokens, requests, clock=clock), residency, pool


def submit(scheduler, id, prompt=3, new=2, adapter=None, stop=()):
    digest = None if adapter is None else Digest(adapter)
    message = Submit(RequestId(id), tuple(range(prompt)), new, Sampling(), digest, frozenset(stop))
    scheduler.submit(Request(message, submitted_s=0.0))


def run_step(scheduler, token=50):
    batch = scheduler.plan()
    return batch, scheduler.commit(batch, [token for item in batch.items if item.samples])


def test_a_request_is_scheduled_then_yields_tokens_then_finishes():
    scheduler, _, pool = make()
    submit(scheduler, "r", prompt=3, new=2)
    batch, events = run_step(scheduler)
    assert [(i.start, i.count, i.samples) for i in batch.items] == [(0, 3, True)]
    assert events == [Scheduled(RequestId("r"), 1.0, 0.0), Tokens(RequestId("r"), (50,))]
    batch, events = run_step(scheduler, 51)
    assert [(i.start, i.count) for i in batch.items] == [(3, 1)]
    assert events == [Tokens(RequestId("r"), (51,), FinishReason.LENGTH)]
    assert pool.used == 0
    assert not scheduler.plan().items


def test_a_stop_token_is_the_last_one():
    scheduler, _, _ = make()
    submit(scheduler, "r", new=9, stop=[50])
    assert run_step(scheduler, 50)[1][-1] == Tokens(RequestId("r"), (50,), FinishReason.STOP)


def test_a_long_prompt_is_cut_into_chunks_while_others_decode():
    scheduler, _, _ = make(tokens=8, requests=4)
    submit(scheduler, "short", prompt=2, new=9)
    run_step(scheduler)
    submit(scheduler, "long", prompt=18, new=2)
    seen = []
    for _ in range(3):
        batch, _ = run_step(scheduler)
        seen.append({i.request.submit.id: (i.start, i.count, i.samples) for i in batch.items})
    assert [step["short"] for step in seen] == [(2, 1, True), (3, 1, True), (4, 1, True)]
    assert [step["long"] for step in seen] == [(0, 7, False), (7, 7, False), (14, 4, True)]


def test_rows_stand_by_adapter_and_base_rows_come_first():
    scheduler, _, _ = make()
    for id, adapter in (("1", "b"), ("2", None), ("3", "a"), ("4", "b"), ("5", None)):
        submit(scheduler, id, adapter=adapter)
    order = [item.request.submit.adapter for item in scheduler.plan().items]
    assert order == [None, None, "a", "b", "b"]


def test_a_request_that_waits_for_its_adapter_is_overtaken():
    scheduler, residency, _ = make(there=["a"])
    submit(scheduler, "slow", adapter="late")
    submit(scheduler, "fast", adapter="a")
    assert [i.request.submit.id for i in run_step(scheduler)[0].items] == ["fast"]
    residency.there.add("late")
    assert "slow" in [i.request.submit.id for i in run_step(scheduler)[0].items]


def test_a_request_that_waits_for_the_loader_is_overtaken_for_as_long_as_it_takes():
    now = [1.0]
    scheduler, residency, _ = make(there=["a"], clock=lambda: now[0])
    residency.loading.add("slow")
    submit(scheduler, "slow", adapter="slow")
    for number, adapter in enumerate(("a", None, "a", None)):
        now[0] += 2 * ADAPTER_PATIENCE_S
        submit(scheduler, str(number), new=1, adapter=adapter)
        assert [i.request.submit.id for i in run_step(scheduler)[0].items] == [str(number)]
    # what counts is how long there has been no room
    residency.loading.clear()
    submit(scheduler, "one more", new=1, adapter="a")
    assert [i.request.submit.id for i in run_step(scheduler)[0].items] == ["one more"]
    now[0] += 2 * ADAPTER_PATIENCE_S
    submit(scheduler, "too late", new=1, adapter="a")
    assert not run_step(scheduler)[0].items


def test_a_hit_is_a_request_that_found_its_adapter_and_counts_once():
    scheduler, residency, _ = make(pages=1 + 5, there=["a"])
    submit(scheduler, "base", prompt=8, new=2)
    submit(scheduler, "found", prompt=8, new=2, adapter="a")
    for _ in range(2):
        # the second finds its adapter and has to wait for pages
        run_step(scheduler)
        assert scheduler.drain_hits() == 0
    run_step(scheduler)
    assert scheduler.drain_hits() == 1
    submit(scheduler, "missed", new=1, adapter="b")
    run_step(scheduler)
    residency.there.add("b")
    run_step(scheduler)
    assert [scheduler.drain_hits(), len(residency.held)] == [0, 0]


def test_a_request_that_has_waited_long_for_room_is_not_overtaken_any_more():
    clock = iter([1.0, 1.0 + ADAPTER_PATIENCE_S, 1.1 + ADAPTER_PATIENCE_S, 9.0])
    scheduler, residency, _ = make(there=["a"], clock=lambda: next(clock))
    submit(scheduler, "large", adapter="late")
    submit(scheduler, "small", new=1, adapter="a")
    assert [i.request.submit.id for i in run_step(scheduler)[0].items] == ["small"]
    submit(scheduler, "next", new=1, adapter="a")
    assert [i.request.submit.id for i in run_step(scheduler)[0].items] == ["next"]
    submit(scheduler, "last", new=1, adapter="a")
    assert not run_step(scheduler)[0].items
    residency.there.add("late")
    assert [i.request.submit.id for i in run_step(scheduler)[0].items] == ["last", "large"]


def test_a_request_that_is_not_admitted_holds_no_adapter():
    scheduler, residency, _ = make(requests=1)
    submit(scheduler, "first", new=5, adapter="a")
    submit(scheduler, "second", adapter="b")
    run_step(scheduler)
    assert residency.held == ["a"]


def test_every_running_request_must_fit_a_step_and_leave_room():
    with pytest.raises(ValueError, match=r"batch_requests_max: expected fewer requests than the 8 .* got 8"):
        make(tokens=8, requests=8)


def test_a_request_that_waits_for_pages_is_not_overtaken():
    scheduler, _, _ = make(pages=1 + 5)
    submit(scheduler, "first", prompt=8, new=8)
    run_step(scheduler)
    submit(scheduler, "large", prompt=8, new=4)
    submit(scheduler, "small", prompt=1, new=1)
    assert [i.request.submit.id for i in run_step(scheduler)[0].items] == ["first"]
    assert [r.submit.id for r in scheduler.waiting] == ["large", "small"]


def test_a_request_that_can_never_fit_is_told_so_at_once():
    scheduler, _, _ = make(pages=1 + 2)
    submit(scheduler, "r", prompt=8, new=1)
    (event,) = scheduler.drain_events()
    assert isinstance(event, Failed)
    assert event.failure is Failure.REQUEST_TOO_LARGE
    assert "holds 8 tokens, got 9" in event.message


def test_an_adapter_that_can_never_come_ends_its_request_only():
    scheduler, residency, _ = make()
    residency.impossible.add("huge")
    submit(scheduler, "bad", adapter="huge")
    submit(scheduler, "good", adapter="a")
    _, events = run_step(scheduler)
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(e.id, e.failure) for e in failed] == [("bad", Failure.ADAPTER_TOO_LARGE)]
    assert [r.submit.id for r in scheduler.running] == ["good"]


def test_logits_that_are_not_finite_end_one_request():
    scheduler, residency, pool = make()
    submit(scheduler, "nan", adapter="a")
    submit(scheduler, "fine", adapter="b")
    batch = scheduler.plan()
    events = scheduler.commit(batch, [None, 50])
    assert [type(e).__name__ for e in events if not isinstance(e, Scheduled)] == ["Failed", "Tokens"]
    assert residency.held == ["b"]
    assert [r.submit.id for r in scheduler.running] == ["fine"]
    assert pool.used == pool.count(5)


@pytest.mark.parametrize("when", ["waiting", "running", "finished", "unknown"])
def test_abort_frees_everything_at_any_moment_and_twice(when):
    scheduler, residency, pool = make()
    if when != "unknown":
        submit(scheduler, "r", new=1 if when == "finished" else 5, adapter="a")
    if when in ("running", "finished"):
        run_step(scheduler)
    scheduler.abort(RequestId("r"))
    scheduler.abort(RequestId("r"))
    assert (residency.held, pool.used, len(scheduler.running), len(scheduler.waiting)) == ([], 0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("sxp"), st.integers(0, 9), st.integers(1, 20), st.integers(1, 6))))
def test_pages_and_leases_are_conserved_over_any_history(history):
    scheduler, residency, pool = make(pages=24, tokens=8, requests=4)
    for action, number, prompt, new in history:
        id = str(number)
        if action == "s" and not any(r.submit.id == id for r in (*scheduler.waiting, *scheduler.running)):
            submit(scheduler, id, prompt, new, adapter=(None, "a", "b")[number % 3])
        elif action == "x":
            scheduler.abort(RequestId(id))
        else:
            batch, _ = run_step(scheduler)
            assert batch.tokens <= 8
        pool.check()
        assert pool.used == sum(len(r.pages) for r in scheduler.running)
    for _ in range(400):
        run_step(scheduler)
    assert (residency.held, pool.used) == ([], 0)
    assert not scheduler.waiting


def soft(rows):
    return (Record(Kind.SOFT, 0, (), (Piece(16, rows, 8, 0),)),)


def side(reduction):
    return (Record(Kind.SIDE, 0, (reduction, 0), ()),)


def gated():
    gate = Piece(16, 1, 8, 1)
    return (Record(Kind.PREFIX, 0, (2, 0, 0), (gate, gate, gate, None)),)


def test_extra_rows_of_an_adapter_are_computed_before_the_prompt():
    scheduler, residency, pool = make()
    residency.records["a"] = soft(5)
    submit(scheduler, "1", prompt=3, new=2, adapter="a")
    batch = scheduler.plan()
    request = batch.items[0].request
    assert [(item.start, item.count) for item in batch.items] == [(0, 8)]
    assert [request.token(i) for i in range(8)] == [0] * 5 + [0, 1, 2]
    assert pool.used == pool.count(5 + 3 + 2)


def test_extra_rows_wait_for_pages_without_holding_the_adapter():
    scheduler, residency, _ = make(pages=5)
    residency.records["a"] = soft(8)
    submit(scheduler, "first", prompt=6, new=2)
    scheduler.plan()
    submit(scheduler, "second", prompt=3, new=1, adapter="a")
    scheduler.plan()
    assert [request.submit.id for request in scheduler.running] == ["first"]
    assert not residency.held


def test_extra_rows_that_can_never_fit_end_the_request():
    scheduler, residency, _ = make(pages=3)
    residency.records["a"] = soft(80)
    submit(scheduler, "1", adapter="a")
    scheduler.plan()
    (event,) = scheduler.drain_events()
    assert isinstance(event, Failed)
    assert event.failure is Failure.REQUEST_TOO_LARGE
    assert not residency.held


@pytest.mark.parametrize("end", ["finished", "aborted", "failed"])
def test_the_slots_of_a_side_network_are_held_from_admission_to_the_end(end):
    scheduler, residency, pool = make(tokens=16)
    residency.records["a"] = side(4)
    submit(scheduler, "plain", prompt=7, new=5)
    submit(scheduler, "beside", prompt=7, new=5, adapter="a")
    batch = scheduler.plan()
    (request,) = [r for r in scheduler.running if r.submit.id == "beside"]
    # twelve tokens, and a quarter of what twelve take
    assert (request.length_max, request.slots_max) == (12, 15)
    assert (pool.used, len(request.pages)) == (pool.count(12) + pool.count(15), pool.count(15))
    assert request.slots.numel() >= 15
    assert len(set(request.slots.tolist())) == request.slots.numel()
    if end == "aborted":
        scheduler.abort(RequestId("beside"))
        assert pool.used == pool.count(12)
    elif end == "failed":
        scheduler.fail(batch, Failure.BUG, "")
        assert pool.used == 0
    for _ in range(9):
        run_step(scheduler)
    assert (residency.held, pool.used) == ([], 0)
    pool.check()


def test_a_side_network_waits_for_its_slots_and_is_told_when_there_can_be_none():
    scheduler, residency, pool = make(pages=1 + 6)
    residency.records |= {"a": side(2), "b": side(2)}
    submit(scheduler, "first", prompt=6, new=2)
    submit(scheduler, "second", prompt=6, new=6, adapter="a")
    scheduler.plan()
    # three pages for its text are free, but not two more for what stands beside it
    assert [request.submit.id for request in scheduler.running] == ["first"]
    assert not residency.held
    submit(scheduler, "never", prompt=12, new=6, adapter="b")
    scheduler.abort(RequestId("first"))
    scheduler.abort(RequestId("second"))
    scheduler.plan()
    (event,) = [event for event in scheduler.drain_events() if isinstance(event, Failed)]
    assert event.failure is Failure.REQUEST_TOO_LARGE
    assert "holds 24 tokens, got 18 and 9 more for the adapter's side network" in event.message
    assert (residency.held, pool.used) == ([], 0)


def test_a_gated_prompt_is_never_cut():
    scheduler, residency, _ = make(tokens=16, requests=8)
    residency.records["a"] = gated()
    submit(scheduler, "long", prompt=14)
    submit(scheduler, "gated", prompt=7, adapter="a")
    assert [(item.request.submit.id, item.count) for item in scheduler.plan().items] == [("long", 14)]
    submit(scheduler, "too long for one step", prompt=9, adapter="a")
    scheduler.plan()
    failed = [event for event in scheduler.drain_events() if isinstance(event, Failed)]
    assert [event.id for event in failed] == ["too long for one step"]
    assert "one step" in failed[0].message


@pytest.mark.parametrize(
    ("prompt", "expected"), [((1, 2, 3, 1, 2, 9), 3), ((1, 2), 0), ((2, 1), 99), ((), 99)], ids=str
)
def test_a_masked_adapter_acts_from_the_last_occurrence_on(prompt, expected):
    assert acts_from(Traits(token_mask=(1, 2)), prompt, 99) == expected
    assert acts_from(Traits(), prompt, 99) == 0
