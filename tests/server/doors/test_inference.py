"""Generate and StreamGenerate over a socket: what comes back, in which order, and what is refused with which words."""

import threading
import time
from functools import partial
from typing import Any

import grpc
import pytest

from tests.server.doors import fake_engine
from tests.server.doors.harness import (
    adapter_files,
    make_request,
    refusal,
    refused,
    running,
    until,
)
from weft.proto.v1 import inference_pb2
from weft.server.engine.messages import Failure

STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH
INVALID = grpc.StatusCode.INVALID_ARGUMENT
CHAT = inference_pb2.ChatMessages


def chat(*turns):
    return CHAT(messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in turns])


def test_a_completion_says_what_it_ran_with(server):
    answer = server.generate(text="hello", max_new_tokens=3, sampling={"seed": 2**64 - 1}, request_id="mine")
    assert (answer.text, list(answer.token_ids), answer.reason) == ("abc", [97, 98, 99], LENGTH)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 3)
    assert (answer.started.request_id, answer.started.prompt_tokens) == ("mine", 5)
    effective = answer.started.effective
    assert (effective.temperature, effective.top_k, effective.top_p) == (0.5, 7, 0.75)
    assert (effective.seed, effective.max_new_tokens) == (2**64 - 1, 3)


def test_what_the_caller_sets_beats_the_backbone_s_defaults(server):
    answer = server.generate(ids=[5], max_new_tokens=1, sampling={"temperature": 0, "top_k": 0, "top_p": 1})
    effective = answer.started.effective
    assert (effective.temperature, effective.top_k, effective.top_p) == (0, 0, 1)


def test_without_a_seed_every_request_gets_its_own(server):
    seeds = {server.generate(ids=[5], max_new_tokens=1).started.effective.seed for _ in range(4)}
    assert len(seeds) == 4


def test_without_a_number_of_tokens_the_default_or_the_room_left_is_taken(server):
    assert server.generate(ids=[5]).started.effective.max_new_tokens == 256
    long = [5] * (fake_engine.CONTEXT - 3)
    assert server.generate(ids=long).started.effective.max_new_tokens == 3


def test_a_stream_is_started_then_deltas_then_finished(server):
    events = list(server.stream(text="hello", max_new_tokens=40, request_id="mine"))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
    assert events[0].started.request_id == "mine"
    deltas = [event.delta for event in events[1:-1]]
    assert "".join(delta.text for delta in deltas) == "abcdefghijklmnopqrstuvwxyz"[:26] + "abcdefghijklmn"
    assert [each for delta in deltas for each in delta.token_ids] == [97 + i % 26 for i in range(40)]
    assert (events[-1].finished.reason, events[-1].finished.usage.completion_tokens) == (LENGTH, 40)


def test_deltas_come_one_by_one_when_the_reader_keeps_up(server):
    deltas = [event for event in server.stream(ids=[5], max_new_tokens=40) if event.HasField("delta")]
    assert len(deltas) >= 20


def test_a_stop_string_ends_the_text_before_it_and_the_request_in_the_engine(server):
    abort = server.aborts_next()
    answer = server.generate(ids=[5], max_new_tokens=200, stop=["fgh", "zz"])
    assert (answer.text, answer.reason) == ("abcde", STOP)
    assert answer.usage.completion_tokens == len(answer.token_ids) == 8
    until(lambda: abort() in server.commands("Abort"))


def test_a_possible_stop_string_is_held_back_and_then_shown(server):
    prompt = [fake_engine.BYTES, *b"abXab"]
    answer = server.generate(ids=prompt, max_new_tokens=7, stop=["abXabXab"])
    assert (answer.text, answer.reason) == ("abXabab", LENGTH)


def test_characters_of_several_tokens_arrive_whole(server):
    raw = "é🙂".encode()
    events = server.stream(ids=[fake_engine.BYTES, *raw], max_new_tokens=len(raw))
    texts = [event.delta.text for event in events if event.HasField("delta")]
    assert "".join(texts) == "é🙂"
    assert not any("�" in text for text in texts)


def test_the_end_of_sequence_token_ends_and_has_no_text(server):
    prompt = [fake_engine.BYTES, *b"ab", fake_engine.EOS]
    answer = server.generate(ids=prompt, max_new_tokens=50)
    assert (answer.text, answer.reason, answer.usage.completion_tokens) == ("ab", STOP, 3)
    answer = server.generate(ids=prompt, max_new_tokens=6, ignore_eos=True)
    assert (answer.text, answer.reason, answer.usage.completion_tokens) == ("abab", LENGTH, 6)


