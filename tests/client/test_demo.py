"""The demonstration: its questions, its bars, what it says, how it ends; and once the whole of it."""

import asyncio
import contextlib
import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import WEIGHTS
from tests.client.fake_server import FakeServer
from weft.client import Adapter, AdapterState, Client
from weft.server.commands.terminal import Terminal
from weft.server.demo import launch, play, report, run, tasks

FULLEST = launch.Fullest(rows=1234, adapters=2)


def make_adapter(name: str, method: str) -> Adapter:
    return Adapter(
        name, method, "peft", "d" * 64, 10, 20_480, 3, AdapterState.ACTIVE, "", 0, sites=(), notes=()
    )  # fmt: skip


def answers(name: str, right: int, wrong: int) -> list[play.Answer]:
    question = play.Question(name, "abc=", "cba")
    return [play.Answer(question, "cba", 3)] * right + [play.Answer(question, "no", 2)] * wrong


def test_the_batch_mixes_every_adapter_and_the_backbone():
    asked = play.questions()
    counts = Counter(each.adapter for each in asked)
    assert len(asked) >= 96
    assert len({each.method for each in tasks.DEMO_ADAPTERS}) >= 12
    assert set(counts) == {each.name for each in tasks.DEMO_ADAPTERS} | {""}
    assert len({each.adapter for each in asked[:32]}) > 6
    assert asked == play.questions()


def test_the_questions_are_words_that_no_training_saw():
    assert all(tasks.is_held_out(each.prompt.removesuffix("=")) for each in play.questions())


@pytest.mark.parametrize(
    ("method", "right", "passed"),
    [("LORA", 98, True), ("LORA", 97, False), ("LOKR", 97, False), ("IA3", 95, True), ("IA3", 94, False)],
)
def test_an_adapter_must_reach_its_bar(method, right, passed):
    adapters = {"a": make_adapter("a", method)}
    found, _ = play.score([*answers("a", right, 100 - right), *answers("", 0, 20)], adapters)
    assert (found.right, found.asked, found.passed) == (right, 100, passed)


@pytest.mark.parametrize(("right", "passed"), [(0, True), (1, True), (2, False)])
def test_the_bare_backbone_must_not_know_the_answers(right, passed):
    (found,) = play.score(answers("", right, 20 - right), {})
    assert found.passed is passed


@pytest.fixture
def outcome(server) -> play.Outcome:
    adapters = {"reverse": make_adapter("reverse", "LORA"), "upper": make_adapter("upper", "IA3")}
    scores = play.score([*answers("reverse", 20, 0), *answers("upper", 20, 0), *answers("", 0, 16)], adapters)
    late = play.LateArrival("upper", answers("upper", 1, 0)[0], 0.05, 7, 30, 5, 400)
    with Client(server.address) as client:
        return play.Outcome(late, scores, batch_s=0.5, batch_tokens=250, info=client.info())


def test_the_report_shows_answers_accuracy_speed_and_memory(outcome, capsys):
    report.tell(Terminal(as_json=False), outcome, FULLEST)
    out = capsys.readouterr().out
    assert re.search(r"^reverse +LORA +20,480  abc=    cba     right +20 of 20 right", out, re.MULTILINE)
    assert "(bare backbone)" in out
    assert "wrong, as it must be" in out
    assert "100.0% of 40 held-out requests to 2 adapters of 2 methods:\n           LORA 100 %, IA3 100 %\n" in out
    assert "56 requests sent at once, 16 of them to the bare backbone" in out
    assert "the fullest step had 1,234 rows and 2 adapters" in out
    assert "500 tokens/s" in out
    assert "M = 3.1 MiB backbone, N = 12 adapters resident, ΣA = 500.0 KiB" in out
    assert "answered 'cba' while a stream ran: 7 tokens before, 35 meanwhile, 400 after" in out
    assert "FAILED" not in out


def test_the_report_names_what_failed(outcome):
    bad = play.score([*answers("reverse", 10, 10), *answers("", 8, 8)], {"reverse": make_adapter("reverse", "LORA")})
    failed = dataclasses.replace(outcome, scores=bad, late=dataclasses.replace(outcome.late, tokens_after=0))
    assert not failed.passed
    assert report.summary(failed, FULLEST)[-3:] == [
        "FAILED     reverse: expected at least 98%, got 50.0%",
        "FAILED     bare backbone: expected at most 5%, got 50.0%",
        "FAILED     upper: expected a right answer before the stream ended",
    ]


@pytest.fixture
def fake_demo(server: FakeServer, folder: Path, monkeypatch, tmp_path) -> FakeServer:
    """The demonstration with two adapters on a server that answers everything with the prompt backwards."""
    two = (tasks.DemoAdapter("one", "reverse", "LoRA"), tasks.DemoAdapter("two", "reverse", "LoRA"))
    for each in two:
        target = tmp_path / "adapters" / each.name
        target.mkdir(parents=True)
        (target / "adapter_config.json").write_text("{}")
        (target / "adapter_model.safetensors").write_bytes(WEIGHTS)
    monkeypatch.setattr(tasks, "DEMO_ADAPTERS", two)
    monkeypatch.setattr(tasks, "ASSETS_DIR", tmp_path)

    @contextlib.contextmanager
    def pretend(terminal: Terminal, *, keep: bool) -> Any:
        yield launch.Server(None, tmp_path, server.address, "127.0.0.1:1")  # type: ignore[arg-type]

    monkeypatch.setattr(run, "_server", pretend)
    monkeypatch.setattr(run, "fullest_step", lambda metrics: FULLEST)
    return server


