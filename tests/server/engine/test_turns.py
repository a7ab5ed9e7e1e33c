"""Adapters of every kind in an arena that holds a few of them: leaving and coming back changes no bit."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.families import TOLERANCE, Answer, Family, prompts
from tests.support.methods.case import LLAMA
from tests.support.methods.peft_experts import MIXTRAL
from weft.adapters_store.leases import ResidencyStats

# one for each way in which an adapter lies in memory; of some there are two, which share a bank or a slot
METHODS: Mapping[str, Sequence[str]] = {
    LLAMA: (
        "lora",
        "dora",
        "vera",
        "ia3",
        "krona_terms",
        "norm",
        "shira",
        "rows",
        "columns",
        "dense",
        "bottleneck_gated_compacter",
        "prefix_tuning",
        "prompt_tuning",
        "trainable_tokens",
        "hub_unipelt",
        "lst",
    ),
    MIXTRAL: ("lora_experts", "lora_experts_one", "lora_beside_experts"),
}
# of the arena: the largest of them and a few more
BYTES = {LLAMA: 120 << 10, MIXTRAL: 28 << 10}
PROMPT = prompts(1, 2)[0]


class Turns(Family):
    """A family, and what each of its adapters answered when it was first asked."""

    first: dict[tuple[str, int], Answer]
    evictions: int

    def alone(self, name: str, twin: int) -> Answer:
        return self.run({"alone": (self.digest(name, twin), PROMPT)})["alone"]

    def count_evictions(self) -> None:
        """Add up in ``evictions`` what every step says from now on."""
        residency, self.evictions = self.offline.engine.residency, 0
        stats = residency.stats

        def counted() -> ResidencyStats:
            said = stats()
            self.evictions += said.evictions
            return said

        setattr(residency, "stats", counted)  # noqa: B010


@pytest.fixture(scope="module", params=METHODS)
def turns(request, tmp_path_factory) -> Turns:
    made = Turns(request.param, tmp_path_factory.mktemp(request.param), adapter_bytes=BYTES[request.param])
    made.count_evictions()
    made.names = list(METHODS[request.param])
    made.first = {(name, twin): made.alone(name, twin) for name in made.names for twin in (0, 1)}
    return made


def test_all_of_them_come_back_as_they_were(turns):
    sizes = [turns.offline.catalog.get(f"{name}-{twin}").report.device_bytes for name, twin in turns.first]
    assert sum(sizes) > 2 * turns.offline.engine.arena.buffer.numel()
    before = turns.evictions
    for (name, twin), answer in turns.first.items():
        assert answer.distance(turns.oracle(name, twin)) <= TOLERANCE, name
        assert torch.equal(turns.alone(name, twin).logits, answer.logits), name
    assert turns.evictions - before >= len(turns.names)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_whoever_was_there_meanwhile_an_adapter_answers_alike(turns, data):
    one = st.tuples(st.sampled_from(turns.names), st.integers(0, 1))
    watched = data.draw(one)
    for company in data.draw(st.lists(st.lists(one, min_size=1, max_size=3), max_size=3)):
        asked = {str(i): (turns.digest(*each), PROMPT) for i, each in enumerate(company)}
        answers = turns.run(asked)
        for i, each in enumerate(company):
            want = turns.first[each]
            assert answers[str(i)].tokens == want.tokens, each
            off = (answers[str(i)].logits - want.logits).abs().max()
            assert off <= TOLERANCE / 10 * want.logits.abs().max(), each
    assert torch.equal(turns.alone(*watched).logits, turns.first[watched].logits)
    turns.offline.engine.residency.check()


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_registering_again_changes_nothing(turns, data):
    name, twin = data.draw(st.tuples(st.sampled_from(turns.names), st.integers(0, 1)))
    again = data.draw(st.sampled_from([f"{name}-{twin}", f"other-{len(turns.offline.catalog.names())}"]))
    turns.alone(name, twin)
    used = turns.offline.engine.arena.used_bytes
    assert turns.offline.register(again, turns.folder_of(name, twin)) == turns.digest(name, twin)
    assert turns.offline.engine.arena.used_bytes == used
    assert torch.equal(turns.alone(name, twin).logits, turns.first[name, twin].logits)
