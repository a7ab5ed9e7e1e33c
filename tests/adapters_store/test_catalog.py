"""The catalog: names and versions, through kills, damage and full disks."""

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.adapters_store.conftest import sites
from tests.adapters_store.files import Files, krona, lora
from weft.adapters_store import durable
from weft.adapters_store.catalog import Catalog
from weft.adapters_store.entry import Entry
from weft.adapters_store.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    StoreFull,
    StoreIOError,
)
from weft.adapters_store.files import CONFIG, WEIGHTS, AdapterFiles
from weft.adapters_store.report import AdapterReport, SiteSummary

BACKBONE = "b" * 64
REPORT = AdapterReport(
    "LORA",
    "peft",
    4096,
    (SiteSummary("model.layers.0.q", ("low_rank r=4", "bias"), 4, 512, ("alpha/r",)), SiteSummary("m", (), 0, 0)),
    ("a note — with a dash",),
)


def add(catalog: Catalog, name: str, files: Files, replace: bool = False) -> tuple[Entry, str | None]:
    """Upload and name, without anybody to judge it."""
    config, weights = files.encode()
    with catalog.stage() as upload:
        upload.write_config(config)
        upload.write_weights(weights[:100])
        upload.write_weights(weights[100:])
        return catalog.publish(name, upload.finish(), REPORT, BACKBONE, replace)


