"""The promise, method by method: the tokens that an oracle written apart generates, alone and among all the others."""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.support import methods
from tests.support.backbones import VOCABULARY, build
from tests.support.methods.case import ALL, Case, Oracle, WholePass
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine

NEW_TOKENS = 8
# of the largest logit: how far the engine's sums may lie from the oracle's, and a first difference that is forgiven
TOLERANCE = 1e-4
# what an adapter has to change to prove anything
CHANGE = 100 * TOLERANCE


def _cases() -> dict[str, Case]:
    modules = [importlib.import_module(f"{methods.__name__}.{m.name}") for m in pkgutil.iter_modules(methods.__path__)]
    found = [case for module in modules for case in getattr(module, "CASES", ())]
    assert len({case.name for case in found}) == len(found), "case names are ids"
    return {case.name: case for case in found}


CASES = _cases()
PAIRS = [(family, name) for family in ALL for name, case in CASES.items() if family in case.families]


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


class Family:
    """A family's engine with an adapter of every method that applies to it, and what the oracles say."""

    def __init__(self, name: str, folder: Path):
        self.name, self._folder = name, folder
        config = EngineConfig(
            model=name,
            store=str(folder / "store"),
            adapter_memory_bytes_max=64 << 20,
            kv_bytes_max=4 << 20,
            batch_tokens_max=320,
            batch_requests_max=160,
        )
        self.offline = OfflineEngine(config, Backbone(build(name)))
        self.base = WholePass(build(name))
        self._made: dict[str, tuple[Digest, Oracle]] = {}
        self._mixed: dict[str, tuple[tuple[int, ...], list[int]]] = {}

    def adapter(self, name: str) -> tuple[Digest, Oracle]:
        """The version of a case, registered when it is first asked for, and its oracle."""
        if name not in self._made:
            folder = CASES[name].make(self.name, self._folder / name, sum(name.encode()))
            self._made[name] = self.offline.register(name, folder), CASES[name].oracle(self.name, folder)
        return self._made[name]

    def run(self, asked: dict[str, tuple[str | None, tuple[int, ...]]]) -> dict[str, list[int]]:
        """Tokens of requests, all in one batch: id → (case, prompt)."""
        submits = [
            Submit(RequestId(id), prompt, NEW_TOKENS, adapter=None if name is None else self.adapter(name)[0])
            for id, (name, prompt) in asked.items()
        ]
        return {str(id): tokens for id, tokens in self.offline.run(submits).items()}

    def mixed(self, name: str) -> tuple[tuple[int, ...], list[int]]:
        """Prompt and tokens of a case out of one batch of all cases that apply and rows of the base."""
        if not self._mixed:
            names: list[str | None] = [case for family, case in PAIRS if family == self.name]
            names += [None, None]
            asked = {
                f"{n}": (n, p if n is None else CASES[n].prompt(p))
                for n, p in zip(names, prompts(len(names), 5), strict=True)
            }
            answers = self.run(asked)
            self._mixed = {id: (prompt, answers[id]) for id, (_, prompt) in asked.items()}
        return self._mixed[name]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made: dict[str, Family] = {}

    def family(name: str) -> Family:
        if name not in made:
            made[name] = Family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return family


def problem(oracle: Oracle, prompt: Sequence[int], tokens: Sequence[int]) -> str | None:
    """How the tokens differ from what the oracle would have picked; ties of its own are forgiven."""
    logits = oracle.logits(prompt, tokens)
    for step, token in enumerate(tokens):
        best = logits[step].max()
        if best - logits[step][token] > TOLERANCE * logits[step].abs().max():
            return f"step {step}: expected {int(logits[step].argmax())}, got {token} of {list(tokens)}"
    return None


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_method_alone(families, family, method):
    family = families(family)
    oracle = family.adapter(method)[1]
    for i, plain in enumerate(prompts(2, seed=len(method))):
        prompt = CASES[method].prompt(plain)
        tokens = family.run({str(i): (method, prompt)})[str(i)]
        assert len(tokens) == NEW_TOKENS
        assert problem(oracle, prompt, tokens) is None
        change = (oracle.logits(prompt, tokens) - family.base.logits(prompt, tokens)).abs().max()
        assert change >= CHANGE * family.base.logits(prompt, tokens).abs().max(), "it proves nothing"


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_method_among_all_others(families, family, method):
    family = families(family)
    prompt, tokens = family.mixed(method)
    assert problem(family.adapter(method)[1], prompt, tokens) is None


@pytest.mark.parametrize("family", ALL)
def test_rows_of_the_base_among_all_methods(families, family):
    family = families(family)
    prompt, tokens = family.mixed("None")
    assert problem(family.base, prompt, tokens) is None


@pytest.mark.parametrize("family", ALL)
def test_a_swapped_adapter_shows(families, family):
    """The control: judged by the oracle of another method, answers must fail."""
    family = families(family)
    names = [name for of, name in PAIRS if of == family.name]
    same = []
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        prompt, tokens = family.mixed(name)
        if problem(family.adapter(other)[1], prompt, tokens) is None:
            same.append((name, other))
    # eight tokens of a small vocabulary agree by chance now and then
    assert len(same) <= len(names) // 8, same
