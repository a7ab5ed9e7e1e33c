"""Factors that adapters share: in the arena once, there as long as anybody needs them, made again when they go."""

import shutil
from pathlib import Path

import peft
import pytest
import torch

from tests.adapters_store.peft_models import ModelSites, build, sites_of
from tests.adapters_store.stores import Store
from tests.support.methods.case import LLAMA, by_peft, noise
from weft.adapters_store.banks import bank_bytes, banks_of, shared_digests
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.composition import derive
from weft.adapters_store.errors import AdapterTooLarge
from weft.adapters_store.files import AdapterFiles
from weft.adapters_store.formats import parse_adapter, read_adapter

CASE = by_peft(
    "shared",
    lambda _: peft.VeraConfig(r=24, target_modules=["q_proj", "v_proj", "down_proj"], projection_prng_key=5),
    noise(0.3),
)


@pytest.fixture(scope="module")
def llama() -> ModelSites:
    return sites_of(build(LLAMA))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two adapters of the same random matrices."""
    root = tmp_path_factory.mktemp("shared")
    return [CASE.make(LLAMA, root / str(seed), seed) for seed in (1, 2)]


@pytest.fixture
def store(tmp_path, llama):
    with Store(tmp_path / "store", llama) as made:
        yield made


def register(store: Store, folders: list[Path]) -> list[str]:
    """Put both in the store; their digests."""
    found = []
    for number, folder in enumerate(folders):
        with store.catalog.stage() as upload:
            upload.write_config((folder / "adapter_config.json").read_bytes())
            upload.write_weights((folder / "adapter_model.safetensors").read_bytes())
            digest = upload.finish()
            result = store.prepare(digest)
            assert result.report is not None
            store.catalog.publish(f"n{number}", digest, result.report, store.sites.info.digest)
        found.append(digest)
    return found


def test_the_factors_lie_in_the_arena_once(store, folders, llama):
    parsed = [read_adapter(folder, llama.info) for folder in folders]
    own = [block_bytes(each, llama.geometry(), llama) for each in parsed]
    (bank,) = banks_of(parsed[0])
    leases = [store.acquire(digest) for digest in register(store, folders)]
    assert store.arena.used_bytes == sum(own) + bank_bytes(bank, llama.geometry())
    first, second = (lease.block.banks for lease in leases)
    assert len(first) == 1
    assert first[0].offset == second[0].offset
    assert first[0].nbytes == bank_bytes(bank, llama.geometry())
    stats = store.residency.stats()
    assert (stats.adapters_resident, stats.adapters_bytes) == (2, sum(own))
    assert stats.shared_bytes == bank_bytes(bank, llama.geometry())
    # an adapter of its own factors would take many times as much
    rank, sites = bank.a.shape[0], [llama.info.sites[llama.info.index[path]] for path in parsed[0].sites]
    assert own[0] < 4 * rank * sum(site.in_features + site.out_features for site in sites) / 2
    store.residency.check()


def test_who_holds_an_adapter_holds_its_factors(store, folders):
    a, b = register(store, folders)
    first, second = store.acquire(a), store.acquire(b)
    assert store.arena.blocks == 3
    store.residency.release(first)
    (digest,) = shared_digests(second.block.directory)
    assert store.residency.acquire(digest) is not None, "held by the second"
    store.residency.check()


def test_factors_go_with_the_last_adapter(store, folders):
    a, b = register(store, folders)
    leases = [store.acquire(digest) for digest in (a, b)]
    for lease in leases:
        store.residency.release(lease)
    store.remove("n0")
    assert store.arena.blocks == 2
    store.remove("n1")
    for _ in range(3):
        store.residency.poll()
        store.settle()
    assert store.arena.blocks == 0
    assert not [name for name in store.files() if name.startswith("images/")]
    store.residency.check()


def test_factors_that_are_gone_are_made_again(store, folders):
    a, _ = register(store, folders)
    before = store.acquire(a)
    held = store.arena.view(before.block.banks[0].offset, before.block.banks[0].nbytes).clone()
    store.residency.release(before)
    with Store(store.root.parent / "other", store.sites) as other:
        shutil.rmtree(other.root / "objects")
        shutil.copytree(store.root / "objects", other.root / "objects")
        (bank,) = other.acquire(a).block.banks
        assert torch.equal(other.arena.view(bank.offset, bank.nbytes), held)


def test_a_derived_version_refers_to_them_too(store, folders):
    a, b = register(store, folders)
    digest, members = derive([(a, 1.0), (b, 0.5)])
    assert digest is not None
    lease = store.acquire(digest, members)
    assert len({bank.offset for bank in lease.block.banks}) == 1
    assert store.arena.blocks == 2
    store.residency.check()


def test_a_budget_counts_the_factors(folders, llama):
    files = AdapterFiles.read(folders[0])
    parsed = parse_adapter(files, llama.info)
    own = block_bytes(parsed, llama.geometry(), llama)
    needed = own + bank_bytes(banks_of(parsed)[0], llama.geometry())
    compile_adapter(parsed, llama, llama.geometry(), needed)
    with pytest.raises(AdapterTooLarge, match=f"at most {needed - 1} bytes, got one of {needed}"):
        compile_adapter(parsed, llama, llama.geometry(), needed - 1)
