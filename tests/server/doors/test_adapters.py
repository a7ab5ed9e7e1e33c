"""The names of the store over a socket: pages, deletion under load, and another backbone under the same store."""

import logging
from functools import partial
from pathlib import Path

import grpc
import pytest

from tests.server.doors import fake_engine
from tests.server.doors.harness import adapter_files, refused, running, until
from weft.proto.v1 import common_pb2, inference_pb2
from weft.server.config import ConfigError

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ACTIVE, INCOMPATIBLE = common_pb2.ADAPTER_STATE_ACTIVE, common_pb2.ADAPTER_STATE_INCOMPATIBLE


@pytest.fixture(scope="module")
def stocked(server):
    for i in range(7):
        server.register(f"n-{i}", adapter_files(i))
    yield server
    for i in range(7):
        server.delete(f"n-{i}")


def pages(server, **fields):
    token, seen = "", []
    while True:
        page = server.list_adapters(page_token=token, **fields)
        seen.append([each.name for each in page.adapters])
        token = page.next_page_token
        if not token:
            return seen


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 1000])
def test_pages_bring_every_name_once_and_in_order(stocked, size):
    seen = pages(stocked, page_size=size)
    assert [name for page in seen for name in page] == [f"n-{i}" for i in range(7)]
    assert all(len(page) <= size for page in seen)


def test_pages_stay_right_while_names_come_and_go(stocked):
    first = stocked.list_adapters(page_size=3)
    stocked.delete("n-2")
    stocked.register("n-0a", adapter_files(8))
    rest = stocked.list_adapters(page_size=100, page_token=first.next_page_token)
    assert [each.name for each in rest.adapters] == ["n-3", "n-4", "n-5", "n-6"]
    stocked.delete("n-0a")
    stocked.register("n-2", adapter_files(2))


def test_a_list_is_short_and_a_get_is_whole(stocked):
    listed = stocked.list_adapters(page_size=1).adapters[0]
    whole = stocked.get("n-0")
    assert not listed.sites
    assert whole.sites
    del whole.sites[:]
    assert listed == whole


def test_a_list_can_be_of_one_method(stocked):
    assert pages(stocked, method="LORA") == [[f"n-{i}" for i in range(7)]]
    assert pages(stocked, method="LOKR") == [[]]


@pytest.mark.parametrize("token", ["x", "AAAA", "é", "=" * 8, "A" * 4000, "bi0w"])
def test_a_token_that_is_not_ours_is_refused(stocked, token):
    assert refused(lambda: stocked.list_adapters(page_token=token)) == (INVALID, "INVALID_REQUEST", ("page_token",))


def test_a_token_of_another_list_or_with_a_flipped_bit_is_refused(stocked):
    token = stocked.list_adapters(page_size=2).next_page_token
    assert refused(lambda: stocked.list_adapters(page_token=token, method="LORA"))[0] is INVALID
    for at in range(len(token)):
        changed = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
        assert refused(partial(stocked.list_adapters, page_token=changed))[0] is INVALID


def test_a_page_is_no_larger_than_a_thousand(stocked):
    assert refused(lambda: stocked.list_adapters(page_size=1001)) == (INVALID, "INVALID_REQUEST", ("page_size",))


@pytest.mark.parametrize("call", ["get", "delete"])
def test_what_is_not_there_is_not_found(server, call):
    method = getattr(server, call)
    assert refused(lambda: method("ghost"))[:2] == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert refused(lambda: method("../ghost"))[:2] == (INVALID, "ADAPTER_INVALID")
    assert refused(lambda: method(""))[:2] == (INVALID, "ADAPTER_INVALID")


def test_a_deleted_adapter_finishes_what_runs_and_takes_nothing_new(server):
    digest = server.register("gone", adapter_files(20)).digest
    stream = server.stream(ids=[5], adapter="gone", max_new_tokens=300)
    next(stream)
    server.delete("gone")
    assert refused(lambda: server.generate(ids=[5], adapter="gone"))[1] == "ADAPTER_NOT_FOUND"
    assert f"Forget {digest}" not in server.commands("Forget")
    assert list(stream)[-1].finished.reason == inference_pb2.FINISH_REASON_LENGTH
    until(lambda: f"Forget {digest}" in server.commands("Forget"))


def test_registered_adapters_are_there_after_a_restart(tmp_path):
    with running(tmp_path) as server:
        before = [server.register(f"kept-{i}", adapter_files(i)) for i in range(3)]
    with running(tmp_path) as server:
        assert [server.get(each.name) for each in before] == before
        assert server.generate(ids=[5], adapter="kept-1", max_new_tokens=2).text == "AB"
        # nothing was prepared again: the engine finds the version by its digest
        assert len(server.commands("Prepare")) == 3


