"""The edge: whatever bytes come in, the status is one of the table, and a bug tells nothing."""

import logging
import os
import random
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.server.doors.harness import Running, refusal, refused, running, until
from weft.proto.v1 import inference_pb2, server_pb2
from weft.server.doors import door
from weft.server.doors import health as health_door
from weft.server.doors.edge import MESSAGE_BYTES_MAX

KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}
EVERY = [
    (f"/{service.full_name}/{method.name}", (method.client_streaming, method.server_streaming))
    for service in door.SERVICES
    for method in service.methods
]
HEALTH = "/grpc.health.v1.Health"
# a field of length 5 that is cut short
GARBAGE = b"\x0a\x05ab"


def raw_call(server: Running, path: str, kind: tuple[bool, bool], messages: list[bytes], metadata=()):
    """Send bytes to an RPC and return the call and the answers, as bytes."""
    call = getattr(server.channel, KINDS[kind])(path)
    request = iter(messages) if kind[0] else messages[0]
    if kind[1]:
        stream = call(request, timeout=10, metadata=metadata)
        return stream, list(stream)
    answer, done = call.with_call(request, timeout=10, metadata=metadata)
    return done, [answer]


@pytest.mark.parametrize(("path", "kind"), EVERY)
def test_bytes_that_are_no_message_are_the_caller_s_fault(server, path, kind):
    with pytest.raises(grpc.RpcError) as failed:
        raw_call(server, path, kind, [GARBAGE])
    told = refusal(failed.value)
    assert (told.code, told.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


def test_random_bytes_never_lead_to_unknown_or_internal(server):
    chance = random.Random(7)
    codes = set()
    for _ in range(150):
        path, kind = chance.choice(EVERY)
        if path.endswith("Watch"):
            continue
        raw = chance.randbytes(chance.choice([0, 1, 3, 10, 200]))
        try:
            raw_call(server, path, kind, [raw])
        except grpc.RpcError as error:
            codes.add(error.code())
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    assert not codes & {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}


def test_invalid_utf8_in_a_string_is_no_message(server):
    with pytest.raises(grpc.RpcError) as failed:
        raw_call(server, "/weft.v1.InferenceService/Generate", (False, False), [b"\x0a\x02\xff\xfe"])
    assert refusal(failed.value).reason == "MALFORMED_MESSAGE"


def test_unknown_fields_are_ignored(server):
    answer = server.unary("/weft.v1.ServerService/GetServerInfo", b"\xf8\x07\x01", server_pb2.GetServerInfoResponse)
    assert answer.version


def test_of_a_oneof_set_twice_the_last_counts(server):
    first = inference_pb2.GenerateRequest(text="ignored").SerializeToString()
    second = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(ids=[5]), max_new_tokens=2)
    answer = server.unary(
        "/weft.v1.InferenceService/Generate",
        first + second.SerializeToString(),
        inference_pb2.GenerateResponse,
    )
    assert answer.usage.prompt_tokens == 1


def test_an_unknown_method_is_unimplemented(server):
    with pytest.raises(grpc.RpcError) as failed:
        server.channel.unary_unary("/weft.v1.InferenceService/Nothing")(b"", timeout=5)
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_over_the_limit_is_refused_before_it_is_decoded(server):
    with pytest.raises(grpc.RpcError) as failed:
        server.generate(text="x" * (MESSAGE_BYTES_MAX + 1))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_bug_is_internal_with_an_incident_and_the_log_has_the_rest(server, caplog, monkeypatch):
    def broken(*_):
        raise KeyError("/secret/path")

    monkeypatch.setattr(server.frontend.relay, "admit", broken)
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.RpcError) as failed:
        server.generate(ids=[5])
    monkeypatch.undo()
    told = refusal(failed.value)
    assert (told.code, told.reason) == (grpc.StatusCode.INTERNAL, "BUG")
    assert "secret" not in told.text + str(failed.value.trailing_metadata())
    incident = told.text.rsplit(" ", 1)[-1]
    logged = [record for record in caplog.records if incident in record.getMessage()]
    assert logged
    assert "secret" in str(logged[0].exc_info)


def test_a_bug_in_a_stream_is_internal_too(server, monkeypatch):
    def broken(*_):
        raise ValueError("secret")

    monkeypatch.setattr(server.frontend.relay, "submit", broken)
    with pytest.raises(grpc.RpcError) as failed:
        list(server.stream(ids=[5]))
    monkeypatch.undo()
    assert refusal(failed.value).code is grpc.StatusCode.INTERNAL


def test_cancelling_everything_at_once_logs_no_error(server, caplog):
    with caplog.at_level(logging.WARNING):
        for round_ in range(10):
            # each is refused, running or done when it is cancelled
            calls = [server.stream(ids=[5], max_new_tokens=50) for _ in range(8)]
            if round_ % 2:
                next(iter(calls[0]), None)
            for call in calls:
                call.cancel()
        until(lambda: server.scrape()["weft_requests_running"] == 0)
    assert not caplog.records


