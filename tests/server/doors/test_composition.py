"""Requests that name several adapters, over a socket: which version answers, what is refused, who counts as used."""

import asyncio
from typing import Any

import grpc
import pytest

from tests.server.doors import fake_engine
from tests.server.doors.harness import adapter_files, refused, until
from tests.server.doors.test_relay import fresh
from weft.adapters_store import errors as store
from weft.adapters_store.composition import derive, label_of
from weft.proto.v1.inference_pb2 import FINISH_REASON_LENGTH, WeightedAdapter
from weft.server.engine.messages import Digest, Failed, Failure, Submit
from weft.server.metrics import MEMORY_KINDS
from weft.server.relay import Relay
from weft.server.validation import ADAPTERS_MAX

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def served(server):
    """The digests of three adapters, by name."""
    return {name: server.register(name, adapter_files(seed)).digest for seed, name in enumerate("abc")}


def named(*said: Any) -> list[WeightedAdapter]:
    """A list as callers write it: names, or names with weights."""
    pairs = [(each, None) if isinstance(each, str) else each for each in said]
    return [WeightedAdapter(name=name, weight=weight) for name, weight in pairs]


def answering(server, *said: Any) -> str:
    """The digest of the version that answers a request for this list."""
    answer = server.generate(ids=[5], max_new_tokens=2, adapters=named(*said))
    assert answer.text == ("AB" if answer.started.adapter_digest else "ab")
    digest: str = answer.started.adapter_digest
    return digest


def test_a_list_is_answered_by_a_version_derived_from_it(server, served):
    a, b = served["a"], served["b"]
    digest = answering(server, "a", ("b", 0.5))
    assert digest == derive([(a, 1.0), (b, 0.5)])[0]
    assert digest not in served.values()
    assert answering(server, ("a", 1.0), ("b", 0.5)) == digest
    assert answering(server, ("b", 0.5), "a") != digest
    events = list(server.stream(ids=[5], max_new_tokens=2, adapters=named("a", ("b", 0.5))))
    assert events[0].started.adapter_digest == digest


def test_weights_of_0_and_one_of_1_leave_what_they_leave(server, served):
    assert answering(server, ("a", 1.0), ("b", 0.0)) == served["a"]
    assert answering(server, "b") == served["b"]
    assert answering(server, ("a", 0.0), ("b", -0.0)) == ""
    assert answering(server, ("b", 0.5)) == derive([(served["b"], 0.5)])[0]


def test_weights_are_32_bits_wide(server, served):
    assert answering(server, "a", ("b", 0.1)) == derive([(served["a"], 1.0), (served["b"], 0.10000000149011612)])[0]


