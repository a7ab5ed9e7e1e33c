"""The engine as a whole, in one process: isolation, eviction, memory, failures that stay where they happen."""

import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support import adapters
from tests.support.backbones import VOCABULARY, build
from weft.adapters_store import loader
from weft.adapters_store.compile import compile_adapter
from weft.server.backbone.model import Backbone
from weft.server.engine import runner, sampler
from weft.server.engine.config import EngineConfig
from weft.server.engine.engine import HEARTBEAT_S, Engine
from weft.server.engine.messages import (
    Digest,
    Failed,
    Failure,
    Prepare,
    RequestId,
    Sampling,
    StepStats,
    Submit,
    Tokens,
)
from weft.server.engine.offline import AdapterRefused, OfflineEngine, RequestFailed
from weft.server.engine.scheduler import ADAPTER_PATIENCE_S

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


def finish(engine, submits):
    """Drive steps by hand until every request has ended: tokens by id, and how those ended that failed."""
    tokens: dict[str, list[int]] = {submit.id: [] for submit in submits}
    failed: dict[str, Failed] = {}
    left = set(tokens)
    for submit in submits:
        engine.engine.handle(submit)
    end = time.monotonic() + 20
    while left:
        assert time.monotonic() < end, left
        for event in engine.engine.step():
            if isinstance(event, Failed):
                failed[event.id] = event
                left.discard(event.id)
            if isinstance(event, Tokens):
                tokens[event.id] += event.tokens
                left -= {event.id} if event.finish is not None else set()
    return tokens, failed


def mixed(*digests, new=6):
    return [Submit(RequestId(str(i)), PROMPT, new, adapter=digest) for i, digest in enumerate(digests)]


def test_rows_beside_non_finite_ones_get_the_tokens_that_they_get_alone(tmp_path, folders):
    engine = start(tmp_path)
    good, bad = engine.register("good", folders["lora"]), engine.register("bad", folders["lora_patterns"])
    alone, base = ask(engine, (good, PROMPT))[0], ask(engine, (None, PROMPT))[0]
    ask(engine, (bad, PROMPT))
    overwrite(engine, bad, torch.inf)
    tokens, failed = finish(engine, mixed(good, bad, None, good))
    assert {id: event.failure for id, event in failed.items()} == {"1": Failure.NON_FINITE_LOGITS}
    assert [tokens[id] for id in "023"] == [alone, base, alone]
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


@pytest.fixture
def runs(monkeypatch):
    """Make steps break: ``runs.breaks(batch)`` is the error to raise, or None. ``runs.sizes``: of those that went."""
    right = runner.Runner.run
    spy = SimpleNamespace(breaks=lambda batch: None, sizes=[])

    def run(self, batch):
        error = spy.breaks(batch)
        if error is not None:
            raise error
        spy.sizes.append(len(batch.items))
        return right(self, batch)

    monkeypatch.setattr(runner.Runner, "run", run)
    return spy


def test_a_request_that_breaks_its_steps_ends_and_no_other(tmp_path, folders, runs, caplog):
    engine = start(tmp_path)
    good, bad = engine.register("good", folders["lora"]), engine.register("bad", folders["ia3"])
    alone, base = ask(engine, (good, PROMPT))[0], ask(engine, (None, PROMPT))[0]
    ask(engine, (bad, PROMPT))
    runs.breaks = lambda batch: (
        RuntimeError("out of luck") if any(i.request.submit.adapter == bad for i in batch.items) else None
    )
    tokens, failed = finish(engine, mixed(good, None, bad, good, bad))
    assert {id: event.failure for id, event in failed.items()} == {"2": Failure.BUG, "4": Failure.BUG}
    assert "luck" not in failed["2"].message
    assert "out of luck" in caplog.text
    assert [tokens[id] for id in "013"] == [alone, base, alone]
    assert engine.engine.pages.used == 0
    engine.engine.residency.check()


