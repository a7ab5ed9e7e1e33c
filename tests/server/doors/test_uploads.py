"""Uploads over a socket: a name is whole or absent, whatever the sender does."""

import hashlib
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tests.server.doors import fake_engine, harness
from tests.server.doors.harness import Told, adapter_files, parts, refusal, running, until
from weft.proto.v1.adapters_pb2 import AdapterHeader, RegisterAdapterRequest
from weft.proto.v1.common_pb2 import ADAPTER_STATE_ACTIVE
from weft.server import validation

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FILES = adapter_files(0)
names = (f"name-{i}" for i in itertools.count())


def chunk(data: bytes) -> RegisterAdapterRequest:
    return RegisterAdapterRequest(chunk=data)


def refused(call) -> Told:
    return harness.refused(call.result)


def store(server):
    return server.frontend._catalog._root


def assert_nothing_left(server, name):
    """No name, no files, no place taken, and the next upload works."""
    with pytest.raises(grpc.RpcError) as failed:
        server.get(name)
    assert refusal(failed.value).reason == "ADAPTER_NOT_FOUND"
    until(lambda: not list((store(server) / "staging").iterdir()))
    known = {server.frontend._catalog.get(each).digest for each in server.frontend._catalog.names()}
    until(lambda: {each.name for each in (store(server) / "objects").iterdir()} == known)
    until(lambda: server.scrape()["weft_uploads_in_progress"] == 0)
    server.register(name, adapter_files(99))
    server.delete(name)


def test_an_adapter_is_registered_with_its_report(server):
    config, weights = FILES
    got = server.register("fr-legal", FILES)
    assert (got.name, got.method, got.dialect, got.state) == ("fr-legal", "LORA", "peft", ADAPTER_STATE_ACTIVE)
    assert (got.disk_bytes, got.device_bytes, got.site_count) == (len(config) + len(weights), 512, 1)
    assert [site.module for site in got.sites] == [fake_engine.SITE]
    assert list(got.notes) == ["a note"]
    assert abs(got.create_time_ms - time.time() * 1000) < 60_000
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for data, name in
             ((config, "adapter_config.json"), (weights, "adapter_model.safetensors"))]  # fmt: skip
    assert got.digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert server.get("fr-legal") == got
    server.delete("fr-legal")


def test_it_is_on_disk_when_the_answer_comes(server):
    name = next(names)
    got = server.register(name, FILES)
    folder = store(server) / "objects" / got.digest
    assert (folder / "adapter_config.json").read_bytes() == FILES[0]
    assert (folder / "adapter_model.safetensors").read_bytes() == FILES[1]
    assert len(list((store(server) / "names").iterdir())) == len(server.frontend._catalog.names())
    server.delete(name)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 1 << 20])
def test_the_size_of_chunks_does_not_matter(server, chunk_bytes):
    name = next(names)
    server.register(name, FILES, chunk_bytes=chunk_bytes)
    server.delete(name)


def test_the_checksum_may_be_left_out(server):
    name = next(names)
    server.register(name, FILES, weights_sha256="")
    server.delete(name)


def test_the_same_bytes_again_change_nothing_and_need_no_engine(server):
    name = next(names)
    first = server.register(name, FILES)
    prepared = len(server.commands("Prepare"))
    assert server.register(name, FILES) == first
    assert len(server.commands("Prepare")) == prepared
    server.delete(name)


def test_other_bytes_under_a_name_need_replace(server):
    name = next(names)
    first = server.register(name, FILES)
    code, reason, _ = refused(server.upload(parts(name, adapter_files(1))))
    assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS")
    assert server.get(name) == first
    second = server.register(name, adapter_files(1), replace=True)
    assert server.get(name) == second
    assert second.digest != first.digest
    until(lambda: not (store(server) / "objects" / first.digest).exists())
    until(lambda: f"Forget {first.digest}" in server.commands("Forget"))
    server.delete(name)


def test_two_names_share_the_files_of_the_same_bytes(server):
    one, two = next(names), next(names)
    digest = server.register(one, FILES).digest
    assert server.register(two, FILES).digest == digest
    server.delete(one)
    assert server.generate(ids=[5], adapter=two, max_new_tokens=1).text == "A"
    assert (store(server) / "objects" / digest).exists()
    server.delete(two)
    until(lambda: not (store(server) / "objects" / digest).exists())


def test_of_many_who_register_one_name_exactly_one_wins(server):
    name = next(names)

    def attempt(seed):
        try:
            return server.register(name, adapter_files(seed)).digest
        except grpc.RpcError as error:
            return refusal(error).reason

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            outcomes = list(pool.map(attempt, range(4)))
            winners = [each for each in outcomes if len(each) == 64]
            assert len(winners) == 1, outcomes
            assert set(outcomes) - set(winners) == {"ADAPTER_EXISTS"}
            assert server.get(name).digest == winners[0]
            server.delete(name)
    assert_nothing_left(server, name)


