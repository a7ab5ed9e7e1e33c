"""The whole server over its socket: the demo's promise, hot registration, crashes, draining, bad uploads, metrics."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import pytest

from tests.support.server import Server, serving, until
from weft.client import Client, errors
from weft.client.values import Delta, Finished, Started
from weft.proto.v1.adapters_pb2 import AdapterHeader, RegisterAdapterRequest
from weft.server.demo import tasks

ADAPTERS = tasks.ASSETS_DIR / "adapters"


def bar(method: str) -> float:
    """The held-out accuracy that an adapter of this method must reach."""
    return 0.95 if method.startswith("(IA)") else 0.98


def register_all(client: Client) -> None:
    for adapter in tasks.DEMO_ADAPTERS:
        client.register(adapter.name, ADAPTERS / adapter.name)


def answer(client: Client, adapter: str, prompt: str) -> str:
    return client.generate(prompt, adapter=adapter, max_new_tokens=24).text


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store")) as running:
        with running.client() as client:
            register_all(client)
        yield running


@pytest.fixture
def client(server: Server):
    with server.client() as connected:
        yield connected


def accuracy(name: str, task: str, count: int, seed: int, answers: Mapping[tuple[str, str], str]) -> float:
    return sum(answers[name, prompt] == want for prompt, want in tasks.held_out(task, count, seed)) / count


def ask_all(client: Client, jobs: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Every (adapter, prompt) at once, so that they share steps."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(jobs, pool.map(lambda job: answer(client, *job), jobs), strict=True))


def test_every_task_is_answered_by_its_own_adapter_in_one_mixed_batch(server, client):
    per_adapter = 20
    jobs = []
    for adapter in tasks.DEMO_ADAPTERS:
        jobs += [(adapter.name, prompt) for prompt, _ in tasks.held_out(adapter.task, per_adapter, 1)]
    base = tasks.held_out(tasks.DEMO_ADAPTERS[0].task, per_adapter, 2)
    jobs += [("", prompt) for prompt, _ in base]
    answers = ask_all(client, jobs)
    found = {a.name: accuracy(a.name, a.task, per_adapter, 1, answers) for a in tasks.DEMO_ADAPTERS}
    print(found)
    assert not {a.name: found[a.name] for a in tasks.DEMO_ADAPTERS if found[a.name] < bar(a.method)}
    assert sum(answers["", prompt] == want for prompt, want in base) <= 0.05 * per_adapter
    # and not one after the other: all adapters stood in one step
    assert server.scrape()["weft_batch_adapters_max"] >= 8


def test_swapping_the_adapters_of_two_rows_shows(client):
    first, second = tasks.DEMO_ADAPTERS[0], tasks.DEMO_ADAPTERS[-1]
    pairs = tasks.held_out(first.task, 8, 3)
    right = ask_all(client, [(first.name, prompt) for prompt, _ in pairs])
    swapped = ask_all(client, [(second.name, prompt) for prompt, _ in pairs])
    assert all(right[first.name, prompt] == want for prompt, want in pairs)
    assert all(swapped[second.name, prompt] != want for prompt, want in pairs)


def test_an_adapter_is_registered_and_answers_while_a_stream_runs(server, client):
    new = tasks.DEMO_ADAPTERS[2]
    deltas_before = deltas_after = 0
    answered = threading.Event()
    with server.client() as other:
        stream = client.stream("abc=", max_new_tokens=480, ignore_eos=True)
        assert isinstance(next(stream), Started)
        assert isinstance(next(stream), Delta)

        def hot_swap() -> str:
            other.register("hot", ADAPTERS / new.name)
            prompt, _ = tasks.held_out(new.task, 1, 4)[0]
            text = answer(other, "hot", prompt)
            answered.set()
            return text

        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(hot_swap)
            for event in stream:
                if isinstance(event, Delta):
                    deltas_before += not answered.is_set()
                    deltas_after += answered.is_set()
            assert pending.result() == tasks.held_out(new.task, 1, 4)[0][1]
    assert deltas_before > 0
    assert deltas_after > 0, "the stream ended before the new adapter had answered"
    client.delete("hot")


def test_a_deleted_adapter_finishes_its_requests_and_takes_no_new_ones(client):
    client.register("leaving", ADAPTERS / tasks.DEMO_ADAPTERS[0].name)
    stream = client.stream("abcdef=", adapter="leaving", max_new_tokens=300, ignore_eos=True)
    next(stream)
    client.delete("leaving")
    with pytest.raises(errors.NotFound):
        client.generate("abc=", adapter="leaving")
    *_, last = stream
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == 300


def test_cancelled_streams_free_everything(server, client):
    for _ in range(5):
        stream = client.stream("abc=", max_new_tokens=480, ignore_eos=True)
        next(stream)
        stream.close()
    until(lambda: client.info().memory.kv_bytes == 0)
    until(lambda: server.scrape()["weft_requests_running"] == 0)


def test_the_number_of_series_does_not_grow_with_adapters(server, client):
    before = len(server.scrape())
    for i in range(12):
        client.register(f"many-{i}", ADAPTERS / tasks.DEMO_ADAPTERS[i % 9].name)
        answer(client, f"many-{i}", "abc=")
    assert len(server.scrape()) == before
    for i in range(12):
        client.delete(f"many-{i}")


def test_memory_is_the_backbone_plus_every_adapter(server, client):
    for adapter in tasks.DEMO_ADAPTERS:
        answer(client, adapter.name, "abc=")
    page = server.scrape()
    listed = [a for a in client.list() if a.name in {d.name for d in tasks.DEMO_ADAPTERS}]
    total = sum({a.digest: a.device_bytes for a in listed}.values())
    assert page['weft_memory_bytes{kind="adapters",tier="device"}'] == total
    assert page['weft_memory_bytes{kind="backbone",tier="device"}'] == client.info().memory.backbone_bytes


def test_a_refused_adapter_leaves_nothing_behind(server, client, tmp_path):
    source = ADAPTERS / tasks.DEMO_ADAPTERS[0].name
    config = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": [[0, 2]]}))
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    before, files = client.list(), sorted(os.listdir(server.store / "objects"))
    memory = client.info().memory
    with pytest.raises(errors.InvalidRequest, match="layer_replication"):
        client.register("refused", tmp_path)
    assert (client.list(), sorted(os.listdir(server.store / "objects"))) == (before, files)
    assert client.info().memory == memory
    assert answer(client, tasks.DEMO_ADAPTERS[0].name, "abc=")


def test_a_killed_engine_is_reported_within_a_second_and_restarted(server, client):
    adapter = tasks.DEMO_ADAPTERS[0]
    prompt, want = tasks.held_out(adapter.task, 1, 5)[0]
    stream = client.stream("abc=", max_new_tokens=480, ignore_eos=True)
    next(stream)
    killed = time.monotonic()
    os.kill(server.engine_pid(), signal.SIGKILL)
    with pytest.raises(errors.Unavailable) as failed:
        list(stream)
    assert time.monotonic() - killed < 1.0
    assert failed.value.reason == "ENGINE_RESTARTING"
    client.wait_ready(60)
    assert answer(client, adapter.name, prompt) == want
    assert server.scrape()['weft_engine_restarts_total{cause="exit"}'] == 1


@dataclass
class Revived:
    """A server that was started on the store of one that was killed, and what the killed one had answered."""

    server: Server
    said: dict[str, tuple[int, ...]]


def tokens_of_all(client: Client) -> dict[str, tuple[int, ...]]:
    """What every adapter, and the bare backbone, makes of one prompt."""
    names = ["", *(adapter.name for adapter in tasks.DEMO_ADAPTERS)]

    def tokens(name: str) -> tuple[int, ...]:
        return client.generate(
            "abcdef=", adapter=name, max_new_tokens=12, ignore_eos=True, temperature=0
        ).token_ids  # fmt: skip

    return {name: tokens(name) for name in names}


@contextmanager
def half_an_upload(server: Server, name: str, source: str) -> Iterator[None]:
    """An upload that has sent all but its last byte, and goes on sending nothing."""
    folder, gone = ADAPTERS / source, threading.Event()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    header = AdapterHeader(
        name=name, config=(folder / "adapter_config.json").read_bytes(), weights_size=len(weights)
    )  # fmt: skip

    def parts() -> Iterator[bytes]:
        yield RegisterAdapterRequest(header=header).SerializeToString()
        yield RegisterAdapterRequest(chunk=weights[:-1]).SerializeToString()
        gone.wait(60)

    before = server.scrape()["weft_upload_bytes_total"]
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.stream_unary("/weft.v1.AdapterService/RegisterAdapter").future(parts(), timeout=60)
        until(lambda: server.scrape()["weft_upload_bytes_total"] == before + len(weights) - 1)
        try:
            yield
        finally:
            gone.set()
            assert isinstance(call.exception(10), grpc.RpcError)


@pytest.fixture(scope="module")
def revived(server):
    """Takes the module's server down under load: tests that need that one stand above."""
    with server.client() as client:
        said = tokens_of_all(client)
        streams = [client.stream("abc=", adapter=name, max_new_tokens=480, ignore_eos=True) for name in said]
        for stream in streams:
            next(stream)
        engine = server.engine_pid()
        with half_an_upload(server, "half", tasks.DEMO_ADAPTERS[0].name):
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        for stream in streams:
            with pytest.raises(errors.WeftError):
                list(stream)
        until(lambda: not os.path.exists(f"/proc/{engine}"), timeout_s=5)
    with serving(server.store) as second:
        yield Revived(second, said)


def test_after_a_kill_under_load_every_registered_adapter_answers_as_itself(revived):
    with revived.server.client() as client:
        assert {a.name for a in client.list()} == {a.name for a in tasks.DEMO_ADAPTERS}
        assert tokens_of_all(client) == revived.said
    # each task, and the bare backbone, is told from the others by what it says
    assert len(set(revived.said.values())) > len(tasks.TASKS)


def test_an_upload_that_a_kill_cut_in_half_leaves_nothing(revived):
    store = revived.server.store
    with revived.server.client() as client:
        with pytest.raises(errors.NotFound):
            client.generate("abc=", adapter="half")
        digests = {adapter.digest for adapter in client.list()}
    assert set(os.listdir(store / "objects")) == digests
    assert os.listdir(store / "staging") == []


def test_sigterm_lets_requests_in_flight_finish(revived):
    server = revived.server
    with server.client() as client:
        stream = client.stream("abc=", max_new_tokens=400, ignore_eos=True)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert isinstance(last, Finished)
        assert last.usage.completion_tokens == 400
        assert server.process.wait(20) == 0
