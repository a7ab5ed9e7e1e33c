"""Every method that is served has an adapter in the benchmark, and each of these is accepted and answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.backbones import build
from weft.adapters_store.formats import served
from weft.bench.made import Ground, Made, Variants
from weft.bench.methods_made import MADE
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import RequestId, Submit
from weft.server.engine.offline import OfflineEngine

PROMPT = tuple(range(5, 17))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineEngine]:
    store = tmp_path_factory.mktemp("store")
    config = EngineConfig(model="tiny", store=str(store), device="cpu", adapter_memory_bytes_max=16 << 20)
    engine = OfflineEngine(config, Backbone(build("llama")))
    yield engine
    engine.engine.residency.close()


@pytest.fixture(scope="module")
def ground(engine: OfflineEngine) -> Ground:
    return Ground(lambda: build("llama"), engine.engine.backbone.info)


def test_every_method_that_is_served_is_made():
    assert {made.method for made in MADE} == {row.method for row in served()}


def test_names_are_distinct():
    names = [made.name for made in MADE]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.name)
def test_two_variants_of_each_answer(engine: OfflineEngine, ground: Ground, made: Made, tmp_path: Path):
    made.write(ground, tmp_path / "made")
    variants = Variants.of(tmp_path / "made")
    digests = []
    for number, name in enumerate(("first", "second")):
        variants.write(tmp_path / name, number)
        digests.append(engine.register(f"{MADE.index(made)}-{name}", tmp_path / name))
    assert digests[0] != digests[1]
    prompt = (*PROMPT, *made.invokes, *PROMPT)
    found = engine.run([Submit(RequestId(digest), prompt, 2, adapter=digest) for digest in digests])
    assert [len(tokens) for tokens in found.values()] == [2, 2]
    one, other = (engine.catalog.get(f"{MADE.index(made)}-{name}") for name in ("first", "second"))
    assert one.device_bytes == other.device_bytes


@pytest.mark.parametrize("made", [made for made in MADE if made.name in ("VeRA", "PVeRA")], ids=lambda made: made.name)
def test_variants_share_a_bank(engine: OfflineEngine, ground: Ground, made: Made, tmp_path: Path):
    made.write(ground, tmp_path / "made")
    variants, banks = Variants.of(tmp_path / "made"), []
    for number in range(3):
        variants.write(tmp_path / str(number), number)
        digest = engine.register(f"sharing-{MADE.index(made)}-{number}", tmp_path / str(number))
        engine.run([Submit(RequestId(digest), PROMPT, 1, adapter=digest)])
        lease = engine.engine.residency.acquire(digest)
        assert lease is not None
        engine.engine.residency.release(lease)
        banks += [bank.digest for bank in lease.banks]
    assert len(banks) == 3
    assert len(set(banks)) == 1


def test_variants_differ_in_floats_only(tmp_path: Path):
    tensors = {
        "base_model.vera_A": torch.ones(2),
        "base_model.model.q.randlora_B": torch.ones(2),
        "model.q.loras.made.vera_B": torch.ones(2),
        "indices": torch.ones(2, dtype=torch.int32),
    }
    Variants({}, tensors).write(tmp_path, 64)
    found = Variants.of(tmp_path).tensors
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, tensors[name])}
    assert changed == {"model.q.loras.made.vera_B"}
    assert found["model.q.loras.made.vera_B"].tolist() == [1.25, 1.25]
