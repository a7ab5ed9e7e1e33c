"""Residency: who is in the arena, who leaves, what is loaded again, and what a damaged disk does to that."""

import gc
import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.adapters_store.files import VALID, Files, lora
from tests.adapters_store.peft_models import ModelSites
from tests.adapters_store.stores import Store, add, any_order, bytes_of
from weft.adapters_store.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterTooLarge,
)
from weft.adapters_store.residency import CLAIM_POLLS

LARGE = 40


def is_there(store: Store, digest: str) -> bool:
    """Whether an adapter can be had at once."""
    lease = store.residency.acquire(digest)
    if lease is not None:
        store.residency.release(lease)
    return lease is not None


def test_an_adapter_is_loaded_once_and_shared(small):
    (digest,) = add(small, 1)
    assert small.residency.acquire(digest) is None
    lease = small.acquire(digest)
    again = small.residency.acquire(digest)
    assert again is not None
    assert again.block is lease.block
    stats = small.residency.stats()
    assert (stats.loads, stats.evictions, stats.adapters_resident) == (1, 0, 1)
    assert stats.adapters_bytes == lease.block.nbytes
    assert len(stats.load_s) == 1
    assert small.residency.stats().loads == 0
    small.residency.check()


def test_the_least_recently_used_leaves_first(small):
    a, b, c = add(small, 1, 2, 3)
    for digest in (a, b, a):
        small.residency.release(small.acquire(digest))
    small.acquire(c)
    assert small.residency.stats().evictions == 1
    assert len(small.evicted) == 1
    assert is_there(small, a)
    assert not is_there(small, b)
    small.residency.check()


def test_who_is_in_use_does_not_leave(small):
    a, b, c = add(small, 1, 2, 3)
    held = [small.acquire(a), small.acquire(b)]
    for _ in range(20):
        small.residency.poll()
        assert small.residency.acquire(c) is None
    assert not small.residency.busy()
    small.residency.release(held[0])
    assert small.acquire(c).digest == c
    assert small.residency.acquire(b) is not None
    small.residency.check()


def test_what_was_evicted_comes_back_byte_for_byte(small):
    digests = add(small, 1, 2, 3)
    seen: dict[str, bytes] = {}
    for _ in range(3):
        for digest in digests:
            lease = small.acquire(digest)
            assert seen.setdefault(digest, bytes_of(small, lease)) == bytes_of(small, lease)
            small.residency.release(lease)
    assert len(set(seen.values())) == 3
    assert small.residency.stats().loads == 9


def test_every_load_has_a_key_of_its_own(small):
    digests = add(small, 1, 2, 3)
    keys = []
    for digest in digests * 2:
        lease = small.acquire(digest)
        keys.append(lease.block.key)
        small.residency.release(lease)
    assert len(set(keys)) == 6
    assert small.evicted == keys[:4]


def test_two_who_wait_for_the_same_room_both_get_it(tmp_path, llama, block_bytes):
    with Store(tmp_path / "store", llama, block_bytes) as store:
        waiting = add(store, 1, 2)
        done: list[str] = []
        for _ in range(2000):
            store.residency.poll()
            for digest in tuple(waiting):
                lease = store.residency.acquire(digest)
                if lease is not None:
                    done.append(digest)
                    waiting.remove(digest)
                    store.residency.release(lease)
            if not waiting:
                break
            time.sleep(0.001)
        assert len(done) == 2
        assert store.residency.stats().loads == 2


def test_a_load_that_nobody_claims_does_not_keep_others_out(tmp_path, llama, block_bytes):
    with Store(tmp_path / "store", llama, block_bytes) as store:
        a, b = add(store, 1, 2)
        assert store.residency.acquire(a) is None
        store.settle()
        # loaded, and kept for whoever asked for it
        assert store.residency.acquire(b) is None
        assert not store.residency.busy()
        for _ in range(CLAIM_POLLS):
            store.residency.poll()
        assert store.acquire(b).digest == b


def test_scattered_room_is_brought_together(tmp_path, llama, block_bytes):
    with Store(tmp_path / "store", llama, 4 * block_bytes) as store:
        digests = add(store, 1, 2, 3, 4)
        (large,) = add(store, 5, rank=7)
        leases = [store.acquire(digest) for digest in digests]
        before = {lease.digest: bytes_of(store, lease) for lease in leases}
        keep = sorted(leases, key=lambda lease: lease.block.offset)
        # in use, idle, forgotten, forgotten: what is idle may be moved or evicted
        store.residency.release(keep[0])
        store.residency.release(keep[2])
        store.residency.release(keep[1])
        store.remove(next(e.name for e in store.catalog.list() if e.digest == keep[0].digest))
        store.remove(next(e.name for e in store.catalog.list() if e.digest == keep[2].digest))
        lease = store.acquire(large)
        assert store.residency.stats().evictions == 2
        assert keep[1].block.key in store.evicted, "the kernels forget what has moved"
        moved = store.acquire(keep[1].digest)
        assert moved.block.key != keep[1].block.key
        assert moved.block.offset == 0
        assert bytes_of(store, moved) == before[moved.digest]
        assert bytes_of(store, keep[3]) == before[keep[3].digest]
        assert lease.block.nbytes > block_bytes
        store.residency.check()


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_events_keeps_books_and_bytes(seed, tmp_path, llama, block_bytes):
    choose = random.Random(seed)
    with Store(tmp_path / "store", llama) as store:
        digests = [*add(store, 1, 2, 3), *add(store, 4, rank=7), *add(store, 5, rank=1), *add(store, 6, rank=11)]
        wanted = {digest: bytes_of(store, store.acquire(digest)) for digest in digests}
    with Store(tmp_path / "store", llama, 4 * block_bytes) as store:
        any_order(store, [(digest, ()) for digest in digests], choose, 600, wanted)
        store.settle()
        for digest in digests:
            store.residency.forget(digest)
            store.settle()
        for _ in range(CLAIM_POLLS + 1):
            store.residency.poll()
        store.residency.check()
        assert store.arena.used_bytes == 0
        keys = store.evicted
        assert len(keys) == len(set(keys))


