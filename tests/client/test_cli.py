"""The command line against a server on a real socket: what people see, what programs get, how it ends."""

import io
import json
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import grpc
import pytest

from tests.client.fake_server import OVERLOADED, FakeServer, Refusal, make_adapter
from weft.proto.v1 import common_pb2
from weft.server import cli
from weft.server import errors as server_errors
from weft.server.commands import hints, local


@pytest.fixture
def weft(server, capsys):
    """Run ``weft`` against the fake server; returns status, standard output and standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        status = cli.main([*words, "--server", server.address])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def columns(line: str) -> list[str]:
    """The cells of a table's line."""
    return re.split(r"\s{2,}", line.strip())


def test_adding_an_adapter_says_what_it_became(weft, server, folder):
    status, out, err = weft("adapters", "add", "fr-legal", str(folder))
    assert (status, err) == (0, "")
    digest = server.adapters["fr-legal"].digest[:12]
    assert out == f"registered fr-legal: LORA, 1 sites, 2.0 MiB on the device, version {digest}\n"


def test_adding_a_name_again_says_how_to_replace_it(weft, server, folder):
    server.adapters["fr-legal"] = make_adapter("fr-legal")
    status, out, err = weft("adapters", "add", "fr-legal", str(folder))
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "error: name 'fr-legal' already points to other bytes",
        "  status: ALREADY_EXISTS ADAPTER_EXISTS",
        "  what to do: add --replace to point the name at these files, or choose another name",
    ]
    assert weft("adapters", "add", "fr-legal", str(folder), "--replace")[0] == 0


def test_a_folder_without_safetensors_is_refused_with_the_way_to_convert_it(weft, server, folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    status, _, err = weft("adapters", "add", "fr-legal", str(folder))
    assert status == 1
    assert "got only adapter_model.bin" in err
    assert f"`weft convert pickle {folder} FOLDER` makes one" in err
    assert not server.uploads


def test_adapters_are_listed_as_a_table(weft, server):
    server.adapters = {
        "fr-legal": make_adapter("fr-legal"),
        "a-name-that-is-longer-than-most-names-are-in-practice-but-still-allowed": make_adapter("x", method="X_KRONA"),
    }
    for name, each in server.adapters.items():
        each.name = name
    status, out, err = weft("adapters", "list")
    head, first, second = out.splitlines()
    assert (status, err) == (0, "")
    assert columns(head) == ["adapter", "method", "sites", "device", "disk", "state", "version", "registered"]
    assert columns(first)[:6] == [
        "a-name-that-is-longer-than-most-names-are-in-practice-but-still-allowed",
        "X_KRONA",
        "1",
        "2.0 MiB",
        "3.3 MiB",
        "active",
    ]
    assert columns(second)[-1] == "2026-09-21 14:13:20Z"


def test_an_adapter_that_is_not_served_says_why(weft, server):
    server.adapters["old"] = make_adapter(
        "old", state=common_pb2.ADAPTER_STATE_INCOMPATIBLE, state_reason="q_proj must be 64 wide, got [32]"
    )
    _, out, err = weft("adapters", "list")
    assert "incompatible" in out
    assert err == "old is not served: q_proj must be 64 wide, got [32]\n"


def test_an_empty_list_says_how_to_fill_it(weft):
    status, out, err = weft("adapters", "list")
    assert (status, out) == (0, "")
    assert "`weft adapters add NAME FOLDER`" in err


def test_one_adapter_is_shown_with_its_sites(weft, server):
    server.adapters["fr-legal"] = make_adapter("fr-legal", notes=["rounded to bfloat16"])
    status, out, _ = weft("adapters", "show", "fr-legal")
    lines = out.splitlines()
    assert status == 0
    assert columns(lines[0]) == ["adapter", "fr-legal"]
    assert "rounded to bfloat16" in out
    assert columns(lines[-1]) == [
        "model.layers.0.self_attn.q_proj", "low_rank r=8", "8", "2,048", "alpha/sqrt(r)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        (["--adapter", "a", "--adapter", "b=0.5"], [("a", 1.0), ("b", 0.5)]),
        (["--adapter", "b=-2"], [("b", -2.0)]),
        (["--adapter", "a", "--adapter", "b"], [("a", 1.0), ("b", 1.0)]),
    ],
)
def test_several_adapters_act_together(weft, server, flags, sent):
    assert weft("generate", "--prompt", "abc", *flags)[0] == 0
    (request,) = server.requests
    assert request.adapter == ""
    assert [(each.name, each.weight) for each in request.adapters] == sent