def test_wrong_answers_fail_the_demonstration(fake_demo, capsys):
    assert run.demonstrate(Terminal(as_json=False), keep=False) == 1
    out, err = capsys.readouterr()
    assert "FAILED     one: expected at least 98%, got 0.0%" in out
    assert err.splitlines()[-1].startswith("FAILED in ")
    assert fake_demo.calls["Generate"] == 2 * play.QUESTIONS_PER_ADAPTER + play.QUESTIONS_TO_BASE + 1


def test_the_stream_is_open_while_the_last_adapter_comes(fake_demo):
    order: list[str] = []

    class Calls(Counter[str]):
        def __setitem__(self, name: str, value: int) -> None:
            order.append(name)
            super().__setitem__(name, value)

    fake_demo.calls = Calls()
    asyncio.run(play.play(fake_demo.address, lambda done, total: None))
    begun = order.index("StreamGenerate")
    assert order[:begun].count("RegisterAdapter") == 1
    assert order[begun + 1 : begun + 3] == ["RegisterAdapter", "Generate"]


def test_the_accuracy_of_a_method_is_that_of_all_its_adapters():
    adapters = {name: make_adapter(name, "LORA") for name in ("a", "b")} | {"c": make_adapter("c", "IA3")}
    told = [*answers("a", 3, 1), *answers("b", 2, 0), *answers("c", 0, 1), *answers("", 1, 1)]
    assert report.by_method(play.score(told, adapters)) == {"LORA": (5, 6), "IA3": (0, 1)}


def test_accuracies_are_told_line_by_line_without_tearing_a_name_from_its_number():
    lines = report._method_lines({f"A method {number}": (1, 2) for number in range(20)})
    assert len(lines) > 1
    assert all(re.fullmatch(r" {11}(A method \d+ 50 %(, |,?$))+", line) and len(line) <= 120 for line in lines)
    assert sum(line.count("50 %") for line in lines) == 20


def test_metrics_that_do_not_tell_the_fullest_step_fail_the_demonstration(server):
    with pytest.raises(launch.DemoFailed, match="metrics of the fullest step"):
        launch.fullest_step("127.0.0.1:1")


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path):
    with pytest.raises(launch.DemoFailed, match="before it was ready") as caught:
        launch.start(tmp_path / "no-such-backbone", tmp_path)
    assert "no-such-backbone" in str(caught.value)


def children_cpu_s() -> float:
    """Processor time of all processes that were started here, and by those, and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_whole_demonstration_passes():
    began_s, before_s = time.monotonic(), children_cpu_s()
    done = subprocess.run(
        [sys.executable, "-m", "weft.server.cli", "demo", "--json"], capture_output=True, text=True, check=False
    )
    wall_s, cpu_s = time.monotonic() - began_s, children_cpu_s() - before_s
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["batch"]["requests"] >= 96
    assert len(found["methods"]) >= 12
    # of all that were asked at once
    assert found["fullest_step"]["adapters"] == len(tasks.DEMO_ADAPTERS)
    assert found["fullest_step"]["rows"] >= found["batch"]["requests"]
    assert found["memory"]["adapters_resident"] == len(tasks.DEMO_ADAPTERS)
    assert found["late"]["tokens_after"] > 0
    # where others use the processor too, what it computed says how long it takes alone
    assert min(wall_s, cpu_s) < 30


@dataclasses.dataclass
class StubServer:
    """A server that only remembers whether it was stopped."""

    folder: Path
    stopped: bool = False
    grpc: str = "127.0.0.1:1"

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def started(monkeypatch) -> list[StubServer]:
    """The servers that the demonstration started."""
    found: list[StubServer] = []

    def start(model: Path, folder: Path, *options: str) -> StubServer:
        found.append(StubServer(folder))
        return found[-1]

    monkeypatch.setattr(run, "start", start)
    return found


@pytest.mark.parametrize("keep", [False, True])
def test_the_server_and_its_folder_stay_only_if_they_are_to_be_kept(started, keep):
    with run._server(Terminal(as_json=True), keep=keep):
        pass
    (server,) = started
    assert server.stopped is not keep
    assert server.folder.exists() is keep
    shutil.rmtree(server.folder, ignore_errors=True)


def test_a_demonstration_that_breaks_leaves_nothing_behind(started):
    with pytest.raises(ZeroDivisionError), run._server(Terminal(as_json=True), keep=True):
        raise ZeroDivisionError
    (server,) = started
    assert server.stopped
    assert not server.folder.exists()