def test_an_adapter_that_can_never_fit_is_refused_when_it_is_prepared(small):
    with pytest.raises(AdapterTooLarge, match="device memory: expected a block of at most"):
        small.register("large", lora(LARGE))
    assert small.files() == []


def test_an_adapter_that_fitted_a_larger_arena_is_refused_when_it_is_asked_for(tmp_path, llama, block_bytes):
    with Store(tmp_path / "store", llama) as store:
        (digest,) = add(store, 1, rank=LARGE)
    with Store(tmp_path / "store", llama, block_bytes) as store:
        with pytest.raises(AdapterTooLarge):
            store.acquire(digest)
        with pytest.raises(AdapterTooLarge):
            store.residency.acquire(digest)


def test_forgetting_waits_for_the_last_use(small):
    (digest,) = add(small, 1)
    first, second = small.acquire(digest), small.acquire(digest)
    before = bytes_of(small, first)
    small.residency.forget(digest)
    small.residency.release(first)
    small.settle()
    assert bytes_of(small, second) == before
    assert list((small.root / "images").glob(f"{digest}*"))
    small.residency.release(second)
    small.settle()
    assert small.arena.used_bytes == 0
    assert not list((small.root / "images").glob(f"{digest}*"))
    assert small.evicted == [first.block.key]
    small.residency.check()


def test_forgetting_what_is_being_loaded_leaves_nothing(small):
    (digest,) = add(small, 1)
    assert small.residency.acquire(digest) is None
    small.residency.forget(digest)
    small.settle()
    for _ in range(CLAIM_POLLS + 1):
        small.residency.poll()
    small.settle()
    assert small.arena.used_bytes == 0
    assert not list((small.root / "images").iterdir())
    small.residency.check()


def test_a_request_that_holds_a_forgotten_version_still_gets_it(small):
    (digest,) = add(small, 1)
    small.residency.forget(digest)
    assert small.acquire(digest).digest == digest


def test_preparing_what_was_forgotten_brings_it_back(small):
    (digest,) = add(small, 1)
    lease = small.acquire(digest)
    small.residency.forget(digest)
    assert small.prepare(digest).error is None
    small.residency.release(lease)
    small.settle()
    assert is_there(small, digest)
    assert list((small.root / "images").glob(f"{digest}*"))


def _reachable(*roots: object) -> Iterator[object]:
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type | ModelSites) or type(item).__name__ in ("module", "function"):
            continue
        seen.add(id(item))
        yield item
        todo.extend(gc.get_referents(item))


@pytest.mark.parametrize("kind", VALID)
def test_nothing_of_a_resident_adapter_lies_outside_the_arena(kind, tmp_path, llama):
    with Store(tmp_path / "store", llama) as store:
        lease = store.acquire(store.register("a", VALID[kind]()).digest)
        arena = store.arena.buffer.untyped_storage().data_ptr()
        head = lease.block.directory
        for item in _reachable(lease, store.residency._versions):
            if isinstance(item, torch.Tensor):
                assert item.untyped_storage().data_ptr() == arena
            if isinstance(item, np.ndarray):
                assert item.nbytes <= head.sites.nbytes + 4096
            if isinstance(item, bytes | bytearray | memoryview):
                assert len(item) <= 64


def test_prepared_results_name_the_field_at_fault(small):
    files: Files = lora().configured(layer_replication=[[0, 1]])
    with pytest.raises(AdapterInvalid) as refusal:
        small.register("a", files)
    assert isinstance(refusal.value, AdapterError)
    assert refusal.value.field == "layer_replication"
    assert small.files() == []


@pytest.mark.gpu
def test_a_gpu_holds_the_same_bytes_through_loads_evictions_and_moves(tmp_path, llama, block_bytes):
    with Store(tmp_path / "store", llama) as store:
        digests = [*add(store, 1, 2, 3, 4), *add(store, 5, rank=7)]
        wanted = {digest: bytes_of(store, store.acquire(digest)) for digest in digests}
    with Store(tmp_path / "store", llama, 4 * block_bytes, device="cuda") as store:
        for digest in [*digests, *reversed(digests), digests[1], digests[4], digests[0]]:
            lease = store.acquire(digest)
            assert bytes_of(store, lease) == wanted[digest]
            store.residency.release(lease)
            store.residency.check()
        assert store.residency.stats().evictions > 0
