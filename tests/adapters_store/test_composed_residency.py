"""Derived versions in the arena: blocks like any other, counted apart, forgotten with their members, bounded."""

import random
import time

import pytest

from tests.adapters_store.files import ia3
from tests.adapters_store.stores import Store, add, any_order, bytes_of
from weft.adapters_store import loader, residency
from weft.adapters_store.composition import Members, derive, label_of
from weft.adapters_store.errors import AdapterCorrupt, AdapterInvalid, AdapterTooLarge
from weft.adapters_store.residency import CLAIM_POLLS


def composed(*members: tuple[str, float]) -> tuple[str, Members]:
    digest, kept = derive(members)
    assert digest is not None
    assert kept
    return digest, kept


def images(store: Store) -> list[str]:
    """Derived versions that have an image."""
    return sorted(path.name[:64] for path in (store.root / "composed").glob("*"))


def idle(store: Store) -> None:
    """Let it be known that nobody waits for anything."""
    store.settle()
    for _ in range(CLAIM_POLLS + 2):
        store.residency.poll()
    store.settle()


@pytest.fixture
def roomy(tmp_path, llama):
    with Store(tmp_path / "store", llama) as store:
        yield store


def test_a_derived_version_is_loaded_once_and_counted_apart(roomy):
    a, b = add(roomy, 1, 2)
    plain = roomy.acquire(a)
    both = roomy.acquire(*composed((a, 1.0), (b, 0.5)))
    again = roomy.residency.acquire(*composed((a, 1.0), (b, 0.5)))
    assert again is not None
    assert again.block is both.block
    assert both.digest not in (a, b)
    stats = roomy.residency.stats()
    assert (stats.adapters_bytes, stats.adapters_resident) == (plain.block.nbytes, 1)
    assert stats.composed_bytes == both.block.nbytes > plain.block.nbytes
    assert roomy.arena.used_bytes == stats.adapters_bytes + stats.composed_bytes
    assert stats.loads == 2
    roomy.residency.check()


def test_members_need_no_block_of_their_own(roomy):
    a, b = add(roomy, 1, 2)
    lease = roomy.acquire(*composed((a, 1.0), (b, 1.0)))
    stats = roomy.residency.stats()
    assert (stats.adapters_resident, stats.adapters_bytes) == (0, 0)
    assert stats.composed_bytes == lease.block.nbytes


def test_order_and_weights_make_versions(roomy):
    a, b = add(roomy, 1, 2)
    lists = [((a, 1.0), (b, 1.0)), ((b, 1.0), (a, 1.0)), ((a, 1.0), (b, 0.5)), ((a, 2.0),)]
    leases = [roomy.acquire(*composed(*said)) for said in lists]
    assert len({lease.digest for lease in leases}) == len(lists)
    assert len({bytes_of(roomy, lease) for lease in leases}) == len(lists)


def test_evicted_and_made_again_it_is_the_same_bytes(tmp_path, llama, block_bytes):
    with Store(tmp_path / "store", llama, 3 * block_bytes) as store:
        a, b, c = add(store, 1, 2, 3)
        lists = [composed((a, 1.0), (b, 0.5)), composed((b, 1.0), (c, -1.0)), composed((a, 0.25), (c, 1.0))]
        seen: dict[str, bytes] = {}
        for round_ in range(3):
            for digest, members in lists:
                lease = store.acquire(digest, members)
                assert seen.setdefault(digest, bytes_of(store, lease)) == bytes_of(store, lease)
                store.residency.release(lease)
                store.residency.check()
            if round_ == 1:
                # images that are gone are made again from the members' files
                for path in (store.root / "composed").glob("*"):
                    path.unlink()
        assert store.residency.stats().evictions > 0


