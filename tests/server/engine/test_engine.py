"""The engine as a whole, in one process: isolation, eviction, memory, failures that stay where they happen."""

from pathlib import Path

import pytest
import torch

from tests.support import adapters
from tests.support.backbones import VOCABULARY, build
from weft.server.backbone.model import Backbone
from weft.server.engine import runner, sampler
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, Failure, RequestId, Sampling, Submit
from weft.server.engine.offline import AdapterRefused, OfflineEngine, RequestFailed

KINDS = ("lora", "lora_patterns", "lokr_full", "ia3")
PROMPT = (5, 9, 33, 7, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {kind: adapters.make(kind, "llama", root / kind, seed) for seed, kind in enumerate(KINDS)}


def start(tmp_path, **options) -> OfflineEngine:
    limits = {"adapter_memory_bytes_max": 4 << 20, "kv_bytes_max": 1 << 20, **options}
    return OfflineEngine(EngineConfig(model="llama", store=str(tmp_path), **limits), Backbone(build("llama")))


def ask(engine, *requests, new=6, **options):
    """Tokens of one request per (adapter digest or None, prompt), all in one batch."""
    submits = [
        Submit(RequestId(str(i)), prompt, new, adapter=digest, **options) for i, (digest, prompt) in enumerate(requests)
    ]
    answers = engine.run(submits)
    return [answers[submit.id] for submit in submits]


def overwrite(engine, digest, value):
    """Fill the second half of a resident block, which is factors, and drop what is remembered of it."""
    lease = engine.engine.residency.acquire(digest)
    block = engine.engine.arena.buffer[lease.block.offset :][: lease.block.nbytes]
    block[len(block) // 2 :].view(torch.float32).fill_(value)
    engine.engine.runner.forget(lease.block.key)
    engine.engine.residency.release(lease)


@pytest.fixture
def logits_seen(monkeypatch):
    """Every logits tensor that reaches the sampler."""
    seen = []
    pick = sampler.pick

    def spy(logits, *rest):
        seen.append(logits.clone())
        return pick(logits, *rest)

    monkeypatch.setattr(runner, "pick", spy)
    return seen


def test_a_row_is_bit_equal_whatever_adapters_its_neighbours_carry(tmp_path, folders, logits_seen):
    engine = start(tmp_path)
    digests = [engine.register(kind, folder) for kind, folder in folders.items()]
    prompts = [tuple(range(3 + i, 12 + i)) for i in range(4)]
    company: list[list[Digest | None]] = [
        [digests[0], digests[1], digests[2], digests[3]],
        [digests[0], digests[0], digests[0], digests[0]],
        [digests[0], digests[2], digests[2], digests[1]],
        [digests[0], None, digests[0], None],
    ]
    for digest in digests:
        ask(engine, (digest, PROMPT), new=1)  # loaded, so that every batch below is one step
    rows = []
    for others in company:
        logits_seen.clear()
        # one new token: the batches have identical shape and hold the request at some row
        batch = list(zip(others, prompts, strict=True))
        ask(engine, *batch, new=1)
        order = sorted(range(4), key=lambda i: _row_key(engine, others[i]))
        rows.append(logits_seen[0][order.index(0)])
    for row in rows[1:]:
        assert torch.equal(row, rows[0])


def _row_key(engine, digest):
    if digest is None:
        return -1
    lease = engine.engine.residency.acquire(digest)
    key = lease.block.key
    engine.engine.residency.release(lease)
    return key


def test_nan_in_one_block_breaks_exactly_that_adapter(tmp_path, folders):
    engine = start(tmp_path)
    digests = {kind: engine.register(kind, folder) for kind, folder in folders.items()}
    before = {kind: ask(engine, (digest, PROMPT))[0] for kind, digest in digests.items()}
    base = ask(engine, (None, PROMPT))[0]
    overwrite(engine, digests["lokr_full"], torch.nan)
    with pytest.raises(RequestFailed) as failed:
        ask(engine, (digests["lokr_full"], PROMPT))
    assert failed.value.event.failure is Failure.NON_FINITE_LOGITS
    after = ask(engine, (None, PROMPT), *((d, PROMPT) for kind, d in digests.items() if kind != "lokr_full"))
    assert after == [base, *(tokens for kind, tokens in before.items() if kind != "lokr_full")]


def test_non_finite_rows_do_not_touch_their_neighbours(tmp_path, folders):
    engine = start(tmp_path)
    good, bad = engine.register("good", folders["lora"]), engine.register("bad", folders["lora_patterns"])
    alone = ask(engine, (good, PROMPT), (good, PROMPT[:3]))
    ask(engine, (bad, PROMPT))
    overwrite(engine, bad, torch.inf)
    submits = [Submit(RequestId(str(i)), p, 6, adapter=d) for i, (d, p) in enumerate([(good, PROMPT), (bad, PROMPT)])]
    with pytest.raises(RequestFailed):
        engine.run(submits)
    assert ask(engine, (good, PROMPT), (good, PROMPT[:3])) == alone
    assert engine.engine.pages.used == 0


def test_eviction_and_reload_change_nothing(tmp_path, folders):
    roomy, tight = start(tmp_path / "a"), start(tmp_path / "b", adapter_memory_bytes_max=20 << 10)
    want = []
    for kind, folder in folders.items():
        want.append(ask(roomy, (roomy.register(kind, folder), PROMPT))[0])
    digests = [tight.register(kind, folder) for kind, folder in folders.items()]
    found = [ask(tight, (digest, PROMPT))[0] for _ in range(2) for digest in digests]
    assert found == want * 2
    sizes = [tight.catalog.get(kind).report.device_bytes for kind in folders]
    assert sum(sizes) > tight.engine.arena.buffer.numel() >= max(sizes)


def test_more_adapters_than_fit_at_once_take_turns(tmp_path, folders):
    engine = start(tmp_path, adapter_memory_bytes_max=20 << 10)
    digests = [engine.register(kind, folder) for kind, folder in folders.items()]
    alone = [ask(engine, (digest, PROMPT))[0] for digest in digests]
    assert ask(engine, *((digest, PROMPT) for digest in digests)) == alone


def test_an_adapter_beyond_the_budget_is_refused_with_both_figures(tmp_path, folders):
    engine = start(tmp_path, adapter_memory_bytes_max=4 << 10)
    with pytest.raises(AdapterRefused) as refused:
        engine.register("lora", folders["lora"])
    assert refused.value.event.failure is Failure.ADAPTER_TOO_LARGE
    assert engine.catalog.names() == ()


def test_resident_bytes_are_the_sum_of_the_blocks_exactly(tmp_path, folders):
    engine = start(tmp_path)
    total = 0
    for kind, folder in folders.items():
        ask(engine, (engine.register(kind, folder), PROMPT))
        total += engine.catalog.get(kind).report.device_bytes
        assert engine.engine.stats().adapters_bytes == total


def test_a_step_that_breaks_ends_its_requests_and_no_others(tmp_path, folders, monkeypatch):
    engine = start(tmp_path)
    want = ask(engine, (None, PROMPT))
    forward = engine.engine.backbone.forward

    def broken(*_):
        monkeypatch.setattr(engine.engine.backbone, "forward", forward)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.engine.backbone, "forward", broken)
    with pytest.raises(RequestFailed) as failed:
        ask(engine, (None, PROMPT))
    assert failed.value.event.failure is Failure.BUG
    assert "luck" not in failed.value.event.message
    assert ask(engine, (None, PROMPT)) == want
    assert engine.engine.pages.used == 0


def test_sampled_tokens_do_not_depend_on_the_batch(tmp_path, folders):
    engine = start(tmp_path)
    digest = engine.register("lora", folders["lora"])
    sampling = Sampling(temperature=1.0, top_k=40, seed=11)
    alone = ask(engine, (digest, PROMPT), sampling=sampling)[0]
    others = [(None, tuple(range(3, 3 + n))) for n in (1, 8, 20)]
    assert ask(engine, others[0], (digest, PROMPT), *others[1:], sampling=sampling)[1] == alone
    other_seed = Sampling(temperature=1.0, top_k=40, seed=12)
    assert ask(engine, (digest, PROMPT), sampling=other_seed)[0] != alone


def test_tokens_are_below_the_vocabulary_and_lengths_are_kept(tmp_path):
    engine = start(tmp_path)
    (tokens,) = ask(engine, (None, PROMPT), new=40, sampling=Sampling(temperature=5.0, seed=1))
    assert len(tokens) == 40
    assert max(tokens) < VOCABULARY