def test_a_step_without_memory_is_run_in_halves(tmp_path, runs):
    engine = start(tmp_path)
    base = ask(engine, (None, PROMPT))[0]
    runs.sizes.clear()
    runs.breaks = lambda batch: torch.OutOfMemoryError("no room") if len(batch.items) > 2 else None
    tokens, failed = finish(engine, mixed(*[None] * 5, new=2))
    assert not failed
    assert list(tokens.values()) == [base[:2]] * 5
    assert runs.sizes == [2, 1, 2] * 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_request_too_large_for_the_memory_alone_is_told_so(error, tmp_path, runs):
    engine = start(tmp_path)
    runs.breaks = lambda batch: error
    _, failed = finish(engine, mixed(None))
    assert failed["0"].failure is Failure.OUT_OF_MEMORY
    assert engine.engine.pages.used == 0


def test_a_device_that_is_lost_ends_the_engine(tmp_path, runs):
    engine = start(tmp_path)
    runs.breaks = lambda batch: torch.AcceleratorError("gone")
    with pytest.raises(torch.AcceleratorError):
        finish(engine, mixed(None))


@pytest.fixture
def slow_compile(monkeypatch):
    """Compiling waits until the event is set."""
    goes_on = threading.Event()
    right = compile_adapter

    def slow(*arguments):
        assert goes_on.wait(20)
        return right(*arguments)

    monkeypatch.setattr(loader, "compile_adapter", slow)
    yield goes_on
    goes_on.set()


def test_while_one_adapter_compiles_everybody_else_is_served(tmp_path, folders, slow_compile):
    slow_compile.set()
    engine = start(tmp_path)
    slow, here, away = (engine.register(kind, folders[kind]) for kind in ("lora", "ia3", "lokr_full"))
    ask(engine, (here, PROMPT))
    for image in (tmp_path / "images").glob(f"{slow}*"):
        image.unlink()
    slow_compile.clear()
    now = [0.0]
    engine.engine.scheduler._clock = lambda: now[0]
    engine.engine.handle(Submit(RequestId("slow"), PROMPT, 2, adapter=slow))
    for number in range(3):
        # much longer than anybody waits for room
        now[0] += 10 * ADAPTER_PATIENCE_S
        tokens, failed = finish(engine, mixed(None, here, away, new=2 + number))
        assert not failed
        assert [len(each) for each in tokens.values()] == [2 + number] * 3
    assert [request.submit.id for request in engine.engine.scheduler.waiting] == ["slow"]
    slow_compile.set()
    assert len(finish(engine, mixed(None, new=1))[0]) == 1
    until = time.monotonic() + 10
    while engine.engine.scheduler.waiting or engine.engine.scheduler.running:
        assert time.monotonic() < until
        engine.engine.step()


def test_an_engine_whose_loader_works_is_heard_of(tmp_path):
    now = [0.0]
    config = EngineConfig(model="m", store=str(tmp_path), adapter_memory_bytes_max=1 << 20, kv_bytes_max=1 << 20)
    engine = Engine(config, Backbone(build("llama")), clock=lambda: now[0])
    heard = []
    slow = loader.Loader._prepare
    goes_on = threading.Event()

    def prepare(self, digest):
        assert goes_on.wait(20)
        return slow(self, digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader.Loader, "_prepare", prepare)
        engine.handle(Prepare(Digest("1" * 64)))
        for _ in range(100):
            now[0] += 0.1
            heard += [now[0] for event in engine.step() if isinstance(event, StepStats)]
        goes_on.set()
        until = time.monotonic() + 10
        while engine.residency.busy():
            assert time.monotonic() < until
            engine.step()
    gaps = [after - before for before, after in pairwise([0.0, *heard, 10.0])]
    assert max(gaps) <= HEARTBEAT_S + 0.2
    assert len(heard) <= 12
    now[0] += 60
    assert engine.step() == []


def test_adapters_without_room_in_the_working_set_are_counted(tmp_path, folders, caplog):
    engine = start(tmp_path, working_set_bytes_max=0, kernels="torch")
    digest = engine.register("lora", folders["lora"])
    misses = 0
    for submit in (
        Submit(RequestId("1"), PROMPT, 3, adapter=digest),
        Submit(RequestId("2"), PROMPT, 3, adapter=digest),
    ):
        engine.engine.handle(submit)
        while engine.engine.busy:
            misses += sum(e.working_set_misses for e in engine.engine.step() if isinstance(e, StepStats))
    assert misses == engine.engine.kernels.working_set_misses > 0
    assert caplog.text.count("working_set_bytes_max: 0 bytes are too few") == 1


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
