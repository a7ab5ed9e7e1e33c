"""What parsers say of themselves is complete: none is silent, and nothing is said to be served that is not read."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from weft.adapters_store import formats
from weft.adapters_store.formats import PARSERS, served
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.refused import REFUSED

MODULES = sorted(path.stem for path in Path(formats.__file__).parent.glob("*.py") if path.stem != "__init__")


def said_by(module: str) -> tuple[Served, ...]:
    """The rows of one file, none where it is no parser."""
    rows: tuple[Served, ...] = getattr(import_module(f"{formats.__name__}.{module}"), "SERVES", ())
    return rows


@pytest.mark.parametrize("method", sorted(PARSERS))
def test_every_parser_says_what_it_serves(method):
    module = PARSERS[method].__module__.rpartition(".")[2]
    assert any(method in row.format for row in said_by(module)), f"{module} says nothing of {method}"


def test_what_is_served_comes_from_parsers_that_are_reached():
    """A file with SERVES that no table of parsers imports would be a promise that nobody keeps."""
    code = f"import sys, {formats.__name__}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" not in loaded
    speaking = {f"{formats.__name__}.{module}" for module in MODULES if said_by(module)}
    assert speaking - loaded == set()


def test_every_row_is_listed_once_and_the_survey_stands_first():
    rows = served()
    assert sorted(rows, key=repr) == sorted((row for module in MODULES for row in said_by(module)), key=repr)
    assert len({(row.name, row.format) for row in rows}) == len(rows)
    assert [row.survey for row in rows] == sorted((row.survey for row in rows), reverse=True)


def test_every_row_is_complete():
    for row in served():
        assert row.name, row
        assert row.reference, row
        assert row.operators, row
        assert row.format, row
        assert not any("|" in text or "\n" in text for text in (row.name, row.format, row.operators, row.refuses)), row


def test_what_a_row_counts_as_is_a_method_of_a_row():
    rows = served()
    own = {row.name for row in rows if row.method == row.name}
    assert {row.method for row in rows} <= own
    assert len({name.lower() for name in own}) == len(own)
    starts = {"QLoRA", "KaSA", "rsLoRA", "LoRA of embeddings", "LoRA of experts", "whole modules"}
    assert {row.name for row in rows if row.method == "LoRA"} == {"LoRA", *starts}


def test_nothing_is_served_and_refused():
    assert REFUSED
    assert set(REFUSED).isdisjoint(PARSERS)
    assert all(REFUSED.values())