def test_one_adapter_goes_by_its_name_and_a_weight_must_be_a_number(weft, server):
    server.adapters["a"] = make_adapter("a")
    assert weft("generate", "--prompt", "abc", "--adapter", "a")[0] == 0
    assert (server.requests[0].adapter, len(server.requests[0].adapters)) == ("a", 0)
    status, _, err = weft("generate", "--prompt", "abc", "--adapter", "a=half")
    assert status == 2
    assert "--adapter must be NAME or NAME=WEIGHT, a number; got 'a=half'" in err


def test_a_removed_adapter_is_gone(weft, server):
    server.adapters["fr-legal"] = make_adapter("fr-legal")
    assert weft("adapters", "rm", "fr-legal") == (0, "removed fr-legal\n", "")
    status, _, err = weft("adapters", "rm", "ghost")
    assert status == 1
    assert "`weft adapters list` shows what is registered" in err


def test_generation_prints_the_text_and_nothing_else_on_standard_output(weft):
    status, out, err = weft("generate", "--prompt", "[bold]:smile:\x1b[2J")
    assert (status, out) == (0, "J2[\x1b:elims:]dlob[\n")
    assert re.fullmatch(r"17 tokens in \d+\.\d\d s \(\d+ tokens/s\), ended by length\n", err)


def test_generation_takes_ids_chat_and_standard_input(weft, server, monkeypatch):
    assert weft("generate", "--tokens", "97, 98 99")[1] == "cba\n"
    assert weft("generate", "--prompt", "hi", "--chat")[1] == "ih\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n"))
    assert weft("generate")[1] == "cba\n"
    assert [each.WhichOneof("prompt") for each in server.requests] == ["tokens", "chat", "text"]


def test_generation_passes_every_option_on(weft, server):
    words = "--max-new-tokens 7 --temperature 0.5 --top-k 3 --top-p 0.25 --seed 9 --stop a --stop b --ignore-eos"
    weft("generate", "--prompt", "p", *words.split(), "--request-id", "r", "--timeout", "5")
    (request,) = server.requests
    sampling = request.sampling
    assert (request.max_new_tokens, list(request.stop), request.ignore_eos) == (7, ["a", "b"], True)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 3, 0.25, 9)
    assert request.request_id == "r"


def test_a_backbone_without_tokenizer_shows_token_ids(weft):
    assert weft("generate", "--prompt", "no tokenizer")[1] == " ".join(str(ord(c)) for c in "rezinekot on") + "\n"


def test_a_refusal_names_the_field(weft):
    status, out, err = weft("generate", "--prompt", "p", "--top-p", "2")
    assert (status, out) == (1, "")
    assert "error: top_p must be in (0, 1], got 2" in err
    assert "status: INVALID_ARGUMENT INVALID_REQUEST, field: sampling.top_p" in err


def test_an_overloaded_server_says_when_to_come_back(weft, server):
    server.failures["StreamGenerate"] = [OVERLOADED]
    assert "what to do: try again in 1.5 s" in weft("generate", "--prompt", "p")[2]