def test_chat_is_rendered_and_encoded(server):
    answer = server.generate(chat=chat(("system", "s"), ("user", "hi")), max_new_tokens=1)
    assert answer.started.prompt_tokens == len("<system>s<user>hi<assistant>")


def test_a_text_is_measured_in_tokens(server):
    assert server.generate(text="é" * 150, max_new_tokens=1).usage.prompt_tokens == 300
    assert refused(lambda: server.generate(text="x" * 600)) == (INVALID, "PROMPT_TOO_LONG", ("prompt",))


def test_a_text_that_cannot_fit_is_refused_without_encoding_it(server):
    long = "x" * 3_000_000
    began = time.monotonic()
    assert refused(lambda: server.generate(text=long)) == (INVALID, "PROMPT_TOO_LONG", ("text",))
    told = refused(lambda: server.generate(chat=chat(("user", long))))
    assert told == (INVALID, "PROMPT_TOO_LONG", ("chat.messages",))
    assert time.monotonic() - began < 1


NAN, INF = float("nan"), float("inf")
BAD = [
    ({}, "INVALID_REQUEST", "prompt"),
    ({"text": ""}, "INVALID_REQUEST", "text"),
    ({"tokens": inference_pb2.TokenIds()}, "INVALID_REQUEST", "prompt"),
    ({"chat": CHAT()}, "INVALID_REQUEST", "chat.messages"),
    ({"chat": chat(("user", "a"), ("", "b"))}, "INVALID_REQUEST", "chat.messages[1].role"),
    ({"chat": chat(("bad", "a"))}, "INVALID_REQUEST", "chat.messages"),
    ({"ids": [1, fake_engine.VOCABULARY]}, "INVALID_REQUEST", "tokens.ids[1]"),
    ({"ids": [1, 2, 2**32 - 1]}, "INVALID_REQUEST", "tokens.ids[2]"),
    ({"ids": [1] * fake_engine.CONTEXT}, "PROMPT_TOO_LONG", "prompt"),
    ({"ids": [1] * 100_000}, "PROMPT_TOO_LONG", "prompt"),
    ({"ids": [1], "max_new_tokens": 0}, "INVALID_REQUEST", "max_new_tokens"),
    ({"ids": [1], "max_new_tokens": fake_engine.CONTEXT}, "PROMPT_TOO_LONG", "max_new_tokens"),
    ({"ids": [1], "max_new_tokens": 2**32 - 1}, "PROMPT_TOO_LONG", "max_new_tokens"),
    *(
        ({"ids": [1], "sampling": {"temperature": bad}}, "INVALID_REQUEST", "sampling.temperature")
        for bad in (NAN, INF, -INF, -0.1, 1e-45, 100.1)
    ),
    *(
        ({"ids": [1], "sampling": {"top_p": bad}}, "INVALID_REQUEST", "sampling.top_p")
        for bad in (NAN, INF, -INF, -0.1, 0, 1.1)
    ),
    ({"ids": [1], "sampling": {"top_k": 2**31}}, "INVALID_REQUEST", "sampling.top_k"),
    ({"ids": [1], "stop": ["x"] * 17}, "INVALID_REQUEST", "stop"),
    ({"ids": [1], "stop": ["x", ""]}, "INVALID_REQUEST", "stop[1]"),
    ({"ids": [1], "stop": ["é" * 129]}, "INVALID_REQUEST", "stop[0]"),
    ({"ids": [1], "request_id": "x" * 129}, "INVALID_REQUEST", "request_id"),
    ({"ids": [1], "request_id": "a\nb"}, "INVALID_REQUEST", "request_id"),
]


@pytest.mark.parametrize(("fields", "reason", "field"), BAD, ids=[f"{each[2]}-{i}" for i, each in enumerate(BAD)])
def test_bad_requests_are_refused_by_field_and_never_reach_the_engine(server, fields, reason, field):
    before = len(server.commands("Submit"))
    assert refused(lambda: server.generate(**fields)) == (INVALID, reason, (field,))
    stream = refused(lambda: list(server.stream(**fields)))
    assert stream == (INVALID, reason, (f"request.{field}",))
    assert len(server.commands("Submit")) == before


