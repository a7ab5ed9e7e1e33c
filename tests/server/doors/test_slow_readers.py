"""Readers that do not keep up: what they miss arrives merged, what they never read is ended, nobody waits for them."""

import socket
import threading
import time

import grpc
import pytest

from tests.server.doors import fake_engine
from tests.server.doors.harness import Running, make_backbone, refusal, running, until
from weft.server.doors import edge

TOKENS = 60_000
# else the client takes in megabytes that nobody asked for
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0)]


class Valve:
    """A TCP proxy that can be shut: what stands still then is the connection, not the peer."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self.target = (host, int(port))
        self.open = threading.Event()
        self.open.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.sockets: list[socket.socket] = []
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self) -> None:
        try:
            near, _ = self.listener.accept()
        except OSError:
            return
        far = socket.create_connection(self.target)
        self.sockets += [near, far]
        for one, other in ((near, far), (far, near)):
            threading.Thread(target=self.pump, args=(one, other), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while True:
                self.open.wait()
                data = source.recv(4096)
                self.open.wait()
                if not data:
                    return
                sink.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self.open.set()
        self.listener.close()
        for each in self.sockets:
            each.close()


@pytest.fixture
def server(tmp_path):
    make_backbone(tmp_path / "backbone")
    (tmp_path / "backbone" / fake_engine.LONG_CONTEXT).touch()
    with running(tmp_path, write_stall_s_max=1.5, queue_tokens_max=1 << 30) as started:
        yield started


@pytest.fixture
def valve(server):
    shut = Valve(server.address)
    yield shut
    shut.close()


def received(server: Running) -> float:
    return server.scrape()["weft_generation_tokens_total"]


def test_what_a_slow_reader_misses_arrives_merged_and_whole(server, valve):
    with grpc.insecure_channel(valve.address, options=SMALL_WINDOW) as channel:
        stream = server.stream(ids=[fake_engine.BURST], max_new_tokens=TOKENS, channel=channel)
        next(stream)
        valve.open.clear()
        # the engine goes on to the end while nobody reads
        until(lambda: received(server) == TOKENS)
        valve.open.set()
        deltas = [event.delta for event in stream if event.HasField("delta")]
    assert sum(len(delta.token_ids) for delta in deltas) == TOKENS
    text = "".join(delta.text for delta in deltas)
    assert text == ("abcdefghijklmnopqrstuvwxyz" * (TOKENS // 26 + 1))[:TOKENS]
    assert max(len(delta.token_ids) for delta in deltas) > fake_engine.BURST_TOKENS
    assert max(len(delta.token_ids) for delta in deltas) <= 4096


def test_a_reader_that_never_reads_is_ended_and_does_not_disturb_others(server, valve):
    abort = server.aborts_next()
    with grpc.insecure_channel(valve.address, options=SMALL_WINDOW) as channel:
        # the engine goes silent at the end, so that only the reader can be to blame
        stream = server.stream(ids=[fake_engine.BURST, fake_engine.HANG], max_new_tokens=200_000, channel=channel)
        next(stream)
        valve.open.clear()
        aborted = abort()
        began = time.monotonic()
        assert server.generate(ids=[5], max_new_tokens=20).usage.completion_tokens == 20
        until(lambda: aborted in server.commands("Abort"))
        assert time.monotonic() - began > 1.0
        until(lambda: server.scrape()["weft_requests_running"] == 0)
        key = 'weft_errors_total{code="RESOURCE_EXHAUSTED",reason="SLOW_CONSUMER"}'
        until(lambda: server.scrape()[key] == 1)
        valve.open.set()
        with pytest.raises(grpc.RpcError) as failed:
            list(stream)
    assert (refusal(failed.value).code, refusal(failed.value).reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "SLOW_CONSUMER",
    )


def test_a_stop_string_ends_the_request_even_if_nobody_reads(server, valve):
    text = b"ab" * 40_000
    abort = server.aborts_next()
    with grpc.insecure_channel(valve.address, options=SMALL_WINDOW) as channel:
        prompt = [fake_engine.BYTES, *text, *b"STOP"]
        stream = server.stream(ids=prompt, max_new_tokens=9_000_000, stop=["STOP"], channel=channel)
        next(stream)
        valve.open.clear()
        aborted = abort()
        until(lambda: aborted in server.commands("Abort"))
        valve.open.set()
        events = list(stream)
    assert "".join(event.delta.text for event in events).encode() == text
    assert events[-1].finished.usage.completion_tokens == len(text) + 4


def test_a_long_text_is_encoded_beside_the_loop(server):
    assert server.generate(text="x" * 200_000, max_new_tokens=1).usage.prompt_tokens == 200_000


def test_an_answer_larger_than_a_message_says_so(server, monkeypatch):
    monkeypatch.setattr(edge, "MESSAGE_BYTES_MAX", 100)
    with pytest.raises(grpc.RpcError) as failed:
        server.generate(ids=[5], max_new_tokens=200)
    told = refusal(failed.value)
    assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ANSWER_TOO_LARGE")
