"""Time that callers and the server allow: who waits, who is turned away, and that nobody waits for nothing."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import grpc
import pytest

from tests.server.doors import fake_engine
from tests.server.doors.harness import Running, make_backbone, make_request, refused, running, until
from weft.server.doors.edge import Call
from weft.server.doors.inference import InferenceService
from weft.server.errors import DeadlineExceeded
from weft.server.threads import Threads


def test_the_caller_s_deadline_ends_the_request(server):
    abort = server.aborts_next()
    code, _, _ = refused(lambda: server.generate(ids=[fake_engine.HANG], max_new_tokens=5, timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    aborted = abort()
    until(lambda: aborted in server.commands("Abort"))


def test_a_deadline_beyond_reason_is_no_trouble(server):
    assert server.generate(ids=[5], max_new_tokens=1, timeout=1e9).text == "a"


def test_the_server_s_longest_duration_ends_what_has_no_deadline(tmp_path):
    with running(tmp_path, request_duration_s_max=0.3) as server:
        for prompt in ([fake_engine.HANG], [fake_engine.WAIT]):
            told = refused(partial(server.generate, ids=prompt, max_new_tokens=5, timeout=None))
            assert told[:2] == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        until(lambda: len(server.commands("Abort")) == 2)
        told = refused(lambda: list(server.stream(ids=[fake_engine.HANG], max_new_tokens=5, timeout=None)))
        assert told[:2] == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


@contextmanager
def busy_encoders(server: Running) -> Iterator[None]:
    """Both threads that encode have something else to do."""
    gate = threading.Event()
    for _ in range(2):
        asyncio.run_coroutine_threadsafe(server.frontend._encoders.run(gate.wait), server.loop)
    try:
        yield
    finally:
        gate.set()


def test_a_long_prompt_waits_in_the_queue_until_it_is_encoded_but_not_beyond_its_time(tmp_path):
    folder = make_backbone(tmp_path / "backbone")
    (folder / fake_engine.LONG_CONTEXT).touch()
    long: dict[str, Any] = {"text": "x" * 5000, "max_new_tokens": 1, "timeout": None}
    with running(tmp_path, request_duration_s_max=0.8) as server:
        with busy_encoders(server), ThreadPoolExecutor(1) as pool:
            began = time.monotonic()
            call = pool.submit(refused, partial(server.generate, **long))
            until(lambda: server.scrape()["weft_tokens_waiting"] == 5000)
            assert server.generate(ids=[5], max_new_tokens=1).text == "a"
            # the threads are as busy as before
            assert call.result()[:2] == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
            assert time.monotonic() - began < 5
        page = server.scrape()
        assert (page["weft_requests_waiting"], page["weft_tokens_waiting"], page["weft_requests_running"]) == (0, 0, 0)
        assert server.generate(**long).usage.prompt_tokens == 5000


def test_a_long_prompt_that_finds_the_queue_full_is_not_encoded(server):
    async def occupy(places: ExitStack) -> None:
        for _ in range(4):
            places.enter_context(server.frontend.relay.place(1))

    async def leave(places: ExitStack) -> None:
        places.close()

    places = ExitStack()
    server.on_loop(occupy(places))
    with busy_encoders(server):
        told = refused(lambda: server.generate(text="x" * 5000, timeout=5))
        assert told[:2] == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
    server.on_loop(leave(places))
    assert server.generate(ids=[5], max_new_tokens=1).text == "a"


def test_a_deadline_that_has_passed_is_told_before_anything_is_done(server):
    service = InferenceService(
        server.frontend.relay, server.frontend.registrar, None, Threads("none", 1),
        new_tokens_default=1, duration_s_max=600,
    )  # fmt: skip
    before = len(server.commands("Submit"))
    for remaining_s in (0.0, -1.0):
        with pytest.raises(DeadlineExceeded):
            server.on_loop(service.Generate(make_request(ids=[5]), Call(remaining_s)))
    assert len(server.commands("Submit")) == before
