"""Requests that name several adapters: PEFT's tokens with the same ones active, in batches with plain requests."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from tests.adapters_store.peft_models import adapt, save, several
from tests.support.adapters import LINEARS
from tests.support.backbones import VOCABULARY, build
from tests.support.methods.case import ALL, Oracle, WholePass, by_peft, noise
from weft.adapters_store.composition import derive
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, Failure, RequestId, Submit
from weft.server.engine.offline import OfflineEngine, RequestFailed

NEW_TOKENS = 8
TOLERANCE = 1e-4
ROWS = 3


def lora(family: str, rank: int = 4, **values: Any) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=6, target_modules=LINEARS.get(family, LINEARS["llama"]), **values)


def ia3(family: str) -> PeftConfig:
    outputs, inputs = (["c_attn"], ["mlp.c_proj"]) if family == "gpt2" else (["k_proj", "v_proj"], ["down_proj"])
    return IA3Config(target_modules=[*outputs, *inputs], feedforward_modules=inputs)


@dataclass(frozen=True)
class Made:
    """A composition: folders in order with their weights, and who knows what they compute together."""

    members: Sequence[tuple[Path, float]]
    oracle: Oracle


def weighted(family: str, folder: Path) -> Made:
    model = several(family, {"one": lora(family, 3), "two": lora(family, 5)}, folder)
    model.base_model.add_weighted_adapter(["one", "two"], [0.75, -0.5], "both", combination_type="cat")
    model.base_model.set_adapter("both")
    return Made([(folder / "one", 0.75), (folder / "two", -0.5)], WholePass(model))


def active(first: Callable[[str], PeftConfig], second: Callable[[str], PeftConfig]) -> Callable[[str, Path], Made]:
    def made(family: str, folder: Path) -> Made:
        model = several(family, {"one": first(family), "two": second(family)}, folder)
        return Made([(folder / name, 1.0) for name in ("one", "two")], WholePass(model))

    return made


def in_line(config: Callable[[str], PeftConfig], longer: Callable[[str], PeftConfig], extra: int):
    """Two prompts or prefixes of ``ROWS``; PEFT knows them as a third whose rows are both's, one behind the other."""

    def made(family: str, folder: Path) -> Made:
        case, both = by_peft("", config, noise(1.0)), by_peft("", longer, noise(1.0), extra=extra)
        paths = [case.make(family, folder / name, seed) for seed, name in enumerate(("one", "two"), 1)]
        rows = [load_file(path / "adapter_model.safetensors")["prompt_embeddings"] for path in paths]
        together = both.make(family, folder / "both", 9)
        save_file({"prompt_embeddings": torch.cat(rows)}, together / "adapter_model.safetensors")
        return Made([(path, 1.0) for path in paths], both.oracle(family, together))

    return made


def prompt(rows: int) -> Callable[[str], PeftConfig]:
    return lambda family: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)


def prefix(rows: int) -> Callable[[str], PeftConfig]:
    return lambda family: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)


MADE: dict[str, Callable[[str, Path], Made]] = {
    "lora_lora_weighted": weighted,
    "ia3_ia3": active(ia3, ia3),
    "lora_dora": active(lora, lambda family: lora(family, 2, use_dora=True)),
    "dora_lora": active(lambda family: lora(family, 2, use_dora=True), lora),
    "prompt_prompt": in_line(prompt(ROWS), prompt(2 * ROWS), 2 * ROWS),
    "prefix_prefix": in_line(prefix(ROWS), prefix(2 * ROWS), 0),
}


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=random).tolist()
    return [tuple(torch.randint(3, VOCABULARY, (n,), generator=random).tolist()) for n in lengths]


