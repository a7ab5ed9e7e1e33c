"""The promise, method by method: the logits of an oracle written apart, alone and among all the others.

And the promise of isolation, bit for bit: in batches of one shape no row sees what others carry, neither in pieces of
prompts nor in steps in which every sequence has one row, over keys and values that are kept.
"""

from collections.abc import Sequence

import pytest
import torch

from tests.support.company import Company
from tests.support.families import CASES, CHANGE, NEW_TOKENS, PAIRS, TOLERANCE, Answer, Family, prompts
from tests.support.methods.case import ALL
from weft.adapters_store.traits import traits_of
from weft.kernels.extras import Kind

# the sequence that is watched while its neighbours change
WATCHED = 4


class Prepared(Family):
    """A family, its answers in one batch, and its company."""

    answers: dict[str, Answer]
    company: Company


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made: dict[str, Prepared] = {}

    def family(name: str) -> Prepared:
        if name not in made:
            made[name] = Prepared(name, tmp_path_factory.mktemp(name))
            made[name].answers = made[name].together(made[name].names)
            made[name].company = Company(made[name])
        return made[name]

    return family


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_method_alone(families, family, method):
    family = families(family)
    oracle = family.oracle(method)
    prompt = CASES[method].prompt(prompts(1, seed=len(method))[0])
    answer = family.run({"alone": (family.digest(method), prompt)})["alone"]
    assert len(answer.tokens) == NEW_TOKENS
    assert answer.distance(oracle) <= TOLERANCE
    assert answer.problem(oracle) is None
    assert answer.distance(family.base) >= CHANGE, "it proves nothing"


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_method_among_all_others(families, family, method):
    """Two adapters of it stand in the batch; the control: each fails by the other's oracle."""
    family = families(family)
    for twin in (0, 1):
        answer = family.answers[f"{method}-{twin}"]
        assert answer.distance(family.oracle(method, twin)) <= TOLERANCE
        assert answer.problem(family.oracle(method, twin)) is None
        assert answer.distance(family.oracle(method, 1 - twin)) >= CHANGE, "a swap would not show"


@pytest.mark.parametrize("family", ALL)
def test_rows_of_the_base_among_all_methods(families, family):
    family = families(family)
    answer = family.answers["base"]
    assert answer.distance(family.base) <= TOLERANCE
    assert answer.problem(family.base) is None


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_neighbours_change_nothing(families, family, method, monkeypatch):
    company = families(family).company
    mixed = company.of(method)
    own, *others = mixed
    row = company.prompted(mixed)[0]
    assert torch.equal(company.prompted([own, *([None] * len(others))])[0], row), "beside rows of the base"
    assert torch.equal(company.prompted([own, *others[::-1]])[0], row), "beside others"
    # the control: it is not the base's row
    acts_later = traits_of(company.block(method).directory).token_mask
    assert acts_later or not torch.equal(company.base(monkeypatch)[0][0], row)


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_neighbours_change_nothing_while_decoding(families, family, method, monkeypatch):
    company = families(family).company
    own, *others = company.of(method)

    def row(others: Sequence[str | None]) -> torch.Tensor:
        decoded: torch.Tensor = company.decoded([*others[:WATCHED], own, *others[WATCHED:]], monkeypatch)
        return decoded[WATCHED]

    want = row(others)
    assert torch.equal(row([None] * len(others)), want), "beside rows of the base"
    assert torch.equal(row(others[::-1]), want), "beside others"
    assert torch.equal(row([own, None] * (len(others) // 2) + [own]), want), "beside rows of its own"
    # the control: it is not the base's row, unless all of the adapter stands in front of the text
    directory = company.block(method).directory
    only_in_front = directory.kinds == {Kind.SOFT} and not directory.sites.any()
    assert only_in_front == torch.equal(company.base(monkeypatch)[1][WATCHED], want)
