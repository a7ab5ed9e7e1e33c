"""Adapters that AdapterHub's own library made, on the models that it answered with: the same tokens, in any company."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import adapterhub
from tests.support.hub_oracle import oracle
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine

# of the largest logit: what the oracle by hooks may be off, and a first difference of tokens that is forgiven
ORACLE_TOLERANCE, TIE = 1e-5, 1e-4


class Family:
    """An engine on the golden model of a family, with each of its golden adapters."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        config = EngineConfig(
            model=name,
            store=str(folder / "store"),
            adapter_memory_bytes_max=16 << 20,
            kv_bytes_max=4 << 20,
            batch_tokens_max=640,
            batch_requests_max=80,
        )
        self.offline = OfflineEngine(config, Backbone(adapterhub.backbone(name)))
        self.digests: dict[str, Digest] = {}

    def submit(self, kind: str | None) -> Submit:
        """The request that the library was given for this adapter; None: the first one's, to the bare model."""
        prompt, tokens, _ = adapterhub.answer(self.name, kind or adapterhub.kinds(self.name)[0])
        if kind is not None and kind not in self.digests:
            self.digests[kind] = self.offline.register(kind, adapterhub.folder(self.name, kind))
        adapter = None if kind is None else self.digests[kind]
        return Submit(RequestId(kind or "base"), prompt, len(tokens), adapter=adapter)

    def run(self, kinds: Sequence[str | None]) -> dict[str, list[int]]:
        """What each is answered, all in one batch."""
        return {str(id): tokens for id, tokens in self.offline.run([self.submit(kind) for kind in kinds]).items()}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made: dict[str, Family] = {}

    def family(name: str) -> Family:
        if name not in made:
            made[name] = Family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return family


def same(tokens: Sequence[int], wanted: Sequence[int], logits: Tensor) -> bool:
    """Whether they are the library's, up to the first place where it hardly preferred its own."""
    for step, (got, want) in enumerate(zip(tokens, wanted, strict=True)):
        if got != want:
            return bool(logits[step].max() - logits[step][got] <= TIE * logits[step].abs().max())
    return True


@pytest.mark.parametrize(("family", "kind"), adapterhub.ALL)
def test_the_oracle_by_hooks_says_what_the_library_says(family, kind):
    prompt, tokens, logits = adapterhub.answer(family, kind)
    found = oracle(adapterhub.backbone(family), adapterhub.folder(family, kind)).logits(prompt, tokens)
    assert float((found - logits).abs().max()) <= ORACLE_TOLERANCE * float(logits.abs().max())


@pytest.mark.parametrize(("family", "kind"), adapterhub.ALL)
def test_a_golden_adapter_alone(families, family, kind):
    _, tokens, logits = adapterhub.answer(family, kind)
    assert same(families(family).run([kind])[kind], tokens, logits)


@pytest.mark.parametrize("family", adapterhub.FAMILIES)
def test_all_golden_adapters_of_a_family_in_one_batch(families, family):
    kinds = adapterhub.kinds(family)
    answers = families(family).run([*kinds, None])
    wrong = [kind for kind in kinds if not same(answers[kind], *adapterhub.answer(family, kind)[1:])]
    assert not wrong
    # the library's answers differ from each other and from the bare model's, so a swap would show
    assert len({tuple(tokens) for tokens in answers.values()}) == len(answers)


@pytest.mark.parametrize("family", adapterhub.FAMILIES)
def test_the_bare_model_answers_as_transformers_does_beside_them(families, family):
    found = families(family)
    submit = found.submit(None)
    ids = torch.tensor([list(submit.prompt)])
    model: Any = adapterhub.backbone(family)
    with torch.inference_mode():
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=submit.max_new_tokens,
            min_new_tokens=submit.max_new_tokens, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert found.run([*adapterhub.kinds(family), None])["base"] == whole[0, ids.shape[1] :].tolist()