def test_the_same_bytes_registered_and_deleted_at_once_under_many_names_survive(server):
    def churn(worker):
        for i in range(6):
            name = f"churn-{worker}-{i}"
            server.register(name, FILES)
            answer = server.generate(ids=[5], adapter=name, max_new_tokens=2)
            assert answer.text == "AB"
            server.delete(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    assert_nothing_left(server, "churn-0-0")


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "a\\b", "~", "-a", ".a", "a b", "é", "x" * 129, "a\n", "a,b"])
def test_names_are_judged_before_anything_is_written(server, name):
    before = len(server.commands("Prepare"))
    code, reason, fields = refused(server.upload(parts(name, FILES)))
    assert (code, reason, fields) == (INVALID, "ADAPTER_INVALID", ("header.name",))
    # what an upload before this one left goes in a thread of its own
    until(lambda: not list((store(server) / "staging").iterdir()))
    assert len(server.commands("Prepare")) == before


def header(**fields):
    defaults: dict[str, Any] = {"name": "x", "config": FILES[0], "weights_size": len(FILES[1])}
    return RegisterAdapterRequest(header=AdapterHeader(**(defaults | fields)))


TOO_MANY = RegisterAdapterRequest(chunk=b"x")
SEQUENCES = {
    "nothing": ([], "UPLOAD_INVALID", "header"),
    "no header": ([chunk(b"x")], "UPLOAD_INVALID", "header"),
    "an empty message": ([RegisterAdapterRequest()], "UPLOAD_INVALID", "header"),
    "two headers": ([header(), header()], "UPLOAD_INVALID", "chunk"),
    "an empty message inside": ([header(), RegisterAdapterRequest()], "UPLOAD_INVALID", "chunk"),
    "an empty chunk": ([header(), chunk(b"")], "UPLOAD_INVALID", "chunk"),
    "a chunk too large": (
        [header(weights_size=5 << 20), chunk(bytes(validation.CHUNK_BYTES_MAX + 1))],
        "UPLOAD_INVALID",
        "chunk",
    ),
    "fewer bytes": ([header(), chunk(FILES[1][:-1])], "UPLOAD_INVALID", "header.weights_size"),
    "no bytes": ([header()], "UPLOAD_INVALID", "header.weights_size"),
    "more bytes": ([header(), chunk(FILES[1]), chunk(b"x")], "UPLOAD_INVALID", "chunk"),
    "size 0": ([header(weights_size=0)], "INVALID_REQUEST", "header.weights_size"),
    "another checksum": (
        [header(weights_sha256="0" * 64), chunk(FILES[1])],
        "DIGEST_MISMATCH",
        "header.weights_sha256",
    ),
    "no checksum": ([header(weights_sha256="zz" * 32)], "INVALID_REQUEST", "header.weights_sha256"),
    "a short checksum": ([header(weights_sha256="00")], "INVALID_REQUEST", "header.weights_sha256"),
    "a spaced checksum": ([header(weights_sha256=" " * 64)], "INVALID_REQUEST", "header.weights_sha256"),
    "a large config": ([header(config=bytes((1 << 20) + 1))], "INVALID_REQUEST", "header.config"),
    "a config that is no JSON": ([header(config=b"{"), chunk(FILES[1])], "ADAPTER_INVALID", "adapter_config.json"),
    "no safetensors": ([header(), chunk(b"PK\x03\x04" + bytes(len(FILES[1]) - 4))], "ADAPTER_INVALID", None),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_pieces_that_make_no_upload_are_refused_and_leave_nothing(server, case):
    pieces, reason, field = SEQUENCES[case]
    code, got, fields = refused(server.upload(pieces))
    assert (code, got) == (INVALID, reason)
    assert field is None or fields == (field,)
    assert_nothing_left(server, "x")


def test_a_header_beyond_the_limit_is_told_before_any_weights_are_sent(tmp_path):
    with running(tmp_path, adapter_bytes_max=1000) as server:
        sent = []

        def pieces():
            yield header(weights_size=1001)
            for _ in range(50):
                time.sleep(0.1)
                sent.append(1)
                yield chunk(b"x")

        code, reason, _ = refused(server.upload(pieces()))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "UPLOAD_TOO_LARGE")
        assert len(sent) < 10


def broken(**changes) -> tuple[bytes, bytes]:
    config = json.loads(FILES[0]) | changes
    return json.dumps(config).encode(), FILES[1]


