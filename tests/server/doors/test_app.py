"""The process as an operator sees it: what it prints, how it stops, and with which status it ends."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.server.doors import fake_engine
from tests.server.doors.harness import make_backbone, make_request, refusal, until
from weft.proto.v1 import inference_pb2
from weft.server.app import warnings
from weft.server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[3]
READY = re.compile(r"^weft ready grpc=(127\.0\.0\.1:\d+) metrics=(\S+)$", re.MULTILINE)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Process:
    """A server process and what it printed."""

    def __init__(self, folder: Path, **options) -> None:
        config: dict[str, Any] = {"model": str(make_backbone(folder / "backbone")), "store": str(folder / "store")}
        config |= {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "drain_lag_s": 0.1, **options}
        paths = [str(ROOT), str(ROOT / "build" / "links")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.doors.serve_fake", json.dumps(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.output = ""
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
        self.process.stdout.close()

    def ready(self) -> re.Match[str]:
        until(lambda: READY.search(self.output) or self.process.poll() is not None)
        found = READY.search(self.output)
        assert found, self.output
        return found

    def connect(self) -> grpc.Channel:
        return grpc.insecure_channel(self.ready()[1])

    def engine(self) -> int:
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                    return int(child)
        raise AssertionError("the server has no engine process")

    def stop(self, *signals: int) -> int:
        for each in signals:
            self.process.send_signal(each)
        return self.process.wait(20)


@contextmanager
def serving(folder: Path, **options):
    server = Process(folder, **options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        server.thread.join()


def stream(channel, **fields):
    call = channel.unary_stream(
        "/weft.v1.InferenceService/StreamGenerate",
        request_serializer=inference_pb2.StreamGenerateRequest.SerializeToString,
        response_deserializer=inference_pb2.StreamGenerateResponse.FromString,
    )
    return call(inference_pb2.StreamGenerateRequest(request=make_request(**fields)), timeout=20)


def health(channel) -> Any:
    request = health_pb2.HealthCheckRequest(service="readiness").SerializeToString()
    answer = channel.unary_unary("/grpc.health.v1.Health/Check")(request, timeout=5)
    return health_pb2.HealthCheckResponse.FromString(answer).status


def turned_away(channel) -> bool:
    try:
        list(stream(channel, ids=[5], max_new_tokens=1))
    except grpc.RpcError as error:
        told = refusal(error)
        return (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    return False


def test_it_says_what_serves_and_where_and_ends_with_zero(tmp_path):
    with serving(tmp_path) as server:
        server.ready()
        words = ("loading ", "fake", "123 parameters", "float32", "kernels torch on cpu", "MiB", "note: top_k=7 is odd")
        for word in words:
            assert word in server.output
        assert "warning" not in server.output
        assert server.stop(signal.SIGTERM) == 0


def test_draining_reports_first_then_refuses_then_finishes_what_runs(tmp_path):
    make_backbone(tmp_path / "backbone")
    (tmp_path / "backbone" / fake_engine.LONG_CONTEXT).touch()
    with serving(tmp_path, drain_lag_s=0.7) as server, server.connect() as channel:
        running = stream(channel, ids=[5], max_new_tokens=2500)
        next(running)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: health(channel) == NOT_SERVING)
        # balancers need a moment: until then nobody is turned away
        assert list(stream(channel, ids=[5], max_new_tokens=1))[-1].HasField("finished")
        until(lambda: turned_away(channel))
        assert list(running)[-1].finished.usage.completion_tokens == 2500
        assert server.process.wait(10) == 0
    assert "second signal" in server.output


def test_draining_does_not_wait_for_ever(tmp_path):
    with serving(tmp_path, drain_timeout_s=0.5) as server, server.connect() as channel:
        stuck = stream(channel, ids=[fake_engine.HANG], max_new_tokens=5)
        next(stuck)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as failed:
            next(stuck)
        assert refusal(failed.value).reason == "DRAINING"
        assert server.process.wait(10) == 1
        assert 0.5 < time.monotonic() - began < 5
        server.thread.join()
    assert "weft: cut off after drain_timeout_s 0.5: 1 in flight\n" in server.output


def test_a_watcher_of_health_hears_of_the_drain_and_does_not_hold_it_up(tmp_path):
    with serving(tmp_path) as server, server.connect() as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch", response_deserializer=health_pb2.HealthCheckResponse.FromString
        )(b"", timeout=20)
        next(watch)
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        began = time.monotonic()
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 1.5


def test_a_second_signal_stops_at_once(tmp_path):
    with serving(tmp_path) as server, server.connect() as channel:
        stuck = stream(channel, ids=[fake_engine.HANG], max_new_tokens=5)
        next(stuck)
        engine = server.engine()
        server.process.send_signal(signal.SIGINT)
        until(lambda: "draining" in server.output)
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == 1
        assert time.monotonic() - began < 3
        with pytest.raises(grpc.RpcError) as failed:
            list(stuck)
        assert failed.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        until(lambda: not os.path.exists(f"/proc/{engine}"))


def test_a_signal_during_the_start_is_obeyed(tmp_path):
    make_backbone(tmp_path / "backbone")
    (tmp_path / "backbone" / fake_engine.SLOW_START).touch()
    with serving(tmp_path) as server:
        until(lambda: "spawn_main" in children(server.process.pid))
        assert server.stop(signal.SIGTERM) == 0
        assert "ready" not in server.output


def children(pid: int) -> str:
    try:
        found = [
            Path(f"/proc/{child}/cmdline").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return ""
    return " ".join(found)


def test_when_the_engine_is_given_up_the_server_ends_with_70(tmp_path):
    with serving(tmp_path, engine_failures_max=1) as server:
        server.ready()
        os.kill(server.engine(), signal.SIGKILL)
        assert server.process.wait(10) == os.EX_SOFTWARE
    assert "1 times in a row" in server.output


def test_an_engine_that_cannot_start_ends_with_78_and_one_line(tmp_path):
    make_backbone(tmp_path / "backbone")
    (tmp_path / "backbone" / fake_engine.FAIL_AT_START).touch()
    with serving(tmp_path) as server:
        assert server.process.wait(10) == os.EX_CONFIG
        server.thread.join()
    loading = f"loading {tmp_path / 'backbone'}\n"
    assert server.output == f"{loading}weft: dtype must be float32, got something else\n"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"token_file": "/nowhere"}, "token_file must be a readable text file"),
        ({"tls_certificate_file": "/nowhere", "tls_key_file": "/nowhere"}, "must be a readable PEM file"),
        ({"listen": "192.0.2.1:1"}, "listen must be an address that can be bound"),
        ({"model": "no/such-model-anywhere-x"}, "model must be a local folder or a reachable hub model"),
    ],
)
def test_a_start_that_cannot_work_ends_with_78_and_says_why(tmp_path, options, text):
    with serving(tmp_path, **options) as server:
        assert server.process.wait(20) == os.EX_CONFIG
        server.thread.join()
    assert text in server.output


def test_a_store_in_use_is_not_shared(tmp_path):
    with serving(tmp_path) as first:
        first.ready()
        with serving(tmp_path) as second:
            assert second.process.wait(10) == os.EX_CONFIG
            second.thread.join()
    assert "another server" in second.output


def test_a_metrics_port_that_is_taken_does_not_stop_the_server(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = Process(tmp_path, metrics_listen=address)
        assert server.ready()[2] == "off"
        assert server.stop(signal.SIGTERM) == 0
        server.thread.join()


def test_the_engine_dies_with_a_killed_front(tmp_path):
    with serving(tmp_path) as server:
        server.ready()
        engine = server.engine()
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        until(lambda: not os.path.exists(f"/proc/{engine}"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_server_out_of_file_descriptors_serves_who_is_connected_and_recovers(tmp_path):
    with serving(tmp_path) as server, server.connect() as channel:
        pid = server.process.pid
        assert list(stream(channel, ids=[5], max_new_tokens=1))
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 2, limits[1]))
        own = [("grpc.use_local_subchannel_pool", 1)]
        others = [grpc.insecure_channel(server.ready()[1], options=own) for _ in range(10)]
        ready = [grpc.channel_ready_future(each) for each in others]
        before = cpu_s(pid)
        threading.Event().wait(1)
        # it does not try again and again
        assert cpu_s(pid) - before < 0.5
        assert list(stream(channel, ids=[5], max_new_tokens=1))[-1].HasField("finished")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        for each in ready:
            each.result(20)
        for each in others:
            each.close()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"listen": "127.0.0.1:1"}, 0),
        ({"metrics_listen": "0.0.0.0:1"}, 1),
        ({"metrics_listen": "[::]:1", "listen": "[::]:2"}, 3),
        ({"listen": "localhost:1"}, 0),
        ({"listen": "[::1]:1"}, 0),
        ({"listen": "0.0.0.0:1"}, 2),
        ({"listen": "[::]:1"}, 2),
        ({"listen": "example.org:1"}, 2),
        ({"listen": "0.0.0.0:1", "token_file": "t"}, 1),
        ({"listen": "0.0.0.0:1", "tls_certificate_file": "c", "tls_key_file": "k"}, 1),
        ({"listen": "0.0.0.0:1", "tls_certificate_file": "c", "tls_key_file": "k", "token_file": "t"}, 0),
        ({"listen": "0.0.0.0:1", "tls_certificate_file": "c", "tls_key_file": "k", "tls_client_ca_file": "r"}, 0),
    ],
)
def test_listening_openly_is_warned_about(options, count):
    assert len(warnings(ServerConfig(model="m", **options))) == count
