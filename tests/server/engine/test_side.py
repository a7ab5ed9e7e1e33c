"""Networks beside the backbone in an engine: cut prompts, small pages, company, composition, and what they hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tests.support.backbones import VOCABULARY, build
from tests.support.families import problem, prompts
from tests.support.methods.case import ALL, LLAMA, Oracle, WholePass
from tests.support.methods.native_side import CASES, BesidePass
from tests.support.methods.peft_lora import CASES as LOW_RANK
from weft.adapters_store.composition import derive
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Abort, Digest, Failed, Failure, RequestId, Submit
from weft.server.engine.offline import OfflineEngine, RequestFailed

LST, LAST = CASES
LORA = next(case for case in LOW_RANK if case.name == "lora")
PROMPT, NEW_TOKENS, REDUCTION = 19, 8, 2


class Small:
    """An engine whose steps hold seven tokens and whose pages hold four."""

    def __init__(self, family: str, folder: Path, **limits: Any):
        said: dict[str, Any] = {"kv_bytes_max": 1 << 20, "page_tokens": 4, "batch_tokens_max": 7} | limits
        config = EngineConfig(
            model=family, store=str(folder / "store"), adapter_memory_bytes_max=8 << 20, batch_requests_max=4, **said
        )
        self.offline = OfflineEngine(config, Backbone(build(family)))
        self.pages = self.offline.engine.pages
        self.oracles: dict[str, Oracle] = {"base": WholePass(build(family))}
        self.digests: dict[str, Digest] = {}
        for seed, case in enumerate((LST, LAST, LORA)):
            made = case.make(family, folder / case.name, seed)
            self.digests[case.name] = self.offline.register(case.name, made)
            self.oracles[case.name] = case.oracle(family, made)

    def submit(self, id: str, prompt: tuple[int, ...], *names: str, weight: float = 1.0) -> Submit:
        digest, members = derive([(self.digests[name], weight) for name in names])
        kept = tuple((Digest(member), w) for member, w in members)
        return Submit(
            RequestId(id), prompt, NEW_TOKENS, adapter=None if digest is None else Digest(digest), members=kept
        )

    def run(self, *submits: Submit) -> list[list[int]]:
        answers = self.offline.run(submits)
        assert self.pages.used == 0
        return [answers[submit.id] for submit in submits]


@pytest.fixture(scope="module", params=ALL)
def small(request, tmp_path_factory) -> Small:
    return Small(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Small:
    return Small(LLAMA, tmp_path_factory.mktemp(LLAMA))


def text(seed: int, length: int = PROMPT) -> tuple[int, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCABULARY, (length,), generator=random).tolist())


def test_prompts_cut_into_chunks_among_others(small):
    names = [LST.name, LAST.name, LORA.name, "base", LST.name, LAST.name, "base", LST.name]
    lengths = [PROMPT, 11, 5, PROMPT, 3, 14, 2, 9]
    asked = [
        small.submit(str(i), text(i, length), *([] if name == "base" else [name]))
        for i, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]
    for submit, name, tokens in zip(asked, names, small.run(*asked), strict=True):
        assert len(tokens) == NEW_TOKENS
        assert problem(small.oracles[name], submit.prompt, tokens) is None, f"request {submit.id}"


def test_pages_that_others_have_used_change_nothing(llama):
    first = llama.run(llama.submit("1", text(1), LST.name))
    llama.run(*(llama.submit(str(i), text(i), LAST.name) for i in range(2, 5)))
    assert llama.run(llama.submit("1", text(1), LST.name)) == first


def _added(folder: Path) -> Oracle:
    """The side network over a model that the other adapter has changed."""
    beside = LST.oracle(LLAMA, folder / LST.name)
    changed = LORA.oracle(LLAMA, folder / LORA.name)
    assert isinstance(beside, BesidePass)
    assert isinstance(changed, WholePass)
    assert isinstance(changed.model, PeftModel)
    model = changed.model.double().get_base_model()
    assert isinstance(model, PreTrainedModel)
    return replace(beside, model=model)


@pytest.mark.parametrize("names", [(LORA.name, LST.name), (LST.name, LORA.name)], ids="-".join)
def test_with_another_adapter_it_reads_what_that_made(names, tmp_path):
    small = Small(LLAMA, tmp_path)
    oracle = _added(tmp_path)
    for i, prompt in enumerate(prompts(4, 7)):
        (tokens,) = small.run(small.submit(str(i), prompt, *names))
        assert problem(oracle, prompt, tokens) is None
    # the control: neither alone says the same
    prompt = text(3)
    (tokens,) = small.run(small.submit("r", prompt, *names))
    assert problem(small.oracles[LST.name], prompt, tokens) is not None
    assert problem(small.oracles[LORA.name], prompt, tokens) is not None


@pytest.mark.parametrize(("names", "weight"), [((LST.name, LAST.name), 1.0), ((LST.name,), 0.5)], ids=str)
def test_two_of_them_or_a_weight_are_refused(llama, names, weight):
    with pytest.raises(RequestFailed, match="a side network"):
        llama.run(llama.submit("r", text(0), *names, weight=weight))
    assert llama.pages.used == 0


def fails(batch: object) -> None:
    raise RuntimeError("broken")


@pytest.mark.parametrize("end", ["abort", "failure"])
def test_what_it_keeps_is_counted_and_let_go(llama, end, monkeypatch):
    engine = llama.offline.engine
    engine.handle(llama.submit("r", text(0), LST.name))
    engine.step()
    length = PROMPT + NEW_TOKENS
    kept = length + -(-length // REDUCTION)
    assert llama.pages.used == -(-kept // 4)
    # keys and values of both layers, and as many again for the network's two at half the width
    token_bytes = sum(heads * (key + value) for heads, key, value in engine.backbone.kv_shapes) * 4
    assert engine.stats().kv_bytes >= length * token_bytes * (1 + 1 / REDUCTION)
    if end == "abort":
        engine.handle(Abort(RequestId("r")))
    else:
        monkeypatch.setattr(engine.runner, "run", fails)
        assert any(isinstance(event, Failed) for event in engine.step())
    assert llama.pages.used == 0


def test_one_that_memory_cannot_hold_is_told_so(tmp_path):
    small = Small(LLAMA, tmp_path, kv_bytes_max=256 * 32)
    (plain,) = small.run(small.submit("1", text(0)))
    assert len(plain) == NEW_TOKENS
    with pytest.raises(RequestFailed, match="got 27 and 14 more for the adapter's side network") as failed:
        small.run(small.submit("2", text(0), LST.name))
    assert failed.value.event.failure is Failure.REQUEST_TOO_LARGE
    assert small.pages.used == 0


def test_it_works_in_half_precision(tmp_path):
    config = EngineConfig(
        model=LLAMA, store=str(tmp_path / "store"), adapter_memory_bytes_max=8 << 20, kv_bytes_max=1 << 20
    )
    offline = OfflineEngine(config, Backbone(build(LLAMA).bfloat16()))
    folder = LST.make(LLAMA, tmp_path / "adapter", 0)
    digest, oracle = offline.register("a", folder), LST.oracle(LLAMA, folder)
    for i, prompt in enumerate(prompts(6, 2)):
        (tokens,) = offline.run([Submit(RequestId(str(i)), prompt, NEW_TOKENS, adapter=digest)]).values()
        for row, token in zip(oracle.logits(prompt, tokens), tokens, strict=True):
            assert row.max() - row[token] <= 0.1 * row.abs().max()