def test_nobody_there_says_how_to_start_a_server(capsys):
    assert cli.main(["info", "--server", "127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert "is a weft server at 127.0.0.1:1? `weft serve --model MODEL` starts one" in err


def test_a_foreign_server_is_told_apart(weft, server):
    server.failures["GetServerInfo"] = [Refusal(grpc.StatusCode.UNIMPLEMENTED, "no such method", "")]
    assert "is no weft server" in weft("info")[2]


def test_the_token_is_read_from_a_file(tmp_path, capsys):
    (tmp_path / "token").write_text("s3cret\n")
    with FakeServer(token="s3cret") as server:
        assert cli.main(["info", "--server", server.address, "--token-file", str(tmp_path / "token")]) == 0
        assert cli.main(["info", "--server", server.address]) == 1
    assert "--token-file FILE" in capsys.readouterr().err


def test_info_shows_backbone_and_memory(weft):
    status, out, _ = weft("info")
    assert status == 0
    assert "weft-demo: llama, 800,000 parameters in float32" in out
    assert "M = 3.1 MiB backbone, N = 12 adapters resident, ΣA = 500.0 KiB" in out


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["adapters", "list"], {"adapters"}),
        (["adapters", "show", "fr-legal"], {"name", "digest", "sites", "state", "notes"}),
        (["generate", "--prompt", "abc"], {"text", "token_ids", "reason", "usage", "effective", "adapter_digest"}),
        (["info"], {"version", "backbone", "limits", "memory", "runtime", "methods"}),
        (["adapters", "rm", "fr-legal"], {"removed"}),
        (["adapters", "rm", "ghost"], {"error"}),
        (["generate", "--tokens", "1;2"], {"error"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_programs_get_one_json_object(weft, server, words, keys):
    server.adapters["fr-legal"] = make_adapter("fr-legal")
    status, out, err = weft(*words, "--json")
    found = json.loads(out)
    assert keys <= set(found)
    assert (status == 0) == ("error" not in found)
    assert err == ""


def test_json_of_an_added_adapter_and_of_a_refusal(weft, folder):
    assert json.loads(weft("adapters", "add", "fr-legal", str(folder), "--json")[1])["name"] == "fr-legal"
    error = json.loads(weft("generate", "--prompt", "p", "--top-p", "2", "--json")[1])["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["reason"] == "INVALID_REQUEST"
    assert error["violations"] == [{"field": "sampling.top_p", "description": "top_p must be in (0, 1], got 2"}]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["generate", "--tokens", "1;2"], "--tokens must be token ids between commas"),
        (["generate", "--tokens", "1", "--chat"], "expected a text with --chat, got --tokens"),
        (["info", "--token-file", "/missing"], "expected a readable file at /missing, got: No such file"),
        (["info", "--tls-key-file", "/missing"], "expected --tls-certificate-file and --tls-key-file together"),
        (["serve", "--model", "m", "--page-tokens", "0"], "page_tokens must be > 0, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_ends_with_two(words, text, capsys):
    assert cli.main(words) == 2
    assert f"error: {text}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["nonsense"], ["serve"], ["serve", "--model", "m", "--no-such"], ["adapters"]], ids=str
)
def test_what_does_not_parse_ends_with_two(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: weft" in capsys.readouterr().err


def test_the_version_is_the_version_of_the_server(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == "weft 0.1.0\n"


def test_a_benchmark_gets_its_options_untouched(monkeypatch):
    seen: list[list[str]] = []

    def main(words: list[str]) -> int:
        seen.append(words)
        return 3

    def load(name: str) -> SimpleNamespace:
        assert name == "weft.bench.decode"
        return SimpleNamespace(main=main)

    monkeypatch.setattr(local, "import_module", load)
    assert cli.main(["bench", "decode", "--peer", "peft", "--json", "--help"]) == 3
    assert seen == [["--peer", "peft", "--json", "--help"]]


def test_every_reason_of_the_server_has_its_advice():
    reasons = {row.reason for row in server_errors.TABLE.values()}
    assert reasons <= set(hints.REASONS) | hints.RETRY
    assert set(hints.REASONS) | hints.RETRY == reasons | {"FOLDER_INVALID"}


def start(server: FakeServer, *words: str) -> "subprocess.Popen[str]":
    """Run ``weft`` as a process of its own."""
    command = [sys.executable, "-m", "weft.server.cli", *words, "--server", server.address]
    # tests that a shell started in the background ignore interrupts, and so would their children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_may_wait_for_the_server(weft, server):
    server.serving = False
    threading.Timer(0.2, lambda: setattr(server, "serving", True)).start()
    assert weft("adapters", "list", "--wait", "10")[0] == 0
    assert server.calls["Check"] >= 2
    checks = server.calls["Check"]
    assert weft("adapters", "list")[0] == 0
    assert server.calls["Check"] == checks


def test_a_server_that_does_not_come_is_told_after_the_wait(capsys):
    assert cli.main(["info", "--wait", "0.3", "--server", "127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert "127.0.0.1:1" in err
    assert "status: DEADLINE_EXCEEDED" in err


@pytest.mark.parametrize("text", ["-1", "inf", "nan", "soon"])
def test_what_is_no_time_to_wait_is_refused(text, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", f"--wait={text}"])
    assert ended.value.code == 2
    assert "--wait" in capsys.readouterr().err


def test_an_interrupt_ends_the_stream_and_prints_no_trace(server):
    process = start(server, "generate", "--prompt", "endless")
    assert process.stdout is not None
    assert process.stdout.read(3) == "xxx"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert server.cancelled.wait(5)


def test_a_reader_that_leaves_ends_the_stream_quietly(server):
    process = start(server, "generate", "--prompt", "endless")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(3) == "xxx"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(10) == 1
    process.stderr.close()
    assert server.cancelled.wait(5)


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        # a process spawned by the server imports the module of the command line once more
        ("import weft.server.cli", ("torch", "grpc", "rich")),
        ("import weft.server.cli as cli; cli.build_parser()", ("torch", "transformers")),
    ],
)
def test_the_command_line_stays_light(code, unwanted):
    script = f"{code}; import sys; print([each for each in {unwanted!r} if each in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