@pytest.mark.parametrize(
    "fields",
    [
        {"ids": [1], "sampling": {"temperature": -0.0, "top_k": 2**31 - 1, "top_p": 1e-45}},
        {"ids": [1], "sampling": {"temperature": 100, "seed": 0}},
        {"ids": [0, fake_engine.VOCABULARY - 1]},
        {"ids": [1], "max_new_tokens": fake_engine.CONTEXT - 1},
        {"ids": [1], "stop": ["é" * 128] + ["x" * 256] * 15, "request_id": "ü" * 128},
        {"text": "\0\ufeff\u202e"},
    ],
)
def test_the_edges_of_what_is_allowed_are_allowed(server, fields):
    assert server.generate(**{"max_new_tokens": 2, **fields}).usage.completion_tokens >= 1


def test_a_stream_without_request_has_no_prompt(server):
    call = server.channel.unary_stream("/weft.v1.InferenceService/StreamGenerate")
    assert refused(lambda: list(call(b"", timeout=5))) == (INVALID, "INVALID_REQUEST", ("request.prompt",))


def streamed(server, **fields):
    return list(server.stream(**fields))


def test_an_unknown_adapter_is_not_found_and_a_bad_name_is_invalid(server):
    assert refused(lambda: server.generate(ids=[1], adapter="ghost"))[:2] == (
        grpc.StatusCode.NOT_FOUND,
        "ADAPTER_NOT_FOUND",
    )
    for name in ("..", "a/b", "a\0b", "a,b", "x" * 129, " ", "é"):
        told = refused(partial(server.generate, ids=[1], adapter=name))
        assert told == (INVALID, "ADAPTER_INVALID", ("adapter",))
        told = refused(partial(streamed, server, ids=[1], adapter=name))
        assert told == (INVALID, "ADAPTER_INVALID", ("request.adapter",))