WRONG: dict[str, tuple[dict[str, Any], grpc.StatusCode, str, str]] = {
    "both": ({"adapter": "a", "adapters": named("b")}, INVALID, "INVALID_REQUEST", "adapters"),
    "too_many": ({"adapters": named(*"a" * (ADAPTERS_MAX + 1))}, INVALID, "INVALID_REQUEST", "adapters"),
    "no_name": ({"adapters": named("a", "")}, INVALID, "INVALID_REQUEST", "adapters[1].name"),
    "nan": ({"adapters": named("a", ("b", float("nan")))}, INVALID, "INVALID_REQUEST", "adapters[1].weight"),
    "infinite": ({"adapters": named(("a", float("-inf")))}, INVALID, "INVALID_REQUEST", "adapters[0].weight"),
    "path": ({"adapters": named("a", "../b")}, INVALID, "ADAPTER_INVALID", "adapters[1].name"),
    "unknown": ({"adapters": named("a", "ghost")}, NOT_FOUND, "ADAPTER_NOT_FOUND", ""),
    "unknown_of_weight_0": ({"adapters": named("a", ("ghost", 0.0))}, NOT_FOUND, "ADAPTER_NOT_FOUND", ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_list_is_said_by_field(server, served, case):
    fields, code, reason, field = WRONG[case]
    told = refused(lambda: server.generate(ids=[5], max_new_tokens=2, **fields))
    assert told[:2] == (code, reason)
    assert not field or told[2] == (field,)
    if reason == "INVALID_REQUEST":
        told = refused(lambda: list(server.stream(ids=[5], max_new_tokens=2, **fields)))
        assert told == (code, reason, (f"request.{field}",))


def test_as_many_as_allowed_may_be_named(server, served):
    assert len(answering(server, *"a" * ADAPTERS_MAX)) == 64


def test_a_member_that_is_deleted_finishes_what_runs_and_takes_nothing_new(server, served):
    digests = {name: server.register(name, adapter_files(30 + seed)).digest for seed, name in enumerate(("in", "out"))}
    stream = server.stream(ids=[5], adapters=named("in", ("out", 0.5)), max_new_tokens=300)
    next(stream)
    for name in digests:
        server.delete(name)
    assert refused(lambda: answering(server, "a", "in"))[1] == "ADAPTER_NOT_FOUND"
    assert not {f"Forget {digest}" for digest in digests.values()} & set(server.commands("Forget"))
    assert list(stream)[-1].finished.reason == FINISH_REASON_LENGTH
    until(lambda: {f"Forget {digest}" for digest in digests.values()} <= set(server.commands("Forget")))


def test_what_the_engine_refuses_is_the_requests_fault_here(server, served):
    """A registered version that turns out bad is a precondition; a list of them is an argument."""
    prompt = [fake_engine.FAIL + fake_engine.FAILURES.index(Failure.ADAPTER_INVALID)]
    told = refused(lambda: server.generate(ids=prompt, max_new_tokens=9, adapter="a"))
    assert told[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_INCOMPATIBLE")
    told = refused(lambda: server.generate(ids=prompt, max_new_tokens=9, adapters=named("a", "b")))
    assert told == (INVALID, "ADAPTER_INVALID", ("adapters",))


def composed(relay: Relay, *members: str) -> Submit:
    kept = tuple((Digest(member), 0.5) for member in members)
    return Submit(relay.next_id(), (1,), 1, adapter=Digest("derived"), members=kept)


def test_every_member_counts_as_used():
    async def run() -> None:
        relay, _ = fresh()
        a, b = "a" * 64, "b" * 64
        tickets = [relay.submit(composed(relay, a, b, a)), relay.submit(composed(relay, b))]
        relay.check()
        waiting = [asyncio.create_task(relay.unused(Digest(digest))) for digest in (a, b)]
        await asyncio.wait_for(relay.unused(Digest("derived")), 1)
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        tickets[0].leave("stop")
        await asyncio.wait_for(waiting[0], 1)
        await asyncio.sleep(0.01)
        assert not waiting[1].done()
        tickets[1].leave("stop")
        await asyncio.wait_for(waiting[1], 1)
        relay.check()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Failure.ADAPTER_INVALID, store.AdapterInvalid),
        (Failure.ADAPTER_INCOMPATIBLE, store.AdapterIncompatible),
        (Failure.ADAPTER_CORRUPT, store.AdapterCorrupt),
        (Failure.ADAPTER_TOO_LARGE, store.AdapterTooLarge),
    ],
)
def test_what_the_engine_says_of_members_is_told_by_their_names(failure, error):
    async def run() -> None:
        relay, _ = fresh()
        a, b = "a" * 64, "b" * 64
        names = {label_of(a): "legal", label_of(b): "formal"}
        with relay.submit(composed(relay, a, b), names) as ticket:
            said = f"{label_of(b)}: expected one, got another beside that of {label_of(a)}"
            relay.deliver([Failed(ticket.submit.id, failure, said)])
            with pytest.raises(error) as refusal:
                await ticket.take()
        assert str(refusal.value) == "formal: expected one, got another beside that of legal"
        assert refusal.value.field == "adapters"

    asyncio.run(run())


def test_bytes_of_derived_versions_have_a_kind_of_their_own(server, served):
    page = server.scrape()
    assert all(f'weft_memory_bytes{{kind="{kind}",tier="device"}}' in page for kind in MEMORY_KINDS)
    assert page['weft_memory_bytes{kind="composed",tier="device"}'] == 0 == server.info().memory.composed_bytes
    assert page['weft_memory_bytes{kind="working_set",tier="device"}'] == 64
