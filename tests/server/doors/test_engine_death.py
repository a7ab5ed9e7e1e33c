"""The engine process dies, hangs or never starts: what callers hear, how soon, and what is served afterwards."""

import asyncio
import os
import signal
import threading
import time
from multiprocessing import active_children, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.server.doors import fake_engine
from tests.server.doors.harness import adapter_files, parts, refusal, running, until
from weft.server import supervisor
from weft.server.engine.config import EngineConfig
from weft.server.supervisor import EngineFailed, EngineProcess, RestartPolicy

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
FAST = RestartPolicy(backoff_s=0.02, stop_s_max=1.0)
RESTARTS = 'weft_engine_restarts_total{{cause="{}"}}'


@pytest.fixture
def server(tmp_path):
    with running(tmp_path, policy=FAST) as started:
        yield started


def health(server, service="") -> Any:
    request = health_pb2.HealthCheckRequest(service=service)
    return server.unary("/grpc.health.v1.Health/Check", request, health_pb2.HealthCheckResponse).status


def test_everything_in_flight_is_told_within_a_second_and_then_it_serves_again(server):
    server.register("kept", adapter_files(1))
    streams = [server.stream(ids=[fake_engine.HANG], max_new_tokens=5) for _ in range(3)]
    streams.append(server.stream(ids=[fake_engine.WAIT], adapter="kept", max_new_tokens=5))
    for stream in streams:
        next(stream)
    pid = server.engine_pid
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(grpc.RpcError) as failed:
            next(stream)
        told = refusal(failed.value)
        assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
        assert told.retry_after_s == 2.0
    assert time.monotonic() - killed < 1.0
    until(lambda: health(server) == SERVING)
    assert server.engine_pid != pid
    # the store holds what was registered; nothing is registered again
    assert server.generate(ids=[5], adapter="kept", max_new_tokens=3).text == "ABC"
    page = server.scrape()
    assert (page[RESTARTS.format("exit")], page["weft_engine_up"]) == (1, 1)
    assert (page["weft_requests_running"], page["weft_requests_waiting"]) == (0, 0)


def test_while_the_engine_is_away_the_rest_of_the_server_answers(tmp_path):
    slow = RestartPolicy(backoff_s=1.5, stop_s_max=1.0)
    with running(tmp_path, policy=slow) as server:
        server.register("kept", adapter_files(1))
        os.kill(server.engine_pid, signal.SIGKILL)
        until(lambda: health(server) == NOT_SERVING)
        assert health(server, "weft.v1.InferenceService") == NOT_SERVING
        assert health(server, "liveness") == SERVING
        for call in (lambda: server.generate(ids=[5]), lambda: list(server.stream(ids=[5])), server.info):
            with pytest.raises(grpc.RpcError) as failed:
                call()
            assert refusal(failed.value).reason == "ENGINE_RESTARTING"
        with pytest.raises(grpc.RpcError) as failed:
            server.register("new", adapter_files(2))
        assert refusal(failed.value).reason == "ENGINE_RESTARTING"
        assert server.get("kept").name == "kept"
        assert [each.name for each in server.list_adapters().adapters] == ["kept"]
        page = server.scrape()
        assert (page["weft_engine_up"], page["weft_ready"]) == (0, 0)
        assert page['weft_memory_bytes{kind="backbone",tier="device"}'] == 0
        server.delete("kept")
        until(lambda: health(server) == SERVING)


def test_a_request_that_kills_the_engine_ends_after_its_tokens(server):
    with pytest.raises(grpc.RpcError) as failed:
        server.generate(ids=[fake_engine.DIE], max_new_tokens=9)
    assert refusal(failed.value).reason == "ENGINE_RESTARTING"


def test_an_upload_that_kills_the_engine_leaves_nothing(server):
    call = server.upload(parts("x", adapter_files(alpha=fake_engine.DIE_ON_PREPARE)))
    with pytest.raises(grpc.RpcError) as failed:
        call.result()
    assert refusal(failed.value).reason == "ENGINE_RESTARTING"
    assert not server.frontend._catalog.names()
    until(lambda: not list((server.frontend._catalog._root / "objects").iterdir()))
    until(lambda: health(server) == SERVING)


def test_a_silent_engine_that_owes_answers_is_killed(tmp_path):
    policy = RestartPolicy(backoff_s=0.02, stop_s_max=0.2, stall_s_max=0.4)
    with running(tmp_path, policy=policy) as server:
        pid = server.engine_pid
        # silence is no crime while nobody waits
        threading.Event().wait(0.8)
        assert server.engine_pid == pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(grpc.RpcError) as failed:
            server.generate(ids=[5], max_new_tokens=5)
        assert refusal(failed.value).reason == "ENGINE_RESTARTING"
        until(lambda: health(server) == SERVING)
        assert server.generate(ids=[5], max_new_tokens=1).text == "a"
        assert server.scrape()[RESTARTS.format("stall")] == 1


