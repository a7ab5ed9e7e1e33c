"""Both clients against a server on a real socket: every test runs once with each."""

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.client.conftest import WEIGHTS
from tests.client.fake_server import EXISTS, OVERLOADED, FakeServer, Refusal, make_adapter
from tests.client.flavours import BlockingClient
from weft import client as weft
from weft.proto.v1 import common_pb2

FLAVOURS: dict[str, Any] = {"sync": weft.Client, "async": BlockingClient}


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    return FLAVOURS[request.param]


@pytest.fixture
def client(flavour, server) -> Iterator[Any]:
    with flavour(server.address) as open_client:
        yield open_client


def test_a_completion_comes_as_a_plain_value(client, server):
    server.adapters["fr-legal"] = make_adapter("fr-legal")
    found = client.generate("abc", adapter="fr-legal", request_id="mine")
    assert found == weft.Completion(
        text="cba",
        token_ids=(99, 98, 97),
        reason=weft.FinishReason.STOP,
        usage=weft.Usage(prompt_tokens=3, completion_tokens=3),
        request_id="mine",
        adapter_digest=server.adapters["fr-legal"].digest,
        effective=weft.EffectiveParams(max_new_tokens=16, temperature=0.7, top_k=0, top_p=1.0, seed=5),
    )


def test_a_stream_is_started_then_deltas_then_finished(client):
    started, *deltas, finished = client.stream("abc")
    assert isinstance(started, weft.Started)
    assert started.request_id == "made-up"
    assert deltas == [weft.Delta("c", (99,)), weft.Delta("b", (98,)), weft.Delta("a", (97,))]
    assert finished == weft.Finished(weft.FinishReason.LENGTH, weft.Usage(3, 3))


def test_every_option_reaches_the_server(client, server):
    client.generate(
        "abc",
        max_new_tokens=7,
        temperature=0,
        top_k=3,
        top_p=0.5,
        seed=2**64 - 1,
        stop=("\n", "END"),
        ignore_eos=True,
        request_id="r-1",
    )
    (request,) = server.requests
    assert request.max_new_tokens == 7
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0, 3, 0.5)
    assert request.sampling.HasField("temperature")
    assert request.sampling.seed == 2**64 - 1
    assert list(request.stop) == ["\n", "END"]
    assert request.ignore_eos
    assert request.request_id == "r-1"


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ([("a", 1.0), ("b", 0.5)], [("a", 1.0), ("b", 0.5)]),
        ({"b": 0.5, "a": -1}, [("b", 0.5), ("a", -1.0)]),
        (["a", ("b", 0)], [("a", None), ("b", 0.0)]),
        ((), []),
    ],
)
def test_several_adapters_are_sent_in_order_with_their_weights(client, server, said, sent):
    client.generate("abc", adapter=said)
    list(client.stream("abc", adapter=said))
    for request in server.requests:
        assert request.adapter == ""
        assert [(e.name, e.weight if e.HasField("weight") else None) for e in request.adapters] == sent


@pytest.mark.parametrize("said", [[("a", "much")], ["a", 3], ("a", 0.5), [("a",)], [(1, 0.5)], {"a": None}])
def test_what_is_no_list_of_adapters_is_refused_before_it_is_sent(client, server, said):
    with pytest.raises(weft.InvalidRequest, match=r"adapters\[\d\] must be a name or a name and a number") as caught:
        client.generate("abc", adapter=said)
    assert caught.value.violations[0].field.startswith("adapters[")
    assert not server.requests


def test_what_is_not_said_is_left_to_the_server(client, server):
    client.generate("abc")
    (request,) = server.requests
    assert not request.HasField("max_new_tokens")
    assert not any(request.sampling.HasField(each) for each in ("temperature", "top_k", "top_p", "seed"))


def test_token_ids_and_conversations_are_prompts_too(client, server):
    assert client.generate([97, 98]).text == "ba"
    assert client.generate([weft.Message("system", "be brief"), weft.Message("user", "hi")]).text == "ih"
    assert client.generate([]).text == ""
    assert [each.WhichOneof("prompt") for each in server.requests] == ["tokens", "chat", "tokens"]


