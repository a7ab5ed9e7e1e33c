"""The README tells the truth: its commands parse, its Python runs, its files, flags, statuses and metrics exist."""

import ast
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from tests.client.fake_server import FakeServer
from weft.adapters_store.formats import served
from weft.server import cli
from weft.server.commands import methods
from weft.server.config import ServerConfig
from weft.server.errors import TABLE
from weft.server.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
ROOMS = ("proto", "kernels", "adapters_store", "server", "bench")


def section(title: str) -> str:
    """The part of the README under a heading."""
    return TEXT.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def listed_files() -> set[str]:
    """The files that the layout names, each under the folder that was named last before it."""
    folder, found = "", set()
    for heading, name in re.findall(r"\*\*`([a-z_0-9/]+/)`\*\*|`(\w+\.py)`", section("Layout")):
        folder = heading or folder
        found |= {folder + name} if name else set()
    return found


def test_the_layout_names_every_source_file_and_no_other():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {
        each
        for each in tracked
        if each.split("/")[0] in ROOMS and not each.endswith("__init__.py") and "_pb2" not in each
    }
    assert listed_files() == {each for each in wanted if (ROOT / each).exists()}


def shown(name: str, value: object) -> str:
    """A flag with its default, as the README writes it."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool) or value in ("", ()):
        return flag
    if isinstance(value, int) and "_bytes" in name:
        return f"{flag} {value >> 30}GiB"
    return f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}"


def test_every_flag_stands_there_with_its_default():
    for each in fields(ServerConfig):
        if each.name != "model":
            assert f"`{shown(each.name, each.default)}" in section("Operate"), each.name


def test_every_status_and_reason_stands_there():
    rows = [line for line in section("Operate").splitlines() if line.startswith("|")]
    for row in TABLE.values():
        assert any(row.code.name in line and f"`{row.reason}`" in line for line in rows), row
    assert set(re.findall(r"`([A-Z]+_[A-Z_]+|BUG|DRAINING|OVERLOADED)`", "\n".join(rows))) == {
        row.reason for row in TABLE.values()
    }


def test_every_metric_named_exists():
    exposed = {each.name: each for family in Metrics(()).registry.collect() for each in [family]}
    names = re.findall(r"`(weft_\w+)", section("Operate"))
    assert names
    for name in names:
        assert name.removesuffix("_total") in exposed, name


def test_every_command_parses():
    commands = re.findall(r"`(weft [^`|]+)`|^\$ (weft [^&\n]+)", TEXT, re.MULTILINE)
    words = [shlex.split(inline or block)[1:] for inline, block in commands]
    parser = cli.build_parser()
    # named alone these are words of a sentence
    complete = [each for each in words if each not in (["generate"], ["convert"])]
    assert len(complete) >= 5
    for each in complete:
        parser.parse_args(each)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z][a-z-]*)", TEXT))
    assert {"demo", "test", "check"} <= targets
    for each in targets:
        assert re.search(rf"^{each}:", makefile, re.MULTILINE), each


def test_the_python_runs(monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    ast.parse(block)
    monkeypatch.chdir(ROOT)
    with FakeServer() as server:
        exec(block.replace("127.0.0.1:8470", server.address), {})
        assert [each.header.name for each in server.uploads] == ["sort"]
    assert capsys.readouterr().out == "=olleh"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def test_the_table_of_methods_is_what_the_parsers_say():
    assert methods.between_markers(TEXT, served()) == TEXT, "`make methods` writes it again"


def test_the_readme_is_read_in_one_sitting():
    # a table is looked up, not read, and so is the list of files
    before, after = TEXT.split(methods.BEGIN)[0], TEXT.split(methods.END)[1]
    assert len((before + after).replace(section("Layout"), "").splitlines()) < 200
    # rows of tables and links are as long as they are
    assert max(len(line) for line in section("Layout").splitlines()) <= 120
