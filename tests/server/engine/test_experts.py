"""Adapters inside experts, alone and among rows that have none of it, against peft."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.support.backbones import build
from tests.support.company import COMPANY, Company
from tests.support.families import CHANGE, NEW_TOKENS, Family, problem, prompts
from tests.support.methods.case import Oracle, WholePass
from tests.support.methods.peft_experts import CASES, MIXTRAL
from weft.adapters_store.composition import derive
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine

BOTH, ONE, ATTENTION = (case.name for case in CASES)


class Experts:
    """An engine over a mixture of experts, every case registered, and what the oracles say."""

    def __init__(self, folder: Path, half: bool = False):
        config = EngineConfig(
            model=MIXTRAL,
            store=str(folder / "store"),
            adapter_memory_bytes_max=8 << 20,
            kv_bytes_max=1 << 20,
            batch_tokens_max=40,
            batch_requests_max=16,
        )
        self.offline = OfflineEngine(config, Backbone(build(MIXTRAL).bfloat16() if half else build(MIXTRAL)))
        self.oracles: dict[str | None, Oracle] = {None: WholePass(build(MIXTRAL))}
        self.digests: dict[str, Digest] = {}
        for seed, case in enumerate(CASES):
            made = case.make(MIXTRAL, folder / case.name, seed)
            self.digests[case.name] = self.offline.register(case.name, made)
            self.oracles[case.name] = case.oracle(MIXTRAL, made)

    def run(self, asked: list[tuple[str | None, tuple[int, ...]]]) -> list[list[int]]:
        """Tokens of requests, all in one batch."""
        submits = [
            Submit(RequestId(str(i)), prompt, NEW_TOKENS, adapter=None if name is None else self.digests[name])
            for i, (name, prompt) in enumerate(asked)
        ]
        answers = self.offline.run(submits)
        return [answers[submit.id] for submit in submits]


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Experts:
    return Experts(tmp_path_factory.mktemp(MIXTRAL))


@pytest.mark.parametrize("name", [BOTH, ONE])
def test_alone(experts, name):
    for prompt in prompts(3, len(name)):
        (tokens,) = experts.run([(name, prompt)])
        assert problem(experts.oracles[name], prompt, tokens) is None
        base, own = (experts.oracles[each].logits(prompt, tokens) for each in (None, name))
        assert (own - base).abs().max() >= CHANGE * base.abs().max(), "it proves nothing"


def test_among_rows_of_others(experts):
    """Prompts longer than a batch are cut among them."""
    names = [BOTH, None, ONE, ATTENTION, BOTH, None, ONE, ATTENTION, BOTH, ONE]
    asked = list(zip(names, prompts(len(names), 11), strict=True))
    answers = experts.run(asked)
    for (name, prompt), tokens in zip(asked, answers, strict=True):
        assert problem(experts.oracles[name], prompt, tokens) is None
    # the control: judged by another's oracle, answers fail
    followers = names[1:] + names[:1]
    wrong = [
        problem(experts.oracles[other], prompt, tokens) is None
        for (_, prompt), tokens, other in zip(asked, answers, followers, strict=True)
    ]
    assert sum(wrong) <= 1


def test_weighted_and_with_another_inside_the_same_experts(experts):
    named = [(experts.digests[BOTH], 0.5), (experts.digests[ONE], 1.0)]
    digest, members = derive(named)
    kept = tuple((Digest(member), weight) for member, weight in members)
    ids = torch.tensor([prompts(1, 4)[0]])
    prompt = tuple(ids[0].tolist())
    assert digest is not None
    answers = experts.offline.run([Submit(RequestId("r"), prompt, NEW_TOKENS, adapter=Digest(digest), members=kept)])
    tokens = answers[RequestId("r")]
    assert problem(_sum(experts, 0.5), prompt, tokens) is None
    assert problem(experts.oracles[BOTH], prompt, tokens) is not None


def _sum(experts: Experts, weight: float) -> Oracle:
    """The base with what both adapters change in its weights added, the first one's times the weight."""
    base = build(MIXTRAL)
    plain = {name: value.clone() for name, value in base.named_parameters()}
    for name, times in ((BOTH, weight), (ONE, 1.0)):
        oracle = experts.oracles[name]
        assert isinstance(oracle, WholePass)
        for path, value in _merged(oracle.model).items():
            with torch.no_grad():
                base.get_parameter(path).add_((value - plain[path]) * times)
    return WholePass(base)


def _merged(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    copied = deepcopy(model)
    assert isinstance(copied, PeftModel)
    return dict(copied.merge_and_unload().named_parameters())


def test_in_half_precision(tmp_path):
    half = Experts(tmp_path, half=True)
    for prompt in prompts(3, 2):
        (tokens,) = half.run([(BOTH, prompt)])
        assert len(tokens) == NEW_TOKENS
        for row, token in zip(half.oracles[BOTH].logits(prompt, tokens), tokens, strict=True):
            assert row.max() - row[token] <= 0.1 * row.abs().max()


def test_no_row_sees_what_others_carry_inside_experts(tmp_path):
    """Bit for bit, in batches of one shape: inside the last layer, so that routing stays what it is."""
    company = Company(Family(MIXTRAL, tmp_path))
    base, every = company.prompted([None] * COMPANY), company.prompted([ONE] * COMPANY)
    for carrying in (COMPANY - 1, 3, 0):
        mixed = company.prompted([ONE if i == carrying else None for i in range(COMPANY)])
        for i in range(COMPANY):
            want, other = (every, base) if i == carrying else (base, every)
            assert torch.equal(mixed[i], want[i])
            assert not torch.equal(mixed[i], other[i])