FAILURES = {
    Failure.ADAPTER_INVALID: (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_INCOMPATIBLE"),
    Failure.ADAPTER_TOO_LARGE: (grpc.StatusCode.RESOURCE_EXHAUSTED, "ADAPTER_MEMORY"),
    Failure.ADAPTER_CORRUPT: (grpc.StatusCode.DATA_LOSS, "ADAPTER_CORRUPT"),
    Failure.REQUEST_TOO_LARGE: (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE"),
    Failure.NON_FINITE_LOGITS: (INVALID, "NON_FINITE_LOGITS"),
    Failure.ADAPTER_INCOMPATIBLE: (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_INCOMPATIBLE"),
    Failure.STORE_FULL: (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
    Failure.STORE_IO_ERROR: (grpc.StatusCode.INTERNAL, "STORE_IO_ERROR"),
    Failure.OUT_OF_MEMORY: (grpc.StatusCode.UNAVAILABLE, "ENGINE_MEMORY"),
    Failure.BUG: (grpc.StatusCode.INTERNAL, "BUG"),
}


@pytest.mark.parametrize("failure", Failure)
def test_a_failure_in_the_engine_has_its_status_after_the_tokens_before_it(server, failure):
    prompt = [fake_engine.FAIL + fake_engine.FAILURES.index(failure)]
    received, abort = [], server.aborts_next()

    def read():
        for event in server.stream(ids=prompt, max_new_tokens=9):
            received.append(event.WhichOneof("event"))

    with pytest.raises(grpc.RpcError) as failed:
        read()
    told = refusal(failed.value)
    assert (told.code, told.reason) == FAILURES[failure]
    assert ("what the engine says" in told.text) == (told.code is not grpc.StatusCode.INTERNAL)
    assert received[0] == "started"
    assert set(received[1:]) == {"delta"}
    # it ended there: nothing to abort
    assert abort() not in server.commands("Abort")


def test_a_cancelled_stream_is_aborted_in_the_engine(server):
    abort = server.aborts_next()
    stream = server.stream(ids=[5], max_new_tokens=500)
    next(stream)
    aborted, began = abort(), time.monotonic()
    stream.cancel()
    until(lambda: aborted in server.commands("Abort"))
    assert time.monotonic() - began < 0.5


def test_a_cancelled_unary_call_is_aborted_too(server):
    method = server.channel.unary_unary("/weft.v1.InferenceService/Generate")
    abort = server.aborts_next()
    call = method.future(make_request(ids=[fake_engine.HANG], max_new_tokens=5).SerializeToString())
    aborted = abort()
    call.cancel()
    until(lambda: aborted in server.commands("Abort"))
    until(lambda: server.scrape()["weft_requests_running"] == 0)


def test_a_caller_that_vanishes_is_aborted(server):
    abort = server.aborts_next()
    with server.connect(**{"grpc.use_local_subchannel_pool": 1}) as channel:
        stream = server.stream(ids=[fake_engine.HANG], max_new_tokens=5, channel=channel)
        assert next(stream).HasField("started")
        aborted = abort()
    until(lambda: aborted in server.commands("Abort"))


def test_the_queue_is_bounded_in_requests(server):
    waiting = [server.stream(ids=[fake_engine.WAIT], max_new_tokens=1) for _ in range(4)]
    until(lambda: server.scrape()["weft_requests_waiting"] == 4)
    with pytest.raises(grpc.RpcError) as failed:
        server.generate(ids=[5], max_new_tokens=1)
    told = refusal(failed.value)
    assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
    assert told.retry_after_s == 1.0
    assert told.pushback_ms == "1000"
    waiting[0].cancel()
    until(lambda: server.scrape()["weft_requests_waiting"] == 3)
    assert server.generate(ids=[5], max_new_tokens=1).text == "a"
    for each in waiting:
        each.cancel()
    until(lambda: server.scrape()["weft_tokens_waiting"] == 0)


def test_the_queue_is_bounded_in_tokens(server):
    waiting = server.stream(ids=[fake_engine.WAIT], max_new_tokens=400)
    until(lambda: server.scrape()["weft_tokens_waiting"] == 401)
    assert refused(lambda: server.generate(ids=[5], max_new_tokens=300))[1] == "OVERLOADED"
    assert server.generate(ids=[5], max_new_tokens=100).usage.completion_tokens == 100
    waiting.cancel()
    until(lambda: server.scrape()["weft_tokens_waiting"] == 0)


def test_requests_that_run_take_no_room_in_the_queue(server):
    busy: list[Any] = []
    while len(busy) < 8:
        busy.append(server.stream(ids=[fake_engine.HANG], max_new_tokens=100))
        until(lambda: server.scrape()["weft_requests_running"] == len(busy))
    assert server.generate(ids=[5], max_new_tokens=1).text == "a"
    for each in busy:
        each.cancel()
    until(lambda: server.scrape()["weft_requests_running"] == 0)


def test_an_adapter_answers_under_its_digest_and_a_request_keeps_its_version(server):
    first = server.register("style", adapter_files(1))
    stream = server.stream(ids=[5], adapter="style", max_new_tokens=400)
    assert next(stream).started.adapter_digest == first.digest
    second = server.register("style", adapter_files(2), replace=True)
    assert second.digest != first.digest
    # the old version's files stay until its last request is done
    assert (server.frontend._catalog._root / "objects" / first.digest).exists()
    assert server.generate(ids=[5], adapter="style", max_new_tokens=2).started.adapter_digest == second.digest
    assert list(stream)[-1].finished.usage.completion_tokens == 400
    until(lambda: f"Forget {first.digest}" in server.commands("Forget"))
    until(lambda: not (server.frontend._catalog._root / "objects" / first.digest).exists())
    server.delete("style")


def test_many_streams_at_once_each_get_their_own(server):
    results = {}

    def run(i):
        prompt = [fake_engine.BYTES, *f"<{i}>".encode()]
        results[i] = "".join(e.delta.text for e in server.stream(ids=prompt, max_new_tokens=30))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: (f"<{i}>" * 30)[:30] for i in range(4)}


@pytest.fixture(scope="module")
def wordless(tmp_path_factory):
    with running(tmp_path_factory.mktemp("wordless"), tokenizer=False) as started:
        yield started


def test_without_tokenizer_ids_are_served(wordless):
    answer = wordless.generate(ids=[5], max_new_tokens=3)
    assert (answer.text, list(answer.token_ids)) == ("", [97, 98, 99])
    info = wordless.info()
    assert (info.backbone.has_tokenizer, info.backbone.has_chat_template) == (False, False)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": "hello"}, "text"),
        ({"chat": chat(("user", "a"))}, "chat"),
        ({"ids": [1], "stop": ["x"]}, "stop"),
    ],
)
def test_without_tokenizer_text_is_refused_with_the_reason(wordless, fields, field):
    assert refused(lambda: wordless.generate(**fields)) == (INVALID, "TOKENIZER_MISSING", (field,))