def test_a_refusal_brings_code_reason_field_and_text(client):
    with pytest.raises(weft.InvalidRequest, match=r"top_p must be in \(0, 1\], got 2") as caught:
        client.generate("abc", top_p=2.0)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.reason == "INVALID_REQUEST"
    assert caught.value.violations == (weft.FieldViolation("sampling.top_p", "top_p must be in (0, 1], got 2"),)
    assert caught.value.retry_after_s is None


def test_a_refused_stream_raises_at_its_first_event(client):
    stream = client.stream("abc", adapter="ghost")
    with pytest.raises(weft.NotFound, match="no adapter named 'ghost'"):
        next(stream)
    assert list(stream) == []


def test_a_stream_that_fails_late_gives_what_came_before(client):
    stream = client.stream("late failure")
    seen = [next(stream) for _ in range(1 + len("late failure"))]
    assert isinstance(seen[-1], weft.Delta)
    with pytest.raises(weft.DataLoss, match="stored bytes changed") as caught:
        list(stream)
    assert caught.value.reason == "ADAPTER_CORRUPT"


def test_an_overloaded_server_says_when_to_come_back(client, server):
    server.failures["StreamGenerate"] = [OVERLOADED]
    with pytest.raises(weft.Unavailable) as caught:
        next(client.stream("abc"))
    assert caught.value.retry_after_s == 1.5
    assert server.calls["StreamGenerate"] == 1


@pytest.mark.parametrize(
    ("rpc", "call"),
    [
        ("Generate", lambda client: client.generate("abc")),
        ("GetAdapter", lambda client: client.get("fr-legal")),
        ("ListAdapters", lambda client: client.list()),
        ("GetServerInfo", lambda client: client.info()),
    ],
)
def test_what_may_be_repeated_is_tried_three_times(client, server, rpc, call):
    server.adapters["fr-legal"] = make_adapter("fr-legal")
    server.failures[rpc] = [OVERLOADED, OVERLOADED]
    call(client)
    assert server.calls[rpc] == 3


def test_uploads_and_deletions_are_not_repeated(client, server, folder):
    server.failures = {"RegisterAdapter": [OVERLOADED], "DeleteAdapter": [OVERLOADED]}
    with pytest.raises(weft.Unavailable):
        client.register("fr-legal", folder)
    with pytest.raises(weft.Unavailable):
        client.delete("fr-legal")
    assert server.calls["RegisterAdapter"] == server.calls["DeleteAdapter"] == 1


def test_only_unavailable_is_tried_again(client, server):
    server.failures["GetServerInfo"] = [Refusal(grpc.StatusCode.INTERNAL, "internal error, incident 1f", "BUG")]
    with pytest.raises(weft.ServerFault, match="incident 1f"):
        client.info()
    assert server.calls["GetServerInfo"] == 1


def test_closing_a_stream_ends_it_on_the_server(client, server):
    with client.stream("endless") as stream:
        assert isinstance(next(stream), weft.Started)
        assert isinstance(next(stream), weft.Delta)
        assert not server.cancelled.is_set()
    assert server.cancelled.wait(5)
    assert list(stream) == []


def test_a_timeout_ends_the_call_on_the_server_too(client, server):
    with pytest.raises(weft.DeadlineExceeded):
        client.generate("slow", timeout_s=0.3)
    assert server.cancelled.wait(5)


def test_a_stream_without_an_end_is_a_fault_of_the_server(client):
    with pytest.raises(weft.ServerFault, match="expected a stream to end with finished"):
        list(client.stream("cut"))


def test_what_the_contract_does_not_know_is_a_fault_of_the_server(client, server):
    with pytest.raises(weft.ServerFault, match="finish reason to be one of"):
        client.generate("odd reason")
    with pytest.raises(weft.ServerFault, match="expected started, delta or finished"):
        list(client.stream("odd event"))
    server.adapters["fr-legal"] = make_adapter("fr-legal", state=common_pb2.ADAPTER_STATE_UNSPECIFIED)
    with pytest.raises(weft.ServerFault, match="the adapter's state"):
        client.get("fr-legal")


