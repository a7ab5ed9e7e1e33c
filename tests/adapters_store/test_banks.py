"""Factors that adapters share: in the arena once, there as long as anybody needs them, made again when they go."""

import random
import shutil
from pathlib import Path

import peft
import pytest

from tests.adapters_store.peft_models import ModelSites, build, sites_of
from tests.adapters_store.stores import Store, any_order, bytes_of
from tests.support.methods.case import LLAMA, Case, by_peft, noise
from weft.adapters_store.banks import bank_bytes, banks_of, shared_digests
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.composition import derive
from weft.adapters_store.errors import AdapterCorrupt, AdapterTooLarge
from weft.adapters_store.files import AdapterFiles
from weft.adapters_store.formats import parse_adapter, read_adapter
from weft.adapters_store.residency import CLAIM_POLLS


def vera(key: int) -> Case:
    """Adapters of the random matrices of this key."""
    modules = ["q_proj", "v_proj", "down_proj"]
    config = peft.VeraConfig(r=24, target_modules=modules, projection_prng_key=key)
    return by_peft("shared", lambda _: config, noise(0.3))


CASE, OTHER = vera(5), vera(6)


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
    held = bytes_of(store, before.banks[0])
    store.residency.release(before)
    with Store(store.root.parent / "other", store.sites) as other:
        shutil.rmtree(other.root / "objects")
        shutil.copytree(store.root / "objects", other.root / "objects")
        (bank,) = other.acquire(a).banks
        assert bytes_of(other, bank) == held


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


def bank_images(store: Store) -> list[Path]:
    """Images that are of no adapter."""
    named = {entry.digest for entry in store.catalog.list()}
    return [path for path in (store.root / "images").iterdir() if path.name[:64] not in named]


def test_factors_of_adapters_that_nobody_used_go_with_the_last_too(store, folders):
    register(store, folders)
    assert len(bank_images(store)) == 1
    store.remove("n0")
    assert len(bank_images(store)) == 1
    store.remove("n1")
    assert not [name for name in store.files() if name.startswith("images/")]


def test_factors_that_left_the_arena_before_go_as_well(store, folders):
    a, _ = register(store, folders)
    store.residency.release(store.acquire(a))
    for version in tuple(store.residency._idle.values()):
        store.residency._evict(version)
    assert store.arena.blocks == 0
    store.remove("n0")
    store.remove("n1")
    store.residency.poll()
    store.settle()
    assert not [name for name in store.files() if name.startswith("images/")]
    assert not store.residency._versions


def test_factors_on_disk_outlive_a_restart(store, folders, llama):
    a, _ = register(store, folders)
    (image,) = bank_images(store)
    written = image.stat().st_mtime_ns
    store.catalog.close()
    with Store(store.root, llama) as again:
        again.residency.release(again.acquire(a))
        assert [path.stat().st_mtime_ns for path in bank_images(again)] == [written]


def test_damaged_factors_are_made_from_whoever_is_there(store, folders):
    a, b = register(store, folders)
    before = store.acquire(a)
    held = bytes_of(store, before.banks[0])
    store.residency.release(before)
    store.residency._evict(store.residency._versions[before.banks[0].digest])
    # a's files are lost, and what was made from them
    shutil.rmtree(store.root / "objects" / a)
    (image,) = bank_images(store)
    image.write_bytes(image.read_bytes()[:-1] + b"?")
    with pytest.raises(AdapterCorrupt):
        store.acquire(a)
    # at once: what is wrong with the other is not what is wrong here
    assert bytes_of(store, store.acquire(b).banks[0]) == held
    store.residency.check()


def test_factors_are_let_go_when_others_cannot_be_had(store, folders, tmp_path):
    a, b = register(store, [folders[0], OTHER.make(LLAMA, tmp_path / "other-files", 3)])
    digest, members = derive([(a, 1.0), (b, 0.5)])
    assert digest is not None
    lease = store.acquire(digest, members)
    first, second = (bank.digest for bank in lease.banks)
    store.residency.release(lease)
    store.residency._evict(store.residency._versions[second])
    for path in (store.root / "images").glob(f"{second}-*"):
        path.unlink()
    shutil.rmtree(store.root / "objects")
    with pytest.raises(AdapterCorrupt):
        store.acquire(digest, members)
    assert first in store.residency._idle
    store.residency.check()


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_events_keeps_factors_for_as_long_as_anybody_needs_them(seed, folders, llama, tmp_path):
    choose = random.Random(seed)
    with Store(tmp_path / "store", llama) as roomy:
        digests = register(roomy, [*folders, OTHER.make(LLAMA, tmp_path / "other-files", 3)])
        leases = [roomy.acquire(digest) for digest in digests]
        wanted = {each.digest: bytes_of(roomy, each) for lease in leases for each in (lease, *lease.banks)}
        largest = max(lease.block.nbytes + sum(bank.block.nbytes for bank in lease.banks) for lease in leases)
    # never room for all
    with Store(tmp_path / "store", llama, largest + 4096) as store:
        any_order(store, [(digest, ()) for digest in digests], choose, 300, wanted)
        for digest in digests:
            store.residency.forget(digest)
        for _ in range(CLAIM_POLLS + 3):
            store.settle()
            store.residency.poll()
        assert store.arena.used_bytes == 0
        assert not store.residency._versions