def tree(root: Path) -> list[str]:
    """Every file of a store but its lock."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name != "lock")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_an_entry_says_what_was_registered_also_after_a_restart(root):
    with Catalog.open(root) as catalog:
        entry, before = add(catalog, "a.b-c_1", lora())
    assert before is None
    config, weights = lora().encode()
    assert entry.disk_bytes == len(config) + len(weights)
    assert entry.report == REPORT
    assert (entry.state, entry.reason, entry.site_count, entry.device_bytes) == ("active", "", 2, 4096)
    with Catalog.open(root) as catalog:
        assert catalog.problems == ()
        assert catalog.get("a.b-c_1") == entry
        assert catalog.get("a.b-c_1").report == REPORT
        assert (root / "objects" / entry.digest / WEIGHTS).read_bytes() == weights


def test_a_version_is_named_by_a_manifest_of_its_files(root):
    import hashlib

    with Catalog.open(root) as catalog:
        entry, _ = add(catalog, "a", lora())
    lines = [
        f"{hashlib.sha256((root / 'objects' / entry.digest / f).read_bytes()).hexdigest()}  {f}\n"
        for f in (CONFIG, WEIGHTS)
    ]
    assert entry.digest == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_names_are_listed_in_order_page_by_page_and_by_method(root):
    with Catalog.open(root) as catalog:
        for i in (3, 1, 2, 0):
            add(catalog, f"n{i}", lora(seed=10 * i))
        assert catalog.names() == ("n0", "n1", "n2", "n3")
        assert [e.name for e in catalog.list(limit=2)] == ["n0", "n1"]
        assert [e.name for e in catalog.list(after="n1", limit=2)] == ["n2", "n3"]
        assert [e.name for e in catalog.list(after="n1x")] == ["n2", "n3"]
        assert catalog.list(method="IA3") == ()
        assert len(catalog.list(method="LORA")) == 4


def test_a_name_that_is_taken_needs_replace(root):
    with Catalog.open(root) as catalog:
        first, _ = add(catalog, "a", lora())
        with pytest.raises(AdapterExists) as refusal:
            add(catalog, "a", lora(seed=1))
        assert refusal.value.field == "name"
        assert catalog.get("a") == first
        assert [p.name for p in (root / "objects").iterdir()] == [first.digest]
        second, before = add(catalog, "a", lora(seed=1), replace=True)
        assert before == first.digest
        assert catalog.get("a").digest == second.digest
        # requests in flight may still need it
        assert (root / "objects" / first.digest).is_dir()
        assert catalog.remove_version(first.digest)
        assert not (root / "objects" / first.digest).exists()


def test_publishing_what_is_there_changes_nothing(root):
    with Catalog.open(root) as catalog:
        entry, _ = add(catalog, "a", lora())
        assert add(catalog, "a", lora()) == (entry, None)


def test_a_version_stays_until_its_last_name_goes(root):
    with Catalog.open(root) as catalog:
        one, _ = add(catalog, "one", lora())
        two, _ = add(catalog, "two", lora())
        assert one.digest == two.digest
        assert catalog.delete("one") is None
        assert not catalog.remove_version(one.digest)
        assert catalog.is_named(one.digest)
        assert catalog.delete("two") == one.digest
        assert catalog.remove_version(one.digest)
        assert tree(root) == []
        with pytest.raises(AdapterNotFound):
            catalog.delete("two")


def test_a_version_that_another_upload_holds_is_not_removed(root):
    config, weights = lora().encode()
    with Catalog.open(root) as catalog, catalog.stage() as first:
        first.write_config(config)
        first.write_weights(weights)
        digest = first.finish()
        with catalog.stage() as second:
            second.write_config(config)
            second.write_weights(weights)
            assert second.finish() == digest
        # the second gave up; the first still publishes
        entry, _ = catalog.publish("a", digest, REPORT, BACKBONE)
        assert (root / "objects" / digest / WEIGHTS).read_bytes() == weights
        assert entry.digest == digest


def test_an_upload_that_is_left_leaves_nothing(root):
    config, weights = lora().encode()
    with Catalog.open(root) as catalog:
        with catalog.stage() as upload:
            upload.write_config(config)
            upload.write_weights(weights[:50])
        with pytest.raises(RuntimeError), catalog.stage() as upload:  # noqa: PT012  the failure is inside the context
            upload.write_config(config)
            upload.write_weights(weights)
            upload.finish()
            raise RuntimeError
        assert list((root / "objects").iterdir()) == list((root / "staging").iterdir()) == []


def test_what_cannot_be_weights_is_refused_at_its_first_bytes(root):
    with Catalog.open(root) as catalog, catalog.stage() as upload:
        upload.write_weights(b"PK\x03")
        with pytest.raises(AdapterInvalid, match="zip archive"):
            upload.write_weights(b"\x04\x14\x00\x00\x00")


def test_bytes_that_rotted_are_repaired_by_uploading_them_again(root):
    with Catalog.open(root) as catalog:
        entry, _ = add(catalog, "a", lora())
        weights = root / "objects" / entry.digest / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
        add(catalog, "b", lora())
        assert weights.read_bytes() == lora().encode()[1]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "~", "-a", "ä", "a b", "a" * 129, "a,b", "a\n"])
def test_a_name_is_never_a_path(name, root):
    with Catalog.open(root) as catalog:
        with pytest.raises(AdapterInvalid) as refusal:
            add(catalog, name, lora())
        assert refusal.value.field == "name"
        with pytest.raises(AdapterNotFound):
            catalog.get(name)
        assert tree(root) == []


def test_publishing_a_version_whose_files_are_gone_is_refused(root):
    with Catalog.open(root) as catalog, pytest.raises(AdapterCorrupt):
        catalog.publish("a", "0" * 64, REPORT, BACKBONE)


def test_one_server_at_a_time_uses_a_store(root):
    with Catalog.open(root), pytest.raises(StoreIOError, match="another server"):
        Catalog.open(root)
    Catalog.open(root).close()


def test_a_root_that_is_a_link_or_a_file_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(StoreIOError, match="expected folders, got a link or a file"):
            Catalog.open(tmp_path / name)
    assert list((tmp_path / "real").iterdir()) == []


def test_everything_is_private_to_the_owner(root):
    with Catalog.open(root) as catalog:
        add(catalog, "a", lora())
    for path in (root, *root.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_foreign_files_are_left_alone_and_reported(root):
    with Catalog.open(root) as catalog:
        entry, _ = add(catalog, "a", lora())
    (root / "names" / "README").write_text("hello")
    (root / "names" / "folder").mkdir()
    (root / "names" / "link").symlink_to("/etc/passwd")
    (root / "names" / "later.json").write_text('{"format": 99}\n[]\n0\n')
    (root / "objects" / "notes").mkdir()
    with Catalog.open(root) as catalog:
        assert catalog.names() == ("a",)
        assert catalog.get("a") == entry
        assert len(catalog.problems) == 5
        assert (root / "names" / "README").read_text() == "hello"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_record_is_reported_and_costs_no_version(damage, root):
    with Catalog.open(root) as catalog:
        add(catalog, "a", lora())
        kept, _ = add(catalog, "b", lora(seed=1))
    record = next(p for p in (root / "names").iterdir() if b'"name": "a"' in p.read_bytes())
    raw = record.read_bytes()
    record.write_bytes({"cut": raw[: len(raw) // 2], "flip": raw.replace(b"4096", b"4097"), "empty": b""}[damage])
    with Catalog.open(root) as catalog:
        assert catalog.names() == ("b",)
        assert catalog.get("b") == kept
        assert len(catalog.problems) == 1
        # whose version it was cannot be known, so none is thrown away
        assert len(list((root / "objects").iterdir())) == 2


def test_a_record_under_a_name_that_is_not_its_own_is_not_believed(root):
    with Catalog.open(root) as catalog:
        add(catalog, "a", lora())
    record = next((root / "names").iterdir())
    record.rename(record.with_name(f"{'0' * 64}.json"))
    with Catalog.open(root) as catalog:
        assert catalog.names() == ()
        assert "under the hash of its name" in catalog.problems[0]


def test_files_that_are_gone_are_reported(root):
    with Catalog.open(root) as catalog:
        entry, _ = add(catalog, "a", lora())
        catalog.remove_version("0" * 64)
    durable.discard(root / "objects" / entry.digest, root / "staging")
    with Catalog.open(root) as catalog:
        assert catalog.names() == ("a",)
        assert catalog.problems == ("a: its files are not in the store",)


def test_what_nobody_names_is_cleared_when_the_store_is_opened(root):
    with Catalog.open(root) as catalog:
        entry, _ = add(catalog, "a", lora())
    (root / "objects" / ("1" * 64)).mkdir()
    (root / "staging" / "left").mkdir()
    (root / "staging" / "left" / "half").write_text("x")
    (root / "images" / f"{'1' * 64}-aaaa").touch()
    (root / "images" / f"{entry.digest}-aaaa").touch()
    with Catalog.open(root) as catalog:
        assert catalog.problems == ()
    assert [p.name for p in (root / "objects").iterdir()] == [entry.digest]
    assert [p.name for p in (root / "images").iterdir()] == [f"{entry.digest}-aaaa"]
    assert list((root / "staging").iterdir()) == []


def test_entries_of_another_backbone_are_judged_again(root):
    info = sites("gpt2").info
    with Catalog.open(root) as catalog:
        add(catalog, "llama_only", lora())
        add(catalog, "bad", krona())
        catalog.judge(replace(info, digest="c" * 64))
        assert catalog.get("llama_only").state == "incompatible"
        assert "c_attn" in catalog.get("llama_only").reason
        catalog.judge(sites("llama").info)
        assert catalog.get("llama_only").state == "active"
        assert catalog.get("llama_only").reason == ""


def test_a_version_that_cannot_be_read_keeps_no_other_from_being_judged(root, monkeypatch):
    right = AdapterFiles.read

    def read(folder: Path, data: bool = True) -> AdapterFiles:
        if folder.name == broken.digest:
            raise StoreIOError("reading a version: expected bytes, got an input/output error")
        return right(folder, data)

    with Catalog.open(root) as catalog:
        broken, _ = add(catalog, "a", lora(seed=1))
        add(catalog, "b", lora())
        monkeypatch.setattr(AdapterFiles, "read", read)
        catalog.judge(replace(sites("gpt2").info, digest="c" * 64))
        assert (catalog.get("a").state, catalog.get("b").state) == ("active", "incompatible")


def test_readers_and_writers_do_not_disturb_each_other(root):
    with Catalog.open(root) as catalog:
        problems: list[Exception] = []
        stop = threading.Event()

        def read() -> None:
            try:
                while not stop.is_set():
                    names = catalog.names()
                    assert list(names) == sorted(names)
                    assert len(catalog.list(limit=1000)) <= 4
            except Exception as error:  # noqa: BLE001  handed to the test
                problems.append(error)

        def write(i: int) -> None:
            try:
                for _ in range(8):
                    add(catalog, f"n{i}", lora(seed=i))
                    digest = catalog.delete(f"n{i}")
                    assert digest is not None
                    catalog.remove_version(digest)
            except Exception as error:  # noqa: BLE001  handed to the test
                problems.append(error)

        reader = threading.Thread(target=read)
        writers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        reader.join()
        assert problems == []
        assert tree(root) == []


def test_a_full_disk_is_said_and_forgiven(root, monkeypatch):
    with Catalog.open(root) as catalog:
        kept, _ = add(catalog, "kept", lora())
        right = os.write

        def full(fd: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StoreFull):
            add(catalog, "more", lora(seed=1))
        monkeypatch.setattr(os, "write", right)
        assert catalog.writable
        assert [p.name for p in (root / "objects").iterdir()] == [kept.digest]
        add(catalog, "more", lora(seed=1))


def test_a_failed_sync_makes_the_store_read_only(root, monkeypatch):
    with Catalog.open(root) as catalog:
        add(catalog, "kept", lora())
        calls = []

        def broken(fd: int) -> None:
            calls.append(fd)
            raise OSError(errno.EIO, "input/output error")

        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(StoreIOError):
            add(catalog, "more", lora(seed=1))
        assert len(calls) == 1, "a failed sync is not tried again"
        monkeypatch.undo()
        assert not catalog.writable
        assert catalog.get("kept").name == "kept"
        for change in (lambda: add(catalog, "more", lora(seed=1)), lambda: catalog.delete("kept")):
            with pytest.raises(StoreIOError, match="read-only"):
                change()


def test_running_out_of_descriptors_is_no_reason_to_stop_writing(root, monkeypatch):
    with Catalog.open(root) as catalog:
        right = os.open

        def none_left(*arguments, **options) -> int:
            raise OSError(errno.EMFILE, "too many open files")

        monkeypatch.setattr(os, "open", none_left)
        with pytest.raises(StoreIOError):
            add(catalog, "a", lora())
        monkeypatch.setattr(os, "open", right)
        assert catalog.writable
        add(catalog, "a", lora())
