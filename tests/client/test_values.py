"""Requests, folders, details and the public surface, without a server."""

import ast
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

import weft.client
from weft.client import FolderInvalid, InvalidRequest, Message, WeftError, connection, errors, values
from weft.client.requests import generate_request
from weft.client.upload import read_folder
from weft.proto.v1 import common_pb2, inference_pb2, server_pb2

PAIRS: dict[type, Any] = {
    values.Adapter: common_pb2.Adapter,
    values.SiteReport: common_pb2.SiteReport,
    values.EffectiveParams: inference_pb2.EffectiveParams,
    values.Usage: inference_pb2.Usage,
    values.Started: inference_pb2.Started,
    values.Delta: inference_pb2.Delta,
    values.Finished: inference_pb2.Finished,
    values.ServerInfo: server_pb2.GetServerInfoResponse,
    values.Backbone: server_pb2.Backbone,
    values.Limits: server_pb2.Limits,
    values.Runtime: server_pb2.Runtime,
    values.Memory: server_pb2.Memory,
}


@pytest.mark.parametrize("value", PAIRS, ids=lambda value: value.__name__)
def test_values_have_the_fields_of_the_contract(value):
    assert {each.name for each in dataclasses.fields(value)} == set(PAIRS[value].DESCRIPTOR.fields_by_name)


def test_the_options_are_the_fields_of_a_request():
    fields = set(inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name) - {"text", "tokens", "chat", "sampling"}
    # several are an ``adapter`` too
    fields -= {"adapters"}
    fields |= set(inference_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    assert set(weft.client.GenerateOptions.__annotations__) == fields


def test_the_public_names_are_what_is_imported():
    tree = ast.parse(Path(weft.client.__file__).read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(weft.client.__all__) == imported


def test_every_status_has_a_class_and_the_docstring_lists_them_all():
    everything = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, WeftError)}
    assert all(each.__name__ in (errors.__doc__ or "") for each in everything)
    codes = {each.name for each in grpc.StatusCode}
    assert set(errors.CLASSES) < codes
    assert codes - set(errors.CLASSES) == {"OK", "UNKNOWN", "INTERNAL", "UNIMPLEMENTED"}


def test_errors_survive_pickling():
    error = errors.NotFound("no adapter named 'x'", code="NOT_FOUND", reason="ADAPTER_NOT_FOUND", retry_after_s=1.0)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.NotFound
    assert vars(copy) == vars(error)
    assert str(copy) == "no adapter named 'x'"


def test_a_single_stop_string_is_not_taken_apart():
    assert list(generate_request("p", stop="END").stop) == ["END"]


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ("p", {"max_new_tokens": -1}, "max_new_tokens must be an integer of 0 to 4294967295, got -1"),
        ("p", {"top_k": 2**32}, "sampling.top_k must be an integer"),
        ("p", {"seed": 1.5}, "sampling.seed must be an integer of 0 to 18446744073709551615, got 1.5"),
        ([1, -5], {}, "tokens.ids must be an integer of 0 to 4294967295, got -5"),
        ([1, Message("user", "x")], {}, "prompt must be a text, token ids or Messages, got a mix"),
        ("\ud800", {}, "text must be valid Unicode"),
        ("p", {"stop": ["\udfff"]}, "stop must be valid Unicode"),
    ],
)
def test_what_no_message_can_hold_is_refused_by_name(prompt, options, text):
    with pytest.raises(InvalidRequest) as caught:
        generate_request(prompt, **options)
    assert text in caught.value.message
    assert caught.value.violations[0].field in caught.value.message + "chat"


def test_an_unknown_option_is_a_mistake_of_the_program():
    with pytest.raises(TypeError, match="temprature"):
        generate_request("p", temprature=1)  # type: ignore[call-arg]


def test_a_pickle_is_not_sent_and_the_error_says_how_to_convert_it(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FolderInvalid) as caught:
        read_folder("a", folder, replace=False)
    assert "got only adapter_model.bin" in caught.value.message
    assert "`weft convert pickle " in caught.value.message
    assert isinstance(caught.value, InvalidRequest)


def test_the_weights_may_have_adapterhub_s_name(folder):
    weights = folder / "adapter_model.safetensors"
    upload = read_folder("a", folder, replace=False)
    weights.rename(folder / "adapter.safetensors")
    again = read_folder("a", folder, replace=False)
    assert (again.weights_sha256, again.weights.name) == (upload.weights_sha256, "adapter.safetensors")
    # peft's name is the one that counts where both are there
    weights.write_bytes(b"other")
    assert read_folder("a", folder, replace=False).weights == weights


def test_a_folder_without_an_adapter_is_told_with_what_it_holds(tmp_path):
    with pytest.raises(FolderInvalid, match="got an empty folder"):
        read_folder("a", tmp_path, replace=False)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FolderInvalid, match=r"got notes\.txt"):
        read_folder("a", tmp_path, replace=False)
    with pytest.raises(FolderInvalid, match="got a file"):
        read_folder("a", tmp_path / "notes.txt", replace=False)
    with pytest.raises(FolderInvalid, match="got nothing there"):
        read_folder("a", tmp_path / "missing", replace=False)


def test_weights_that_shrink_while_they_are_sent_are_told(folder):
    upload = read_folder("a", folder, replace=False)
    chunks = upload.chunks()
    assert len(next(chunks).chunk) == 1 << 20
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(FolderInvalid, match="to stay as it is while it is sent"):
        next(chunks)


def test_a_config_must_be_there_and_small(folder):
    config = folder / "adapter_config.json"
    config.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(FolderInvalid, match="must be at most 1048576 bytes"):
        read_folder("a", folder, replace=False)
    config.unlink()
    with pytest.raises(FolderInvalid, match=r"adapter_config\.json, got: No such file"):
        read_folder("a", folder, replace=False)


def test_retries_are_for_what_changes_nothing():
    config = json.loads(connection.service_config())
    (method,) = config["methodConfig"]
    names = {each["method"] for each in method["name"]}
    assert names == {"Generate", "GetAdapter", "ListAdapters", "GetServerInfo"}
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:8470", True),
        ("localhost:1", True),
        ("[::1]:8470", True),
        ("unix:/tmp/x", True),
        ("10.0.0.1:8470", False),
        ("example.org:8470", False),
    ],
)
def test_only_what_stays_on_this_machine_avoids_the_proxy(address, local):
    assert connection.is_loopback(address) is local
    assert (("grpc.enable_http_proxy", 0) in connection.channel_options(address)) is local


def test_the_client_brings_no_torch_and_no_server():
    code = "import sys, weft.client; print([n for n in sys.modules if n == 'torch' or n.startswith('weft.server')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
