"""Every method's case, and a family's engine that answers for all of them together with the oracles' logits."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.support import methods
from tests.support.backbones import VOCABULARY, build
from tests.support.methods.case import ALL, Case, Oracle, WholePass
from weft.adapters_store.composition import derive
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine
from weft.server.engine.scheduler import Batch

NEW_TOKENS = 8
# of the largest logit: how far the engine's sums may lie from the oracle's
TOLERANCE = 1e-4
# what an adapter has to change to prove anything, and how far another of its kind has to be
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


def problem(oracle: Oracle, prompt: Sequence[int], tokens: Sequence[int]) -> str | None:
    """How the tokens differ from what the oracle would have picked; ties of its own are forgiven."""
    logits = oracle.logits(prompt, tokens)
    for step, token in enumerate(tokens):
        best = logits[step].max()
        if best - logits[step][token] > TOLERANCE * logits[step].abs().max():
            return f"step {step}: expected {int(logits[step].argmax())}, got {token} of {list(tokens)}"
    return None


@dataclass(frozen=True, eq=False)
class Answer:
    """What the engine made of a prompt: tokens, and the logits [tokens, vocabulary] that they were picked from."""

    prompt: tuple[int, ...]
    tokens: list[int]
    logits: Tensor

    def distance(self, oracle: Oracle) -> float:
        """The largest difference from the oracle's logits, of its largest logit."""
        want = oracle.logits(self.prompt, self.tokens)
        return float((self.logits.float() - want).abs().max() / want.abs().max())

    def problem(self, oracle: Oracle) -> str | None:
        """How its tokens differ from what the oracle would have picked."""
        return problem(oracle, self.prompt, self.tokens)


Members = Sequence[tuple[Digest, float]]
# id → (a version, several with weights, or the base; a prompt)
Asked = Mapping[str, tuple[Digest | Members | None, tuple[int, ...]]]


def submit(id: str, said: Digest | Members | None, prompt: tuple[int, ...]) -> Submit:
    """A request with one adapter, with several, each with a weight, or with none."""
    if said is None or isinstance(said, str):
        return Submit(RequestId(id), prompt, NEW_TOKENS, adapter=said)
    digest, members = derive(said)
    kept = tuple((Digest(member), weight) for member, weight in members)
    return Submit(RequestId(id), prompt, NEW_TOKENS, adapter=None if digest is None else Digest(digest), members=kept)


class Family:
    """A family's engine with an adapter of every method that applies to it, and what the oracles say."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype = torch.float32, adapter_bytes: int = 64 << 20):
        self.name, self.folder = name, folder
        config = EngineConfig(
            model=name,
            store=str(folder / "store"),
            adapter_memory_bytes_max=adapter_bytes,
            kv_bytes_max=4 << 20,
            batch_tokens_max=320,
            batch_requests_max=300,
        )
        self.offline = OfflineEngine(config, Backbone(nn.Module.to(build(name), dtype)))
        self.base = WholePass(build(name))
        self.names = [case for family, case in PAIRS if family == name]
        self._digests: dict[tuple[str, int], Digest] = {}
        self._oracles: dict[tuple[str, int], Oracle] = {}
        self._seen: dict[str, list[Tensor]] = {}
        self._watch()

    def _watch(self) -> None:
        """Keep the logits that every request's tokens are picked from."""
        engine, seen = self.offline.engine, self._seen
        run, forward = engine.runner.run, engine.backbone.forward
        last: list[Tensor] = []

        def watched_forward(*given: object) -> Tensor:
            last[:] = [forward(*given)]  # type: ignore[arg-type]
            return last[0]

        def watched_run(batch: Batch) -> list[int | None]:
            picked = run(batch)
            sampling = [str(item.request.submit.id) for item in batch.items if item.samples]
            for id, row in zip(sampling, last[0], strict=True):
                seen.setdefault(id, []).append(row)
            return picked

        for of, method, watched in ((engine.runner, "run", watched_run), (engine.backbone, "forward", watched_forward)):
            setattr(of, method, watched)

    def folder_of(self, name: str, twin: int) -> Path:
        """Where a twin of a case is written."""
        return self.folder / f"{name}-{twin}"

    def digest(self, name: str, twin: int = 0) -> Digest:
        """The version of a case, registered when it is first asked for; each twin is drawn from another seed."""
        if (name, twin) not in self._digests:
            folder = CASES[name].make(self.name, self.folder_of(name, twin), sum(name.encode()) + 1000 * twin)
            self._digests[name, twin] = self.offline.register(f"{name}-{twin}", folder)
        return self._digests[name, twin]

    def oracle(self, name: str, twin: int = 0) -> Oracle:
        """Who knows what this version computes."""
        if (name, twin) not in self._oracles:
            self.digest(name, twin)
            self._oracles[name, twin] = CASES[name].oracle(self.name, self.folder_of(name, twin))
        return self._oracles[name, twin]

    def run(self, asked: Asked) -> dict[str, Answer]:
        """Answers to requests, all in one batch, by id."""
        self._seen.clear()
        made = self.offline.run([submit(id, said, prompt) for id, (said, prompt) in asked.items()])
        return {
            id: Answer(prompt, made[RequestId(id)], torch.stack(self._seen[id])) for id, (_, prompt) in asked.items()
        }

    def together(self, names: Sequence[str]) -> dict[str, Answer]:
        """Answers for both twins of these cases, as ``name-twin``, and twice for the ``base``, out of one batch."""
        said = prompts(2 * len(names) + 2, 5)
        asked: dict[str, tuple[Digest | Members | None, tuple[int, ...]]] = {}
        for i, name in enumerate(names):
            for twin in (0, 1):
                asked[f"{name}-{twin}"] = self.digest(name, twin), CASES[name].prompt(said[2 * i + twin])
        return self.run(asked | {"base": (None, said[-2]), "base-1": (None, said[-1])})
