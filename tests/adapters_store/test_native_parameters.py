"""Formats of weft's own that change parameters compute what a model computes whose parameters were changed by hand."""

import pytest

from tests.adapters_store.native_blocks import TOLERANCE, compare, compiled
from tests.support.methods import native_deltas, native_vectors
from tests.support.methods.case import Case, WholePass

CASES = {case.name: case for case in (*native_vectors.CASES, *native_deltas.CASES)}
PAIRS = [(name, family) for name, case in CASES.items() for family in case.families]


def changed(case: Case, family: str, folder):
    """The model that the case's oracle runs."""
    oracle = case.oracle(family, folder)
    assert isinstance(oracle, WholePass)
    return oracle.model


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_block_holds_what_was_changed_by_hand(name, family, tmp_path):
    case = CASES[name]
    folder = case.make(family, tmp_path, 3)
    block = compiled(family, folder)
    found = compare(block, changed(case, family, folder))
    assert found.error <= TOLERANCE
    assert found.change >= 100 * TOLERANCE, "an adapter that changes nothing proves nothing"
    assert found.changed


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_another_adapter_of_the_same_shape_fails_the_comparison(name, family, tmp_path):
    case = CASES[name]
    block = compiled(family, case.make(family, tmp_path / "a", 3))
    found = compare(block, changed(case, family, case.make(family, tmp_path / "b", 4)))
    assert found.error > 1e-2
