"""The promise: every request gets the tokens that peft, or the bare model, generates for it, in any company."""

from pathlib import Path

import pytest
import torch

from tests.support import adapters
from tests.support.backbones import FAMILIES, VOCABULARY, build
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine

NEW_TOKENS = 12
# a first difference is forgiven, counted and printed where the oracle itself hardly prefers its token
TIE = 1e-4


class Family:
    """A family's engine with one adapter of every kind, and peft's answers."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        store = folder / "store"
        config = EngineConfig(
            model=name,
            store=str(store),
            adapter_memory_bytes_max=8 << 20,
            kv_bytes_max=4 << 20,
            batch_tokens_max=24,
            batch_requests_max=20,
        )
        self.offline = OfflineEngine(config, Backbone(build(name)))
        self.digests: dict[str, Digest] = {}
        self.oracles = {"base": adapters.oracle(name, None)}
        for seed, kind in enumerate(adapters.KINDS):
            made = adapters.make(kind, name, folder / kind, seed)
            self.digests[kind] = self.offline.register(kind, made)
            self.oracles[kind] = adapters.oracle(name, made)

    def submit(self, id: str, kind: str, prompt: tuple[int, ...]) -> Submit:
        return Submit(RequestId(id), prompt, NEW_TOKENS, adapter=self.digests.get(kind))

    def expect(self, kind: str, prompt: tuple[int, ...], tokens: list[int], ties: list[str]) -> bool:
        """Whether the oracle would have gone the same way at every step."""
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            logits = self.oracles[kind](input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        for step, token in enumerate(tokens):
            top = logits[step].topk(2)
            if top.indices[0] == token:
                continue
            margin = float(top.values[0] - logits[step][token])
            if margin >= TIE * float(logits[step].abs().max()):
                return False
            ties.append(f"{self.name}/{kind} step {step} margin {margin:.1e}")
        return True


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of mixed lengths, some longer than a step's token budget."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


@pytest.mark.parametrize("kind", ["base", *adapters.KINDS])
def test_tokens_equal_the_oracles_alone(family, kind):
    ties: list[str] = []
    for i, prompt in enumerate(prompts(2, seed=len(kind))):
        tokens = family.offline.run([family.submit(str(i), kind, prompt)])[RequestId(str(i))]
        assert len(tokens) == NEW_TOKENS
        assert family.expect(kind, prompt, tokens, ties), f"{kind} on {prompt}: got {tokens}"
    print("ties:", ties)


def test_tokens_equal_the_oracles_in_a_mixed_batch(family):
    kinds = ["base", *adapters.KINDS] * 2
    asked = {f"{kind}-{i}": (kind, p) for i, (kind, p) in enumerate(zip(kinds, prompts(len(kinds), 5), strict=True))}
    answers = family.offline.run([family.submit(id, *request) for id, request in asked.items()])
    ties: list[str] = []
    wrong = [id for id, (kind, p) in asked.items() if not family.expect(kind, p, answers[RequestId(id)], ties)]
    print("ties:", ties)
    assert not wrong


def test_a_swapped_adapter_shows(family):
    """The control: judged by the oracle of another adapter, the answers must fail."""
    kinds = ["base", *adapters.KINDS]
    asked = {f"{kind}-{i}": (kind, prompt) for kind in kinds for i, prompt in enumerate(prompts(4, seed=9))}
    answers = family.offline.run([family.submit(id, *request) for id, request in asked.items()])
    for kind, other in zip(kinds, kinds[1:] + kinds[:1], strict=True):
        mine = [(p, answers[RequestId(id)]) for id, (k, p) in asked.items() if k == kind]
        same = [family.expect(other, prompt, tokens, []) for prompt, tokens in mine]
        assert not all(same), f"{kind} answers like {other}"


def test_greedy_base_equals_generate(family):
    """The oracle above replays logits; this one is transformers' own loop."""
    model = family.oracles["base"]
    for prompt in prompts(3, seed=3):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            want = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None,
            )[0, len(prompt):].tolist()  # fmt: skip
        assert family.offline.run([family.submit("g", "base", prompt)])[RequestId("g")] == want