@pytest.mark.parametrize(
    ("files", "field"),
    [
        (broken(layer_replication=[[0, 1]]), "layer_replication"),
        (broken(r=3), None),
        (broken(r="2"), "r"),
        (broken(peft_type="NOTHING"), "peft_type"),
        (broken(target_modules=["k_proj"]), None),
        (adapter_files(site="model.layers.7.self_attn.q_proj"), None),
        (adapter_files(alpha=fake_engine.REFUSE), "lora_alpha"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused_by_field_and_leave_nothing(server, files, field):
    code, reason, fields = refused(server.upload(parts("x", files)))
    assert (code, reason) == (INVALID, "ADAPTER_INVALID")
    assert field is None or fields == (field,)
    assert_nothing_left(server, "x")


def test_a_config_with_broken_text_is_refused_in_words_that_fit_the_wire(server):
    config = FILES[0].replace(b'"LORA"', b'"\\ud800\\n' + "é".encode() * 5000 + b'"')
    code, reason, _ = refused(server.upload(parts("x", (config, FILES[1]))))
    assert (code, reason) == (INVALID, "ADAPTER_INVALID")


def test_what_structure_refuses_the_engine_never_sees(server):
    before = len(server.commands("Prepare"))
    refused(server.upload(parts("x", broken(layer_replication=[[0, 1]]))))
    assert len(server.commands("Prepare")) == before


def test_what_the_engine_refuses_it_is_told_to_forget(server):
    refused(server.upload(parts("x", adapter_files(5, alpha=fake_engine.REFUSE))))
    digest = server.commands("Prepare")[-1].split()[1]
    assert f"Forget {digest}" in server.commands("Forget")


@pytest.mark.parametrize(
    ("alpha", "code", "reason"),
    [
        (fake_engine.TOO_LARGE, grpc.StatusCode.RESOURCE_EXHAUSTED, "ADAPTER_MEMORY"),
        (fake_engine.CORRUPT, grpc.StatusCode.INTERNAL, "BUG"),
    ],
)
def test_other_refusals_of_the_engine_keep_their_code_and_leave_nothing(server, alpha, code, reason):
    call = server.upload(parts("x", adapter_files(alpha=alpha)))
    assert refused(call)[:2] == (code, reason)
    assert "secret" not in call.details()
    assert_nothing_left(server, "x")


def test_a_sender_that_stalls_loses_its_upload(tmp_path):
    with running(tmp_path, upload_idle_s_max=0.3) as server:
        for before in ([], [header()], [header(), chunk(FILES[1][:50])]):
            release = threading.Event()

            def pieces(before=before, release=release):
                yield from before
                release.wait(20)

            began = time.monotonic()
            call = server.upload(pieces())
            code, reason, _ = refused(call)
            release.set()
            assert (code, reason) == (grpc.StatusCode.ABORTED, "UPLOAD_STALLED")
            assert time.monotonic() - began < 2
            assert_nothing_left(server, "x")


def test_a_sender_that_trickles_meets_the_longest_duration(tmp_path):
    with running(tmp_path, upload_duration_s_max=0.5) as server:

        def pieces():
            yield header()
            for byte in FILES[1]:
                time.sleep(0.02)
                yield chunk(bytes([byte]))

        assert refused(server.upload(pieces()))[:2] == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert_nothing_left(server, "x")


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_sender_that_dies_leaves_nothing(server, after):
    with server.connect(**{"grpc.use_local_subchannel_pool": 1}) as channel:
        arrived, release = threading.Event(), threading.Event()

        def pieces():
            yield from itertools.islice(parts("x", FILES, chunk_bytes=50), after + 1)
            arrived.set()
            release.wait(20)

        method = channel.stream_unary(
            "/weft.v1.AdapterService/RegisterAdapter",
            request_serializer=RegisterAdapterRequest.SerializeToString,
        )
        call = method.future(pieces(), timeout=20)
        assert arrived.wait(10)
        until(lambda: server.scrape()["weft_uploads_in_progress"] == 1)
        call.cancel()
        release.set()
    assert_nothing_left(server, "x")


def test_cancelling_while_the_engine_compiles_leaves_nothing(server):
    call = server.upload(parts("x", adapter_files(alpha=fake_engine.NEVER)))
    before = len(server.commands("Prepare"))
    until(lambda: len(server.commands("Prepare")) > before or server.scrape()["weft_uploads_in_progress"] == 1)
    until(lambda: server.frontend.relay.busy)
    call.cancel()
    assert_nothing_left(server, "x")
    assert not server.frontend.relay.busy


def test_only_so_many_upload_at_once(server):
    release = threading.Event()

    def pieces(name):
        yield header(name=name)
        release.wait(20)

    held = [server.upload(pieces(f"held-{i}")) for i in range(4)]
    until(lambda: server.scrape()["weft_uploads_in_progress"] == 4)
    with pytest.raises(grpc.RpcError) as failed:
        server.register("fifth", FILES)
    told = refusal(failed.value)
    assert (told.code, told.reason, told.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, "UPLOADS_BUSY", 5.0)
    held[0].cancel()
    until(lambda: server.scrape()["weft_uploads_in_progress"] == 3)
    server.register("fifth", FILES)
    server.delete("fifth")
    for call in held:
        call.cancel()
    release.set()
    assert_nothing_left(server, "held-0")


def test_generation_goes_on_while_megabytes_are_uploaded(server):
    big = 3 << 20

    def pieces():
        yield header(weights_size=big)
        for _ in range(3):
            yield chunk((1 << 10).to_bytes(8, "little") + b"{" + bytes((1 << 20) - 9))

    call = server.upload(pieces())
    assert server.generate(ids=[5], max_new_tokens=30).usage.completion_tokens == 30
    assert refused(call)[1] == "ADAPTER_INVALID"
    assert_nothing_left(server, "x")