def right(oracle: Oracle, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether the oracle would have gone the same way, ties of its own aside."""
    logits = oracle.logits(prompt, tokens)
    short = [row.max() - row[token] for row, token in zip(logits, tokens, strict=True)]
    return all(float(gap) <= TOLERANCE * float(row.abs().max()) for gap, row in zip(short, logits, strict=True))


class Composing:
    """A family's engine, with every composition and its members registered."""

    def __init__(self, family: str, folder: Path):
        limits: Any = {"adapter_memory_bytes_max": 8 << 20, "kv_bytes_max": 4 << 20}
        config = EngineConfig(model=family, store=str(folder / "store"), batch_tokens_max=320, **limits)
        self.offline = OfflineEngine(config, Backbone(build(family)))
        self.base = WholePass(build(family))
        self.members: dict[str, list[tuple[Digest, float]]] = {}
        self.oracles: dict[str, Oracle] = {"base": self.base}
        for name, make in MADE.items():
            made = make(family, folder / name)
            self.oracles[name] = made.oracle
            self.members[name] = [
                (self.offline.register(f"{name}-{i}", path), weight) for i, (path, weight) in enumerate(made.members)
            ]

    def submit(self, id: str, said: Sequence[tuple[Digest, float]], prompt: tuple[int, ...]) -> Submit:
        digest, members = derive(said)
        kept = tuple((Digest(member), weight) for member, weight in members)
        return Submit(
            RequestId(id), prompt, NEW_TOKENS, adapter=None if digest is None else Digest(digest), members=kept
        )

    def ask(self, *asked: tuple[Sequence[tuple[Digest, float]], tuple[int, ...]]) -> list[list[int]]:
        submits = [self.submit(str(i), said, prompt) for i, (said, prompt) in enumerate(asked)]
        answers = self.offline.run(submits)
        return [answers[submit.id] for submit in submits]


@pytest.fixture(scope="module", params=ALL)
def composing(request, tmp_path_factory) -> Composing:
    return Composing(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", MADE)
def test_alone_and_among_others_the_tokens_are_pefts(composing, name):
    said = composing.members[name]
    mine, *others = prompts(10, seed=len(name))
    plain = [[member] for each in composing.members.values() for member in each if member[1] == 1.0][:6]
    company = [composing.members[other] for other in MADE if other != name]
    asked = [(each, prompt) for each, prompt in zip([*company, *plain, []], others * 2, strict=False)]
    (alone,), (mixed, *rest) = composing.ask((said, mine)), composing.ask((said, mine), *asked)
    oracle = composing.oracles[name]
    assert right(oracle, mine, alone)
    assert right(oracle, mine, mixed)
    for other, (_, prompt), tokens in zip([n for n in MADE if n != name], asked, rest, strict=False):
        assert right(composing.oracles[other], prompt, tokens), f"{other} beside {name}"
    assert right(composing.base, asked[-1][1], rest[-1])
    change = (oracle.logits(mine, alone) - composing.base.logits(mine, alone)).abs().max()
    assert change >= 100 * TOLERANCE * composing.base.logits(mine, alone).abs().max()


def test_each_member_shows_and_so_does_the_order(composing):
    """The control: judged by the oracle of both, the answers of one member, or of the other order, must fail."""
    mine = prompts(4, seed=3)
    for name, said in composing.members.items():
        for wrong in ([said[0]], [said[1]], list(reversed(said))):
            # sums, products, and attention over keys that are at no position
            if name in ("lora_lora_weighted", "ia3_ia3", "prefix_prefix") and len(wrong) == 2:
                continue
            answers = composing.ask(*((wrong, prompt) for prompt in mine))
            same = [right(composing.oracles[name], p, tokens) for p, tokens in zip(mine, answers, strict=True)]
            assert not all(same), f"{name} answers alike"


def test_one_with_weight_1_and_another_with_0_is_that_one(composing):
    (a, _), (b, _) = composing.members["lora_lora_weighted"]
    mine = prompts(1, seed=1)[0]
    assert composing.ask(([(a, 1.0), (b, 0.0)], mine)) == composing.ask(([(a, 1.0)], mine))
    assert composing.submit("x", [(a, 1.0), (b, 0.0)], mine) == composing.submit("x", [(a, 1.0)], mine)
    assert composing.submit("x", [(a, 0.0)], mine).adapter is None


# one engine in which everything has to take turns


class Turns:
    """LoRA, and IA3, in an arena that holds one composition or two members."""

    def __init__(self, folder: Path):
        config = {"one": lora("llama", 3), "two": lora("llama", 4), "three": lora("llama", 2)}
        several("llama", config, folder)
        save(adapt("llama", ia3("llama"), seed=4), folder / "scale")
        limits: Any = {"adapter_memory_bytes_max": 56 << 10, "kv_bytes_max": 1 << 20}
        self.offline = OfflineEngine(
            EngineConfig(model="llama", store=str(folder / "s"), **limits), Backbone(build("llama"))
        )
        self.digests = {name: self.offline.register(name, folder / name) for name in (*config, "scale")}

    submit, ask = Composing.submit, Composing.ask


@pytest.fixture(scope="module")
def turns(tmp_path_factory) -> Turns:
    return Turns(tmp_path_factory.mktemp("turns"))


weights = st.floats(-1.5, 1.5, width=32)
names = st.sampled_from(["one", "two", "three"])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.tuples(names, weights), max_size=3), min_size=2, max_size=4), st.randoms())
def test_eviction_and_company_change_nothing(turns, lists, random):
    asked = [
        ([(turns.digests[name], weight) for name, weight in said], prompts(1, i)[0]) for i, said in enumerate(lists)
    ]
    alone = [turns.ask(one)[0] for one in asked]
    order = list(range(len(asked)))
    random.shuffle(order)
    answers = turns.ask(*(asked[i] for i in order))
    assert [answers[order.index(i)] for i in range(len(asked))] == alone
    turns.offline.engine.residency.check()