def health(server: Running, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int(server.unary(f"{HEALTH}/Check", request, health_pb2.HealthCheckResponse).status)


@pytest.mark.parametrize(
    "service",
    ["", "liveness", "readiness", "weft.v1.InferenceService", "weft.v1.AdapterService", "weft.v1.ServerService"],
)
def test_health_of_every_service_is_serving(server, service):
    assert health(server, service) == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service_is_not_found(server):
    with pytest.raises(grpc.RpcError) as failed:
        health(server, "other")
    assert (refusal(failed.value).code, refusal(failed.value).reason) == (
        grpc.StatusCode.NOT_FOUND,
        "SERVICE_UNKNOWN",
    )


def test_health_lists_all(server):
    answer = server.unary(f"{HEALTH}/List", health_pb2.HealthListRequest(), health_pb2.HealthListResponse)
    assert {each.status for each in answer.statuses.values()} == {health_pb2.HealthCheckResponse.SERVING}


def test_a_watcher_hears_changes_and_an_unknown_service_is_unknown(server):
    watch = server.channel.unary_stream(
        f"{HEALTH}/Watch", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    stream = watch(health_pb2.HealthCheckRequest(service="readiness").SerializeToString(), timeout=10)
    other = watch(health_pb2.HealthCheckRequest(service="other").SerializeToString(), timeout=10)
    assert next(other).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert next(stream).status == health_pb2.HealthCheckResponse.SERVING
    for serving in (False, True):
        server.loop.call_soon_threadsafe(server.frontend.health.set, {"readiness": serving})
        expected = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        assert next(stream).status == expected
    stream.cancel()
    other.cancel()


def test_those_who_watch_cannot_take_the_places_of_callers(server, monkeypatch):
    monkeypatch.setattr(health_door, "WATCHES_MAX", 2)
    watch = server.channel.unary_stream(f"{HEALTH}/Watch")
    streams = [watch(b"", timeout=10) for _ in range(2)]
    for each in streams:
        next(each)
    with pytest.raises(grpc.RpcError) as failed:
        next(watch(b"", timeout=10))
    told = refusal(failed.value)
    assert (told.code, told.reason, told.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED", 1.0)
    for each in streams:
        each.cancel()
    until(lambda: server.frontend.health._watches == 0)
    assert next(watch(b"", timeout=10))


@pytest.mark.parametrize(("path", "kind"), EVERY)
def test_a_message_is_measured_after_it_is_unpacked(server, path, kind):
    bomb = bytes(2 * MESSAGE_BYTES_MAX)
    with grpc.insecure_channel(server.address, compression=grpc.Compression.Gzip) as channel:
        call = getattr(channel, KINDS[kind])(path)
        with pytest.raises(grpc.RpcError) as failed:
            list(call(iter([bomb]) if kind[0] else bomb, timeout=10))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.generate(ids=[5], max_new_tokens=1).text == "a"


def test_reflection_names_every_service_and_describes_it(server):
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="weft.v1.InferenceService"),
    ]
    raw = [each.SerializeToString() for each in questions]
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    _, answers = raw_call(server, path, (True, True), raw)
    first, second = (reflection_pb2.ServerReflectionResponse.FromString(each) for each in answers)
    names = {service.name for service in first.list_services_response.service}
    assert names == {service.full_name for service in door.SERVICES}
    assert any(b"StreamGenerate" in each for each in second.file_descriptor_response.file_descriptor_proto)


def test_without_the_option_there_is_no_reflection(tmp_path):
    with running(tmp_path, reflection=False) as server:
        with pytest.raises(grpc.RpcError) as failed:
            raw_call(server, *EVERY[-1], [b""])
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


TOKEN = "correct-horse"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text(f"{TOKEN}\n")
    with running(folder, token_file=str(folder / "token")) as started:
        yield started


@pytest.mark.parametrize(("path", "kind"), EVERY)
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong"),),
        (("authorization", "Bearer "),),
        (("authorization", TOKEN),),
        (("authorization", f"Basic {TOKEN}"),),
        (("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")),
        (("x-authorization", f"Bearer {TOKEN}"),),
    ],
)
def test_every_rpc_but_health_asks_for_the_token(guarded, path, kind, metadata):
    # not even whether the bytes are a message is told to strangers
    reason = "MALFORMED_MESSAGE" if path.startswith(HEALTH) else "CREDENTIALS_INVALID"
    assert refused(lambda: raw_call(guarded, path, kind, [GARBAGE], metadata))[1] == reason


def test_the_right_token_is_let_in_whatever_the_case_of_its_scheme(guarded):
    for scheme in ("Bearer", "bearer", "BEARER"):
        guarded.metadata = [("authorization", f"{scheme} {TOKEN}")]
        assert guarded.generate(ids=[5], max_new_tokens=2).text == "ab"
    guarded.metadata = []


def test_health_needs_no_token(guarded):
    assert health(guarded, "readiness") == health_pb2.HealthCheckResponse.SERVING


def test_many_connections_that_say_nothing_do_not_disturb(server):
    channels = [server.connect(**{"grpc.use_local_subchannel_pool": 1}) for _ in range(50)]
    ready = [grpc.channel_ready_future(channel) for channel in channels]
    for each in ready:
        each.result(10)
    assert server.generate(ids=[5], max_new_tokens=1).text == "a"
    for channel in channels:
        channel.close()


def test_threads_and_files_do_not_pile_up(server):
    server.generate(ids=[5], max_new_tokens=1)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for i in range(20):
        server.register(f"pile-{i % 2}", replace=True)
        server.generate(ids=[5], max_new_tokens=1, adapter=f"pile-{i % 2}")
    assert threading.active_count() <= threads + 8
    assert len(os.listdir("/proc/self/fd")) <= files + 4
    server.delete("pile-0")
    server.delete("pile-1")