def test_an_engine_that_keeps_dying_is_given_up(tmp_path):
    policy = RestartPolicy(failures_max=3, backoff_s=0.01, stop_s_max=1.0)
    with running(tmp_path, policy=policy) as server:
        (tmp_path / "backbone" / fake_engine.DIE_AT_START).touch()
        os.kill(server.engine_pid, signal.SIGKILL)
        until(server.frontend.supervisor.gave_up.done)
        assert "3 times in a row" in server.frontend.supervisor.gave_up.result()
        assert health(server) == NOT_SERVING
        page = server.scrape()
        assert [page[RESTARTS.format(cause)] for cause in ("exit", "start", "stall")] == [1, 1, 0]


def no_room(*_):
    raise EngineFailed("expected room for another process and its threads, got none")


def test_an_engine_that_gets_no_process_is_given_up(tmp_path, monkeypatch):
    policy = RestartPolicy(failures_max=3, backoff_s=0.01, stop_s_max=1.0)
    with running(tmp_path, policy=policy) as server:
        monkeypatch.setattr(supervisor, "EngineProcess", no_room)
        os.kill(server.engine_pid, signal.SIGKILL)
        until(server.frontend.supervisor.gave_up.done)
        assert "3 times in a row" in server.frontend.supervisor.gave_up.result()
        assert health(server) == NOT_SERVING


def test_a_process_that_is_to_be_had_later_is_taken_then(tmp_path, monkeypatch):
    right, left = EngineProcess, [no_room, no_room]
    with running(tmp_path, policy=FAST) as server:
        monkeypatch.setattr(supervisor, "EngineProcess", lambda *said: left.pop()(*said) if left else right(*said))
        os.kill(server.engine_pid, signal.SIGKILL)
        until(lambda: not left and health(server) == SERVING)
        assert server.generate(ids=[5], max_new_tokens=1).text == "a"


def test_a_defect_in_looking_after_the_engine_ends_the_server(tmp_path, monkeypatch):
    with running(tmp_path, policy=FAST) as server:
        monkeypatch.setattr(server.frontend.supervisor, "_respawn", lambda *_: 1 / 0)
        os.kill(server.engine_pid, signal.SIGKILL)
        until(server.frontend.supervisor.gave_up.done)
        assert "nobody looks after the engine" in server.frontend.supervisor.gave_up.result()


@pytest.mark.parametrize("broken", [(BaseProcess, OSError(11, "Resource temporarily unavailable")),
                                    (threading.Thread, RuntimeError("can't start new thread"))])  # fmt: skip
def test_what_a_process_needs_and_cannot_have_is_said_and_given_back(tmp_path, monkeypatch, broken):
    kind, error = broken
    nobody: Any = None

    def start(self):
        raise error

    async def spawn():
        config = EngineConfig(model=str(tmp_path), store=str(tmp_path / "store"))
        monkeypatch.setattr(kind, "start", start)
        with pytest.raises(EngineFailed, match=str(error.args[-1])):
            EngineProcess(fake_engine.TARGET, config, nobody)

    # one for all that this process will ever start
    resource_tracker.ensure_running()
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(spawn())
    assert not active_children()
    assert len(os.listdir("/proc/self/fd")) == before


def test_deaths_far_apart_are_forgiven(tmp_path):
    policy = RestartPolicy(failures_max=2, quick_s=0.0, backoff_s=0.01, stop_s_max=1.0)
    with running(tmp_path, policy=policy) as server:
        for _ in range(3):
            until(lambda: health(server) == SERVING)
            os.kill(server.engine_pid, signal.SIGKILL)
            until(lambda: health(server) == NOT_SERVING)
        until(lambda: health(server) == SERVING)


def test_an_engine_that_cannot_start_says_why(tmp_path):
    folder = tmp_path / "backbone"
    folder.mkdir()
    (folder / fake_engine.FAIL_AT_START).touch()
    with pytest.raises(EngineFailed, match="dtype must be float32"), running(tmp_path):
        pass


def test_an_engine_that_dies_at_the_start_is_not_tried_again(tmp_path):
    folder = tmp_path / "backbone"
    folder.mkdir()
    (folder / fake_engine.DIE_AT_START).touch()
    with pytest.raises(EngineFailed, match="exit code 5"), running(tmp_path):
        pass


def test_a_killed_engine_leaves_no_process_and_no_thread(server):
    pid = server.engine_pid
    before = threading.active_count()
    for _ in range(3):
        os.kill(server.engine_pid, signal.SIGKILL)
        until(lambda: health(server) == NOT_SERVING)
        until(lambda: health(server) == SERVING)
    assert not os.path.exists(f"/proc/{pid}")
    until(lambda: threading.active_count() <= before)