def test_weights_commute_where_members_only_add(turns):
    mine = prompts(1, seed=8)[0]
    said = [(turns.digests["one"], 0.5), (turns.digests["two"], -1.0)]
    assert turns.ask((said, mine)) == turns.ask((said[::-1], mine))
    assert turns.ask((said, mine)) != turns.ask(([(said[0][0], -1.0), (said[1][0], 0.5)], mine))


def test_what_does_not_go_together_ends_its_request_alone(turns):
    mine = prompts(1, seed=8)[0]
    scale, one = turns.digests["scale"], turns.digests["one"]
    before = turns.ask(([(one, 1.0)], mine))
    turns.offline.engine.handle(turns.submit("other", [(one, 1.0)], mine))
    with pytest.raises(RequestFailed) as failed:
        turns.offline.run([turns.submit("bad", [(one, 1.0), (scale, 0.5)], mine)])
    assert failed.value.event.failure is Failure.ADAPTER_INVALID
    assert failed.value.event.message.startswith(f"weight of {scale[:12]}: expected 1, got 0.5")
    assert turns.ask(([(one, 1.0)], mine)) == before


def test_derived_bytes_are_told_apart_and_go_with_a_member(tmp_path, turns):
    engine = turns.offline.engine
    mine = prompts(1, seed=8)[0]
    (tmp_path / "four").mkdir()
    folder = Path(engine.config.store) / "objects" / turns.digests["one"]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / file, tmp_path / "four" / file)
    config = json.loads((tmp_path / "four" / "adapter_config.json").read_text())
    (tmp_path / "four" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5}))
    four = turns.offline.register("four", tmp_path / "four")
    turns.ask(([(four, 1.0), (turns.digests["three"], 1.0)], mine))
    stats = engine.stats()
    assert stats.composed_bytes > 0
    assert stats.adapters_bytes + stats.composed_bytes == engine.arena.used_bytes
    turns.offline.forget("four")
    held = {digest for version in engine.residency._composed.values() for digest, _ in version.members}
    assert four not in held
