"""Formats of weft's own that change parameters compute what a model computes whose parameters were changed by hand."""

import pytest

from tests.adapters_store.native_blocks import TOLERANCE, applied, compare, compiled
from tests.support.methods import native_deltas, native_glora, native_said, native_tokens, native_vectors
from tests.support.methods.case import ALL, Case, WholePass

MODULES = (native_vectors, native_deltas, native_said, native_glora, native_tokens)
CASES = {case.name: case for module in MODULES for case in module.CASES}
# those whose oracle changes more than parameters
HOOKED = [name for name in CASES if name.startswith("difffit")]
PAIRS = [(name, family) for name, case in CASES.items() for family in case.families if name not in HOOKED]


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


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", HOOKED)
def test_scales_of_sublayers_end_up_in_what_ends_them(name, family, tmp_path):
    case = CASES[name]
    block = compiled(family, case.make(family, tmp_path, 3))
    prompt, tokens = [5, 9, 33, 17, 60], [9, 41, 7]
    wanted = case.oracle(family, tmp_path).logits(prompt, tokens)
    got = WholePass(applied(block, family)).logits(prompt, tokens)
    size = 1 + float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= 1e-5 * size
    other = case.oracle(family, case.make(family, tmp_path / "other", 4)).logits(prompt, tokens)
    assert float((got - other).abs().max()) > 1e-2 * size
