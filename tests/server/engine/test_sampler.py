"""Sampling: greedy, kept sets, determinism by seed and position, and rows that hold no number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.server.engine.messages import Sampling
from weft.server.engine.sampler import pick, uniform


def test_temperature_zero_takes_the_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert pick(logits, [Sampling()] * 2, [4, 9]) == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gets_no_token_and_its_neighbour_does(bad, temperature):
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 9.0, 1.0]])
    sampling = Sampling(temperature=temperature, top_k=1)
    assert pick(logits, [sampling] * 2, [1, 1]) == [None, 1]


@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000))
def test_a_draw_depends_on_its_own_row_seed_and_position_alone(seed, position):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, generator=generator)
    sampling = Sampling(temperature=1.0, seed=seed)
    alone = pick(logits[2:3], [sampling], [position])[0]
    neighbours = [Sampling(temperature=2.0, seed=1), Sampling(), sampling, Sampling(temperature=0.1, seed=seed)]
    assert pick(logits, neighbours, [position + 1, 0, position, 7])[2] == alone


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    sampling = [Sampling(temperature=1.0, seed=7)] * 4000
    drawn = pick(probabilities.log().expand(4000, 3), sampling, list(range(4000)))
    counts = torch.bincount(torch.tensor(drawn), minlength=3) / 4000
    # four standard deviations: false alarm below 1 in 5000, and the seed is fixed
    assert (counts - probabilities).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(300, 4)
    by_k = pick(logits, [Sampling(temperature=1.0, top_k=2, seed=3)] * 300, list(range(300)))
    assert set(by_k) == {0, 1}
    by_p = pick(logits, [Sampling(temperature=1.0, top_p=0.65, seed=3)] * 300, list(range(300)))
    assert set(by_p) == {0, 1}
    tiny = pick(logits, [Sampling(temperature=1.0, top_p=1e-6, seed=3)] * 300, list(range(300)))
    assert set(tiny) == {0}


def whole_sort(logits: torch.Tensor, choice: Sampling, position: int) -> int:
    """What one row gives by sorting all of it."""
    order = torch.argsort(logits, descending=True, stable=True)
    sums = torch.softmax(logits.double() / choice.temperature, dim=0)[order].cumsum(0)
    kept = sums[: int((sums < choice.top_p).sum()) + 1]
    return int(order[min(int((kept <= uniform(choice.seed, position) * kept[-1]).sum()), len(kept) - 1)])


@pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0])
@pytest.mark.parametrize("levels", [4, 1 << 20])
def test_sorting_a_part_gives_what_sorting_all_does(temperature, levels):
    # few levels: most tokens are as likely as others, at the end of what is sorted first too
    logits = (torch.randn(40, 3000, generator=torch.Generator().manual_seed(1)) * levels).round() / levels * 3
    sampling = [Sampling(temperature=temperature, top_p=0.02 + i / 41, seed=i) for i in range(40)]
    found = pick(logits, sampling, list(range(40)))
    assert found == [whole_sort(row, choice, i) for i, (row, choice) in enumerate(zip(logits, sampling, strict=True))]


def test_equal_logits_are_taken_in_the_order_of_their_ids():
    logits = torch.zeros(50, 1000)
    by_k = pick(logits, [Sampling(temperature=1.0, top_k=1, top_p=0.5)] * 50, list(range(50)))
    assert set(pick(logits, [Sampling(temperature=1.0, top_p=0.0009)] * 50, list(range(50)))) == {0}
    assert len(set(by_k)) == 1


def test_uniform_numbers_differ_by_seed_and_by_position():
    found = {uniform(seed, position) for seed in range(20) for position in range(20)}
    assert len(found) == 400
    assert all(0 <= value < 1 for value in found)
