"""The loader's two threads: who waits for which, what a failed move leaves behind, and that they end."""

import gc
import threading
import time
import weakref
from pathlib import Path

import torch

from tests.adapters_store.files import lora
from tests.adapters_store.stores import Store, add, bytes_of
from weft.adapters_store import loader
from weft.adapters_store.compile import compile_adapter
from weft.adapters_store.images import Images


def test_what_is_forgotten_while_it_is_prepared_leaves_nothing(small, monkeypatch):
    (digest,) = add(small, 1)
    store, goes_on = small, threading.Event()
    store.remove("n1-4")
    right = loader.Loader._prepare

    def prepare(self, digest):
        assert goes_on.wait(10)
        return right(self, digest)

    monkeypatch.setattr(loader.Loader, "_prepare", prepare)
    with store.catalog.stage() as upload:
        config, weights = lora(4, 1).encode()
        upload.write_config(config)
        upload.write_weights(weights)
        assert upload.finish() == digest
        store.residency.prepare(digest)
        # its caller has gone
        store.residency.forget(digest)
        goes_on.set()
        store.settle()
    assert not store.residency._versions
    assert store.files() == []


def test_a_block_whose_move_failed_is_loaded_again(tmp_path, llama, block_bytes, monkeypatch, caplog):
    with Store(tmp_path / "store", llama, 4 * block_bytes) as store:
        digests = add(store, 1, 2, 3, 4)
        (large,) = add(store, 5, rank=7)
        leases = sorted((store.acquire(digest) for digest in digests), key=lambda lease: lease.block.offset)
        before = {lease.digest: bytes_of(store, lease) for lease in leases}
        for at in (0, 2, 1):
            store.residency.release(leases[at])
        for at in (0, 2):
            store.remove(next(e.name for e in store.catalog.list() if e.digest == leases[at].digest))
        evictions = store.residency.stats().evictions

        def broken(buffer, move):
            buffer[move.target : move.target + move.nbytes // 2] = 7
            raise torch.OutOfMemoryError("out of luck")

        monkeypatch.setattr(loader, "copy_overlapping", broken)
        assert store.acquire(large).block.nbytes > block_bytes
        store.residency.check()
        assert store.residency.stats().evictions == 1
        assert evictions == 2
        monkeypatch.undo()
        # neither what was half copied nor what lies there since
        assert store.residency.acquire(leases[1].digest) is None
        moved = store.acquire(leases[1].digest)
        assert bytes_of(store, moved) == before[moved.digest]
        assert "MoveJob" in caplog.text
        store.residency.check()


def test_the_engine_never_waits_for_the_disk(tmp_path, llama, monkeypatch):
    slow = threading.Event()
    right = Images.opened

    def opened(images, digest):
        slow.wait(10)
        return right(images, digest)

    with Store(tmp_path / "store", llama) as store:
        a, b = add(store, 1, 2)
        held = store.acquire(a)
        monkeypatch.setattr(Images, "opened", opened)
        start = time.monotonic()
        for _ in range(100):
            store.residency.poll()
            assert store.residency.acquire(b) is None
            assert store.residency.acquire(a) is not None
        assert time.monotonic() - start < 1
        slow.set()
        assert store.acquire(b).digest == b
        assert held.digest == a


def test_a_slow_compile_delays_no_load(tmp_path, llama, monkeypatch):
    goes_on = threading.Event()
    right = compile_adapter

    def slow(*arguments):
        assert goes_on.wait(10)
        return right(*arguments)

    with Store(tmp_path / "store", llama) as store:
        a, b = add(store, 1, 2)
        for image in (store.root / "images").glob(f"{a}*"):
            image.unlink()
    with Store(tmp_path / "store", llama) as store:
        monkeypatch.setattr(loader, "compile_adapter", slow)
        assert store.residency.acquire(a) is None
        # neither known nor loaded before
        assert store.acquire(b).digest == b
        assert store.residency.acquire(a) is None
        assert not store.residency.lacks_room(a)
        goes_on.set()
        assert store.acquire(a).digest == a


def test_who_waits_for_room_is_told_from_who_waits_for_the_loader(small):
    a, b, c = add(small, 1, 2, 3)
    assert small.residency.acquire(a) is None
    assert not small.residency.lacks_room(a)
    leases = [small.acquire(digest) for digest in (a, b)]
    assert small.residency.acquire(c) is None
    assert small.residency.lacks_room(c)
    small.residency.release(leases[0])
    assert small.residency.acquire(c) is None
    assert not small.residency.lacks_room(c)


def test_closing_stops_the_loader(tmp_path: Path, llama):
    store = Store(tmp_path / "store", llama)
    # other tests of this process may have loaders of their own
    before = sum(thread.name.startswith("adapter-") for thread in threading.enumerate())
    assert before
    store.__exit__(None, None, None)
    assert sum(thread.name.startswith("adapter-") for thread in threading.enumerate()) == before - 2


def test_nothing_is_kept_of_a_residency_that_nobody_holds(tmp_path, llama):
    store = Store(tmp_path / "store", llama)
    store.residency.release(store.acquire(add(store, 1)[0]))
    buffer, threads = weakref.ref(store.arena.buffer), threading.active_count()
    store.catalog.close()
    del store
    gc.collect()
    assert buffer() is None
    until = time.monotonic() + 10
    while threading.active_count() >= threads and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() < threads
