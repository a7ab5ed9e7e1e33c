"""The relay by itself: whatever happens in whatever order, every request ends once and every count returns to zero."""

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.doors import fake_engine
from weft.server import errors
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import (
    Abort,
    Command,
    Digest,
    Failed,
    Failure,
    FinishReason,
    Forget,
    Prepare,
    Scheduled,
    Submit,
    Tokens,
)
from weft.server.metrics import Metrics
from weft.server.relay import QueueLimits, Relay
from weft.server.threads import Threads
from weft.server.ticket import Ticket

LIMITS = QueueLimits(requests_max=3, tokens_max=40)
INFO = fake_engine.info(EngineConfig(model="/nowhere", store="s"))


class Link:
    """Remembers what was sent."""

    def __init__(self) -> None:
        self.sent: list[Command] = []

    def send(self, command) -> None:
        self.sent.append(command)


def fresh() -> tuple[Relay, Link]:
    link = Link()
    relay = Relay(link, LIMITS, Metrics([]))
    relay.engine_ready(INFO)
    return relay, link


def submit(relay: Relay, tokens: int = 5, adapter: str | None = None) -> Submit:
    return Submit(relay.next_id(), (1,) * tokens, tokens, adapter=Digest(adapter) if adapter else None)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "scheduled", "tokens", "finish", "failed", "leave", "lost", "stranger"]),
        st.integers(0, 6),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_counts_are_right_after_any_sequence_of_events(steps):
    async def run() -> None:
        relay, link = fresh()
        tickets: list[Ticket] = []
        for what, number in steps:
            ticket = tickets[number % len(tickets)] if tickets else None
            match what:
                case "submit":
                    try:
                        tickets.append(relay.submit(submit(relay, number + 1, f"d{number}" if number % 2 else None)))
                    except errors.Overloaded:
                        waiting = sum(each.waiting for each in tickets)
                        assert waiting == LIMITS.requests_max or waiting
                case "lost":
                    relay.engine_lost()
                    relay.engine_ready(INFO)
                case "stranger":
                    relay.deliver([Tokens(relay.next_id(), (1,)), Scheduled(relay.next_id(), 0, 0)])
                case "leave" if ticket is not None:
                    ticket.leave("cancelled")
                    tickets.remove(ticket)
                case "scheduled" if ticket is not None:
                    relay.deliver([Scheduled(ticket.submit.id, 0.0, 0.0)])
                case "tokens" if ticket is not None:
                    relay.deliver([Tokens(ticket.submit.id, (1, 2))])
                case "finish" if ticket is not None:
                    relay.deliver([Tokens(ticket.submit.id, (3,), FinishReason.LENGTH)])
                case "failed" if ticket is not None:
                    relay.deliver([Failed(ticket.submit.id, Failure.BUG, "x")])
            relay.check()
            assert relay._waiting_requests <= LIMITS.requests_max
        for ticket in tickets:
            ticket.leave("cancelled")
            ticket.leave("cancelled")
        relay.check()
        assert not relay.busy
        # a request is aborted at most once, and never after it ended in the engine
        aborted = [each.id for each in link.sent if isinstance(each, Abort)]
        assert len(aborted) == len(set(aborted))

    asyncio.run(run())


def test_a_request_that_ended_in_the_engine_is_not_aborted_there():
    async def run() -> None:
        relay, link = fresh()
        for end in ("finish", "failed", "lost"):
            ticket = relay.submit(submit(relay))
            if end == "finish":
                relay.deliver([Tokens(ticket.submit.id, (1,), FinishReason.STOP)])
            elif end == "failed":
                relay.deliver([Failed(ticket.submit.id, Failure.BUG, "x")])
            else:
                relay.engine_lost()
                relay.engine_ready(INFO)
            ticket.leave("error")
        assert not [each for each in link.sent if isinstance(each, Abort)]

    asyncio.run(run())


def test_a_mailbox_merges_and_tells_the_error_last():
    async def run() -> None:
        relay, _ = fresh()
        with relay.submit(submit(relay)) as ticket:
            relay.deliver([Tokens(ticket.submit.id, (1, 2)), Tokens(ticket.submit.id, (3,))])
            relay.deliver([Failed(ticket.submit.id, Failure.NON_FINITE_LOGITS, "NaN")])
            assert (await ticket.take()).tokens == (1, 2, 3)
            for _ in range(2):
                with pytest.raises(errors.NonFiniteLogits):
                    await ticket.take()

    asyncio.run(run())