def test_registration_sends_header_then_chunks_of_at_most_a_mebibyte(client, server, folder):
    seen: list[tuple[int, int]] = []
    adapter = client.register("fr-legal", folder, progress=lambda sent, total: seen.append((sent, total)))
    (upload,) = server.uploads
    assert upload.header.config == (folder / "adapter_config.json").read_bytes()
    assert upload.header.weights_size == len(WEIGHTS)
    assert upload.header.weights_sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert not upload.header.replace
    assert [len(each) for each in upload.chunks] == [1 << 20, 1 << 20, 4]
    assert b"".join(upload.chunks) == WEIGHTS
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert seen == sorted(seen)
    assert (adapter.name, adapter.method, adapter.state) == ("fr-legal", "LORA", weft.AdapterState.ACTIVE)
    assert adapter.sites == (
        weft.SiteReport("model.layers.0.self_attn.q_proj", ("low_rank r=8",), 8, 2048, ("alpha/sqrt(r)",)),
    )


def test_a_registration_refused_at_its_header_says_why(client, server, folder):
    server.adapters["fr-legal"] = make_adapter("fr-legal")
    (folder / "adapter_model.safetensors").write_bytes(bytes(32 << 20))
    with pytest.raises(weft.AlreadyExists) as caught:
        client.register("fr-legal", folder)
    assert (caught.value.message, caught.value.reason) == (EXISTS.message, EXISTS.reason)
    assert len(server.uploads[0].chunks) < 32
    assert client.register("fr-legal", folder, replace=True).disk_bytes > 32 << 20


def test_weights_that_cannot_be_read_to_the_end_are_named(client, folder, monkeypatch):
    from weft.client import upload

    def broken(self):
        yield from ()
        raise upload._invalid("expected a readable file at weights, got: Input/output error")

    monkeypatch.setattr(upload.Upload, "chunks", broken)
    with pytest.raises(weft.FolderInvalid, match="Input/output error"):
        client.register("fr-legal", folder)


def test_lists_are_read_page_by_page(client, server):
    server.page_size_max = 2
    server.adapters = {each: make_adapter(each) for each in ("a", "b", "c", "d", "e")}
    server.adapters["d"] = make_adapter("d", method="IA3")
    assert [each.name for each in client.list()] == ["a", "b", "c", "d", "e"]
    assert server.calls["ListAdapters"] == 3
    assert [each.name for each in client.list(method="IA3")] == ["d"]
    assert all(each.sites == () for each in client.list())


def test_one_adapter_can_be_looked_at_and_forgotten(client, server):
    server.adapters["fr-legal"] = make_adapter("fr-legal", notes=["rounded to bfloat16"])
    adapter = client.get("fr-legal")
    assert len(adapter.sites) == 1
    assert adapter.notes == ("rounded to bfloat16",)
    client.delete("fr-legal")
    with pytest.raises(weft.NotFound):
        client.get("fr-legal")
    with pytest.raises(weft.NotFound):
        client.delete("fr-legal")


def test_the_server_tells_what_it_is(client):
    info = client.info()
    assert info.backbone.family == "llama"
    assert info.memory.adapters_resident == 12
    assert info.runtime.versions == {"torch": "2.13.0"}
    assert info.methods == ("LORA", "IA3")


def test_readiness_is_waited_for(client, server):
    server.serving = False
    with pytest.raises(weft.DeadlineExceeded, match=r"to be ready within 0\.3 s"):
        client.wait_ready(0.3)
    server.serving = True
    client.wait_ready(5)


def test_waiting_for_nobody_ends_in_time(flavour):
    began_s = time.monotonic()
    with flavour("127.0.0.1:1") as client, pytest.raises(weft.DeadlineExceeded):
        client.wait_ready(0.5)
    assert time.monotonic() - began_s < 3


def test_nobody_there_is_unavailable_without_a_reason(flavour):
    with flavour("127.0.0.1:1") as client, pytest.raises(weft.Unavailable) as caught:
        client.info()
    assert caught.value.reason == ""


def test_the_token_is_sent_and_a_missing_one_is_told(flavour):
    with FakeServer(token="s3cret") as server:
        with flavour(server.address, token="s3cret") as client:
            assert client.generate("ab").text == "ba"
            client.wait_ready(5)
        with flavour(server.address) as client, pytest.raises(weft.Unauthenticated) as caught:
            client.generate("ab")
    assert caught.value.reason == "CREDENTIALS_INVALID"


def test_a_token_that_no_header_can_hold_is_refused_at_once(flavour):
    with pytest.raises(weft.InvalidRequest, match="token must be printable ASCII"):
        flavour("127.0.0.1:1", token="two\nlines")