def test_under_another_backbone_adapters_that_do_not_fit_say_why(tmp_path):
    with running(tmp_path) as server:
        server.register("small", adapter_files(1))
    (tmp_path / "backbone" / fake_engine.BACKBONE_DIGEST).write_text("c" * 64)
    with running(tmp_path) as server:
        until(lambda: server.get("small").state == INCOMPATIBLE)
        assert "8" in server.get("small").state_reason
        assert server.list_adapters().adapters[0].state == INCOMPATIBLE
        told = refused(lambda: server.generate(ids=[5], adapter="small"))
        assert told[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_INCOMPATIBLE")
        assert server.scrape()['weft_adapters{state="incompatible"}'] == 1
        assert server.generate(ids=[5], max_new_tokens=1).text == "a"
    (tmp_path / "backbone" / fake_engine.BACKBONE_DIGEST).write_text("b" * 64)
    with running(tmp_path) as server:
        assert server.generate(ids=[5], adapter="small", max_new_tokens=1).text == "A"


def test_under_another_backbone_adapters_that_fit_are_compiled_again(tmp_path):
    with running(tmp_path) as server:
        first = server.register("fits", adapter_files(1))
        refusing = adapter_files(2, alpha=4)
        server.register("refused", refusing)
    # the same shapes under another digest; the engine refuses one of them now
    (tmp_path / "backbone" / fake_engine.BACKBONE_DIGEST).write_text("bb" + "d" * 62)
    digest = None
    for folder in (tmp_path / "store" / "objects").iterdir():
        if (folder / "adapter_model.safetensors").read_bytes() == refusing[1]:
            digest = folder.name
    (tmp_path / "backbone" / fake_engine.REFUSES).write_text(str(digest))
    with running(tmp_path) as server:
        until(lambda: server.get("refused").state == INCOMPATIBLE)
        until(lambda: server.frontend._catalog.get("fits").backbone_digest.startswith("bbd"))
        assert server.get("fits").state == ACTIVE
        assert server.get("fits").digest == first.digest
        assert "not any more" in server.get("refused").state_reason
        assert f"Prepare {first.digest}" in server.commands("Prepare")
        # registering it again asks again
        (tmp_path / "backbone" / fake_engine.REFUSES).unlink()
        assert server.register("refused", refusing).state == ACTIVE


def test_an_adapter_that_breaks_the_engine_keeps_no_other_from_being_compiled_again(tmp_path):
    with running(tmp_path) as server:
        broken = server.register("a-broken", adapter_files(1))
        server.register("fits", adapter_files(2))
    (tmp_path / "backbone" / fake_engine.BACKBONE_DIGEST).write_text("bb" + "d" * 62)
    (tmp_path / "backbone" / fake_engine.REFUSES).write_text(f"{broken.digest} bug")
    with running(tmp_path) as server:
        until(lambda: server.frontend._catalog.get("fits").backbone_digest.startswith("bbd"))
        assert server.get("a-broken").state == ACTIVE
        assert server.frontend._catalog.get("a-broken").backbone_digest.startswith("bbb")


def write_adapter(folder: Path, seed: int) -> Path:
    folder.mkdir()
    config, weights = adapter_files(seed)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_adapters_named_at_the_start_are_registered_before_the_server_is_ready(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    one, two = write_adapter(tmp_path / "one", 1), write_adapter(tmp_path / "two", 2)
    with running(tmp_path, adapter=(f"a={one}", f"b={two}")) as server:
        assert "registering b, adapter 2 of 2" in caplog.text
        assert server.generate(ids=[5], adapter="a", max_new_tokens=1).text == "A"
        first = server.get("a").digest
    # the folder decides, whatever the store says
    with running(tmp_path, adapter=(f"a={two}",)) as server:
        assert server.get("a").digest == server.get("b").digest != first


def cannot_start(folder: Path, adapter: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message), running(folder, adapter=(adapter,)):
        pass


def test_an_adapter_named_at_the_start_that_cannot_be_served_stops_the_start(tmp_path):
    cannot_start(tmp_path, f"a={tmp_path / 'missing'}", r"adapter a must be a folder with adapter_config\.json")
    bad = write_adapter(tmp_path / "bad", 1)
    (bad / "adapter_config.json").write_text("{}")
    cannot_start(tmp_path, f"a={bad}", r"adapter a cannot be registered: .*peft_type")
    cannot_start(tmp_path, f"x/y={bad}", "adapter x/y cannot be registered: name")


def test_server_info_says_what_this_is(server):
    info = server.info()
    assert (info.backbone.family, info.backbone.parameters, info.backbone.dtype) == ("fake", 123, "float32")
    assert (info.backbone.vocabulary, info.backbone.context_tokens) == (1000, 512)
    assert (info.backbone.site_count, info.backbone.digest) == (1, "b" * 64)
    assert info.backbone.has_tokenizer
    assert info.backbone.has_chat_template
    assert (info.limits.uploads_max, info.limits.queue_requests_max, info.limits.queue_tokens_max) == (4, 4, 600)
    assert (info.limits.upload_bytes_max, info.limits.request_duration_ms_max) == (2 << 30, 600_000)
    assert (info.runtime.device, info.runtime.kernels, info.runtime.versions["python"]) == ("cpu", "torch", "3")
    assert list(info.runtime.notes) == ["top_k=7 is odd"]
    assert info.memory.backbone_bytes == 5000
    assert {"LORA", "LOKR", "IA3"} <= set(info.methods)