def test_a_request_larger_than_the_queue_may_wait_alone():
    async def run() -> None:
        relay, _ = fresh()
        large = relay.submit(submit(relay, 100))
        with pytest.raises(errors.Overloaded):
            relay.submit(submit(relay, 1))
        large.leave("cancelled")
        small = relay.submit(submit(relay, 1))
        with pytest.raises(errors.Overloaded, match="queue_tokens_max leaves 38"):
            relay.submit(submit(relay, 100))
        small.leave("cancelled")

    asyncio.run(run())


def test_who_prepares_the_same_version_shares_the_answer_and_cancelling_one_leaves_the_others():
    async def run() -> None:
        relay, link = fresh()
        digest = Digest("d")
        waiting = [asyncio.create_task(relay.prepare(digest)) for _ in range(3)]
        await asyncio.sleep(0)
        assert link.sent == [Prepare(digest)]
        waiting[0].cancel()
        report = fake_engine.report()
        relay.deliver([fake_engine.Prepared(digest, report)])
        assert [await each for each in waiting[1:]] == [report, report]
        assert not relay.busy

    asyncio.run(run())


def test_what_was_forgotten_is_prepared_anew():
    async def run() -> None:
        relay, link = fresh()
        digest = Digest("d")
        first = asyncio.create_task(relay.prepare(digest))
        await asyncio.sleep(0)
        first.cancel()
        relay.forget(digest)
        second = asyncio.create_task(relay.prepare(digest))
        await asyncio.sleep(0)
        assert link.sent == [Prepare(digest), Forget(digest), Prepare(digest)]
        relay.engine_lost()
        with pytest.raises(errors.EngineRestarting):
            await second

    asyncio.run(run())


def test_unused_waits_for_the_last_request_of_a_version():
    async def run() -> None:
        relay, _ = fresh()
        tickets = [relay.submit(submit(relay, 1, "d")) for _ in range(2)]
        other = relay.submit(submit(relay, 1, "e"))
        waiting = asyncio.create_task(relay.unused(Digest("d")))
        for ticket in tickets:
            await asyncio.sleep(0.01)
            assert not waiting.done()
            ticket.leave("stop")
        await asyncio.wait_for(waiting, 1)
        other.leave("stop")
        await asyncio.wait_for(relay.idle(), 1)

    asyncio.run(run())


def test_a_cancelled_caller_waits_for_its_thread():
    async def run() -> None:
        threads = Threads("test", 1)
        release, done = threading.Event(), []

        def work() -> None:
            release.wait(10)
            done.append(True)

        task = asyncio.create_task(threads.run(work))
        await asyncio.sleep(0.05)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.02)
            assert not task.done()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done
        threads.close()

    asyncio.run(run())


def test_a_call_that_nobody_wants_any_more_does_not_begin():
    async def run() -> None:
        threads, release, done = Threads("test", 1), threading.Event(), list[str]()
        first = asyncio.create_task(threads.run_while_wanted(release.wait, 10))
        second = asyncio.create_task(threads.run_while_wanted(done.append, "second"))
        await asyncio.sleep(0.02)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(second, 1)
        # what runs is waited for
        first.cancel()
        await asyncio.sleep(0.02)
        assert not first.done()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        threads.close()
        assert done == []

    asyncio.run(run())


def test_a_place_in_the_queue_is_kept_until_the_request_takes_it():
    async def run() -> None:
        relay, _ = fresh()
        with relay.place(30):
            relay.check()
            with pytest.raises(errors.Overloaded, match="queue_tokens_max leaves 10"):
                relay.submit(submit(relay, 6))
            with relay.place(1), relay.place(1), pytest.raises(errors.Overloaded, match="queue_requests_max is 3"):
                relay.submit(submit(relay))
            drained = asyncio.create_task(relay.idle())
            await asyncio.sleep(0)
        ticket = relay.submit(submit(relay, 15))
        await asyncio.sleep(0)
        assert not drained.done()
        with ticket:
            relay.check()
        await drained
        relay.check()

    asyncio.run(run())


def test_slow_work_in_a_thread_does_not_hold_up_the_loop():
    async def run() -> float:
        threads = Threads("test", 1)
        task = asyncio.create_task(threads.run(time.sleep, 0.3))
        began = time.monotonic()
        await asyncio.sleep(0.01)
        late = time.monotonic() - began
        await task
        threads.close()
        return late

    assert asyncio.run(run()) < 0.2
