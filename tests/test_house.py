"""The house rules of the repository, kept by tests: rooms, sizes, names, packaging."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from weft.adapters_store.formats import PARSERS, served

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("proto", "kernels", "adapters_store", "server", "bench")
MAY_IMPORT = {
    "proto": {"proto"},
    "kernels": {"kernels"},
    "adapters_store": {"adapters_store", "kernels"},
    "server": {"server", "adapters_store", "kernels", "proto", "client"},
    "client": {"client", "proto"},
    "bench": {"bench", "server", "adapters_store", "kernels", "proto", "client"},
}
# methods named like what arithmetic is full of
ORDINARY = {"bottleneck", "dense", "far", "miss", "norm", "parallel", "rows", "said", "sparse", "union"}


def method_names() -> re.Pattern[str]:
    """Every method that a parser serves, as its files and its paper call it, alone or as part of a name."""
    names = {method.removeprefix("X_").lower() for method in PARSERS}
    for each in served():
        if one := re.fullmatch(r"([A-Za-z0-9-]+)( adapter)?", each.name):
            names.add(one[1].lower().replace("-", "_?"))
    # an underscore ends a name as a space does
    return re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(names - ORDINARY))})s?(?![a-z0-9])", re.IGNORECASE)


def tracked(pattern: str = "*") -> list[Path]:
    """Files of the working tree that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def sources(*rooms: str) -> list[Path]:
    """Hand-written Python files of these rooms."""
    return [
        p for p in tracked("*.py")
        if p.relative_to(ROOT).parts[0] in rooms and "_pb2" not in p.name
    ]  # fmt: skip


def room_of(path: Path) -> str:
    """The room that a source file belongs to."""
    parts = path.relative_to(ROOT).parts
    return "client" if parts[:2] == ("server", "client") else parts[0]


def imported(path: Path) -> set[str]:
    """Rooms that a file imports from, at any level of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("weft.")}
    return found


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_rooms_import_one_way_only(room):
    files = [path for path in sources(*ROOMS) if room_of(path) == room]
    wrong = {str(p.relative_to(ROOT)): extra for p in files if (extra := imported(p) - MAY_IMPORT[room])}
    assert not wrong


def test_the_engine_knows_nothing_of_grpc():
    for path in sources("server"):
        if path.relative_to(ROOT).parts[1] in ("engine", "backbone"):
            assert "grpc" not in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE), path


def test_no_method_is_known_to_engine_backbone_or_kernels():
    wrong, methods = {}, method_names()
    for path in sources("server", "kernels"):
        parts = path.relative_to(ROOT).parts
        if parts[0] == "kernels" or parts[1] in ("engine", "backbone"):
            found = methods.findall(path.read_text())
            if found:
                wrong[str(path.relative_to(ROOT))] = found
    assert not wrong


@pytest.mark.parametrize(
    "text", ["lora_x", "apply_dora(", "x = IA3", "prefix_tuning", "ln_tuning", "rsLoRA", "houlsby", "QALoRA", "boft"]
)
def test_a_method_is_known_by_any_of_its_spellings(text):
    assert method_names().search(text)


@pytest.mark.parametrize("text", ["explorations", "as far as that", "rows", "a miss", "often", "a soft cap"])
def test_ordinary_words_are_no_methods(text):
    assert not method_names().search(text)


def test_a_file_fits_in_one_sitting():
    long = {
        str(p.relative_to(ROOT)): n for p in sources(*ROOMS, "tests") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def test_every_file_says_what_it_is_for():
    silent = [
        str(p.relative_to(ROOT))
        for p in sources(*ROOMS, "tests")
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent


def test_nothing_shadows_the_packages_called_kernels_and_proto():
    assert not [room for room in (".", "kernels", "proto") if (ROOT / room / "__init__.py").exists()]


def test_transformers_imports_from_the_repository_root():
    done = subprocess.run(
        [sys.executable, "-c", "from transformers import LlamaForCausalLM"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_repository_speaks_of_the_project_alone():
    words = re.compile("|".join(("/wo" + "rk/", "bash" + "_jobs", r"[.]lib" + "rary")))
    texts = [p for p in tracked() if p.suffix in {".py", ".md", ".toml", ".txt", ".proto", ".json", ".yml", ""}]
    wrong = [str(p.relative_to(ROOT)) for p in texts if words.search(p.read_text(errors="ignore"))]
    assert not wrong


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tracked files so that nothing untracked can slip in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    code = (
        "import os, sys; os.chdir(sys.argv[1]);"
        "from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, source, out], check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_weft_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"weft"}


def test_the_wheel_holds_every_source_file(wheel):
    packaged = set(wheel.namelist())
    for path in tracked():
        parts = path.relative_to(ROOT).parts
        if parts[0] not in ROOMS or path.suffix not in {".py", ".pyi", ".proto", ".json", ".safetensors"}:
            continue
        if parts[:2] == ("proto", "generate.py"):
            continue
        name = "/".join(("weft", *(("client", *parts[2:]) if parts[:2] == ("server", "client") else parts)))
        assert name in packaged, f"{os.sep.join(parts)} is not in the wheel"