def test_a_damaged_image_is_made_again(roomy):
    a, b = add(roomy, 1, 2)
    digest, members = composed((a, 1.0), (b, 1.0))
    with Store(roomy.root.parent / "other", roomy.sites) as other:
        assert add(other, 1, 2) == [a, b]
        wanted = bytes_of(other, other.acquire(digest, members))
    lease = roomy.acquire(digest, members)
    roomy.residency.release(lease)
    (path,) = (roomy.root / "composed").glob(f"{digest}-*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    # whatever leaves the arena has to be loaded again
    roomy.residency._evict(roomy.residency._versions[digest])
    assert bytes_of(roomy, roomy.acquire(digest, members)) == wanted


def test_who_is_forgotten_takes_what_is_derived_from_it_along(roomy):
    a, b, c = add(roomy, 1, 2, 3)
    gone, used, stays = composed((a, 1.0), (b, 1.0)), composed((b, 0.5), (c, 1.0)), composed((a, 1.0), (c, 1.0))
    roomy.residency.release(roomy.acquire(*gone))
    lease = roomy.acquire(*used)
    roomy.residency.release(roomy.acquire(*stays))
    before = bytes_of(roomy, lease)
    roomy.residency.forget(b)
    idle(roomy)
    assert images(roomy) == sorted([used[0], stays[0]])
    assert bytes_of(roomy, lease) == before
    roomy.residency.release(lease)
    idle(roomy)
    assert images(roomy) == [stays[0]]
    assert roomy.residency.stats().composed_bytes == roomy.arena.used_bytes > 0
    for digest in (a, c):
        roomy.residency.forget(digest)
    idle(roomy)
    assert images(roomy) == []
    assert roomy.residency.stats().composed_bytes == roomy.arena.used_bytes == 0
    assert not roomy.residency._versions
    roomy.residency.check()


def test_a_request_that_waits_gets_what_was_forgotten_meanwhile(roomy):
    a, b = add(roomy, 1, 2)
    digest, members = composed((a, 1.0), (b, 1.0))
    assert roomy.residency.acquire(digest, members) is None
    roomy.residency.forget(a)
    lease = roomy.acquire(digest, members)
    roomy.residency.release(lease)
    idle(roomy)
    assert roomy.residency.stats().composed_bytes in (0, lease.block.nbytes)


def test_a_refusal_reaches_whoever_asks_with_both_names(roomy):
    digest = roomy.register("a", ia3()).digest
    with pytest.raises(AdapterInvalid) as refusal:
        roomy.acquire(*composed((digest, 0.5)))
    assert str(refusal.value).startswith(f"weight of {label_of(digest)}: expected 1, got 0.5")
    # and nothing of it stays
    assert images(roomy) == []
    assert roomy.arena.used_bytes == 0


def test_a_damaged_member_is_named(roomy):
    a, b = add(roomy, 1, 2)
    weights = roomy.root / "objects" / b / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(AdapterCorrupt, match=f"^{label_of(b)}: "):
        roomy.acquire(*composed((a, 1.0), (b, 1.0)))
    assert roomy.acquire(a).block.nbytes


def test_what_can_never_fit_is_refused_by_the_headers(tmp_path, llama, block_bytes):
    with Store(tmp_path / "store", llama, block_bytes) as store:
        a, b = add(store, 1, 2)
        with pytest.raises(AdapterTooLarge, match=rf"expected a block of at most {block_bytes} bytes, got one of \d+"):
            store.acquire(*composed((a, 1.0), (b, 1.0)))
        assert store.acquire(a).block.nbytes == block_bytes


def test_only_so_many_are_remembered_when_nobody_asks(roomy, monkeypatch):
    monkeypatch.setattr(residency, "COMPOSED_IDLE_MAX", 3)
    a, b = add(roomy, 1, 2)
    kept = roomy.acquire(*composed((a, 1.0), (b, 100.0)))
    said = [composed((a, 1.0), (b, float(weight))) for weight in range(1, 9)]
    for digest, members in said:
        roomy.residency.release(roomy.acquire(digest, members))
    # asked for again: the least recently used go first
    roomy.residency.release(roomy.acquire(*said[5]))
    idle(roomy)
    assert images(roomy) == sorted([kept.digest, said[5][0], said[6][0], said[7][0]])
    assert roomy.arena.blocks == 4
    roomy.residency.check()


def test_only_as_many_bytes_are_remembered_as_the_arena_holds(tmp_path, llama, block_bytes):
    with Store(tmp_path / "store", llama, 5 * block_bytes) as store:
        a, b = add(store, 1, 2)
        said = [composed((a, 1.0), (b, float(weight))) for weight in range(1, 9)]
        for digest, members in said:
            lease = store.acquire(digest, members)
            store.residency.release(lease)
        idle(store)
        assert images(store) == sorted(digest for digest, _ in said[-len(images(store)) :])
        assert len(images(store)) == store.arena.nbytes // lease.block.nbytes
        store.residency.check()


def test_refused_lists_are_not_remembered_either(roomy, monkeypatch):
    monkeypatch.setattr(residency, "COMPOSED_IDLE_MAX", 3)
    digest = roomy.register("a", ia3()).digest
    for weight in range(2, 12):
        with pytest.raises(AdapterInvalid):
            roomy.acquire(*composed((digest, float(weight))))
    idle(roomy)
    assert len(roomy.residency._versions) <= 4


def test_an_engine_begins_without_the_images_of_the_one_before(tmp_path, llama):
    with Store(tmp_path / "store", llama) as store:
        a, b = add(store, 1, 2)
        store.acquire(*composed((a, 1.0), (b, 1.0)))
        assert len(images(store)) == 1
    with Store(tmp_path / "store", llama) as store:
        assert images(store) == []
        assert store.catalog.problems == ()
        store.acquire(*composed((a, 1.0), (b, 1.0)))


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_events_keeps_books_and_bytes(seed, tmp_path, llama, block_bytes, monkeypatch):
    monkeypatch.setattr(residency, "COMPOSED_IDLE_MAX", 2)
    with Store(tmp_path / "store", llama, 6 * block_bytes) as store:
        digests = add(store, 1, 2, 3)
        a, b, c = digests
        lists = [
            composed((x, weight), (y, 1.0)) for x, y in ((a, b), (b, c), (c, a)) for weight in (0.5, 1.0, 2.0)
        ]  # fmt: skip
        # derived versions twice as often
        asked = [(digest, ()) for digest in digests] + lists[: 2 * len(digests)]
        any_order(store, asked, random.Random(seed), 400, {})
        for digest in digests:
            store.residency.forget(digest)
        idle(store)
        assert store.arena.used_bytes == 0
        assert images(store) == []
        assert not store.residency._versions
        assert len(store.evicted) == len(set(store.evicted))


def test_the_files_of_members_are_read_beside_the_engine(roomy, monkeypatch):
    """The loader's thread reads and merges; the engine's only asks."""
    a, b = add(roomy, 1, 2)
    slow = loader.Loader._do

    def do(self, job):
        time.sleep(0.2)
        return slow(self, job)

    monkeypatch.setattr(loader.Loader, "_do", do)
    began = time.monotonic()
    for _ in range(50):
        roomy.residency.poll()
        assert roomy.residency.acquire(*composed((a, 1.0), (b, 1.0))) is None
    assert time.monotonic() - began < 0.2
    roomy.settle()
