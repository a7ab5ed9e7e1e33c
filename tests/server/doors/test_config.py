"""The options: their bounds, their command line, and what the engine is told of them."""

import argparse
import dataclasses
import subprocess

import pytest

from weft.server import version
from weft.server.config import (
    ConfigError,
    ServerConfig,
    add_arguments,
    from_args,
    parse_address,
    parse_bytes,
    shown_address,
)
from weft.server.engine.config import EngineConfig
from weft.server.version import VERSION


def parse(*words: str) -> ServerConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return from_args(parser.parse_args(["--model", "m", *words]))


def test_without_options_everything_has_its_default():
    assert parse() == ServerConfig(model="m")


def test_options_are_the_fields():
    got = parse(
        "--adapter", "a=/x", "--adapter", "b=/y=z", "--kv-bytes-max", "3GiB", "--no-reflection",
        "--drain-timeout-s", "1.5", "--queue-requests-max", "7", "--listen", "[::1]:0",
    )  # fmt: skip
    assert got.adapter == ("a=/x", "b=/y=z")
    assert (got.kv_bytes_max, got.reflection, got.drain_timeout_s, got.queue_requests_max) == (3 << 30, False, 1.5, 7)
    assert got.listen == "[::1]:0"


def test_every_field_has_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(ServerConfig))


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--adapter-memory-bytes-max" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--nothing", "1"], ["--kv-bytes-max", "1GB"], ["--kv-bytes-max", "-1"], ["extra"]])
def test_what_is_no_option_ends_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("123", 123), ("1KiB", 1024), ("2 MiB", 2 << 20), ("1GiB", 1 << 30), ("1TiB", 1 << 40)]
)
def test_sizes_may_have_a_unit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": ""}, "model"),
        ({"kv_bytes_max": 0}, "kv_bytes_max"),
        ({"batch_tokens_max": -1}, "batch_tokens_max"),
        ({"page_tokens": 0}, "page_tokens"),
        ({"uploads_max": 0}, "uploads_max"),
        ({"new_tokens_default": 0}, "new_tokens_default"),
        ({"request_duration_s_max": 0.0}, "request_duration_s_max"),
        ({"request_duration_s_max": float("nan")}, "request_duration_s_max"),
        ({"drain_lag_s": -1.0}, "drain_lag_s"),
        ({"drain_timeout_s": float("inf")}, "drain_timeout_s"),
        ({"adapter_bytes_max": 1 << 40}, "adapter_bytes_max"),
        ({"listen": "1234"}, "listen"),
        ({"listen": "host:"}, "listen"),
        ({"listen": ":80"}, "listen"),
        ({"listen": "host:65536"}, "listen"),
        ({"listen": "host:８０"}, "listen"),
        ({"metrics_listen": "x"}, "metrics_listen"),
        ({"adapter": ("x",)}, "adapter"),
        ({"adapter": ("=x",)}, "adapter"),
        ({"tls_key_file": "k"}, "tls_certificate_file"),
        ({"tls_client_ca_file": "c"}, "tls_client_ca_file"),
        ({"log_level": "loud"}, "log_level"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(fields, name):
    with pytest.raises(ConfigError, match=name):
        ServerConfig(**{"model": "m", **fields})


def test_addresses_may_be_ipv6():
    assert parse_address("[::1]:80", "listen") == ("::1", 80)


@pytest.mark.parametrize("text", ["[::1]:80", "127.0.0.1:80", "localhost:80"])
def test_an_address_is_shown_as_it_is_read(text):
    assert shown_address(*parse_address(text, "listen")) == text


def test_a_request_that_may_run_may_also_finish():
    config = ServerConfig(model="m")
    assert config.drain_timeout_s >= config.request_duration_s_max


def test_the_commit_is_the_one_of_the_checkout_and_of_no_folder_around_it(monkeypatch, tmp_path):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-mx"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    monkeypatch.setattr(version, "ROOT", tmp_path)
    assert len(version.commit()) >= 7
    assert head.stdout.startswith(version.commit())
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(version, "ROOT", tmp_path / "site-packages")
    assert version.commit() == ""


def test_the_engine_is_told_its_part():
    got = ServerConfig(model="m", dtype="float32", batch_requests_max=3).engine()
    assert isinstance(got, EngineConfig)
    assert (got.model, got.dtype, got.batch_requests_max, got.store) == ("m", "float32", 3, "weft-store")


def test_the_defaults_of_front_and_engine_agree():
    front = ServerConfig(model="m", store="s").engine()
    assert front == EngineConfig(model="m", store="s")


def test_the_version_is_the_one_of_the_distribution():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())
    assert project["project"]["version"] == VERSION


def test_the_engine_s_process_logs_what_the_front_does():
    assert parse("--log-level", "debug").engine().log_level == "debug"
