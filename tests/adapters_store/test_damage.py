"""Images and files that were damaged, lost or made for something else, and jobs that fail."""

import logging

import pytest
import torch

from tests.adapters_store.conftest import sites
from tests.adapters_store.files import lora
from tests.adapters_store.stores import Store, add, bytes_of
from weft.adapters_store.errors import AdapterCorrupt, AdapterIncompatible, StoreBug, StoreFull
from weft.kernels.layout import Directory, directory


@pytest.mark.parametrize("damage", ["flip", "cut", "head", "gone", "link", "empty"])
def test_an_image_that_is_damaged_is_made_again(damage, small, caplog):
    a, b, c = add(small, 1, 2, 3)
    lease = small.acquire(a)
    before = bytes_of(small, lease)
    small.residency.release(lease)
    for digest in (b, c):
        small.residency.release(small.acquire(digest))
    (image,) = (small.root / "images").glob(f"{a}*")
    raw = bytearray(image.read_bytes())
    raw[-300] ^= 1
    head = b"?" + image.read_bytes()[1:]
    {
        "flip": lambda: image.write_bytes(raw),
        "cut": lambda: image.write_bytes(raw[:-1]),
        "head": lambda: image.write_bytes(head),
        "empty": lambda: image.write_bytes(b""),
        "gone": image.unlink,
        "link": lambda: (image.rename(image.with_name("other")), image.symlink_to("other")),
    }[damage]()
    with caplog.at_level(logging.WARNING):
        assert bytes_of(small, small.acquire(a)) == before
    assert ("is damaged" in caplog.text) == (damage != "gone")
    small.residency.check()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "header", "cut", "gone"])
def test_damaged_files_are_data_loss_for_their_adapter_alone(file, damage, tmp_path, llama):
    with Store(tmp_path / "store", llama) as store:
        a, b = add(store, 1, 2)
    path = tmp_path / "store" / "objects" / a / file
    raw = bytearray(path.read_bytes())
    raw[9 if damage == "header" else -2] ^= 0x40
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[:-1] if damage == "cut" else raw)
    for image in (tmp_path / "store" / "images").iterdir():
        image.unlink()
    with Store(tmp_path / "store", llama) as store:
        with pytest.raises(AdapterCorrupt):
            store.acquire(a)
        assert store.acquire(b).digest == b
        # bringing the right bytes again repairs it
        store.register("again", lora(4, 1))
        assert store.acquire(a).digest == a


def test_a_failure_is_news_to_everyone_who_waits_and_then_forgotten(tmp_path, llama, monkeypatch):
    with Store(tmp_path / "store", llama) as store:
        (digest,) = add(store, 1)

        def broken(block: torch.Tensor) -> Directory:
            raise StoreFull("full")

        monkeypatch.setattr("weft.adapters_store.loader.directory", broken)
        with pytest.raises(StoreFull):
            store.acquire(digest)
        with pytest.raises(StoreFull):
            store.residency.acquire(digest)
        assert store.arena.used_bytes == 0
        monkeypatch.setattr("weft.adapters_store.loader.directory", directory)
        monkeypatch.setattr("weft.adapters_store.residency.time.monotonic", lambda: float("inf"))
        assert store.residency.acquire(digest) is None
        store.residency.check()


def test_a_defect_in_a_job_is_logged_and_the_next_job_is_done(tmp_path, llama, monkeypatch, caplog):
    with Store(tmp_path / "store", llama) as store:
        monkeypatch.setattr("weft.adapters_store.loader.compile_adapter", lambda *arguments: 1 / 0)
        with pytest.raises(StoreBug, match=r"incident [0-9a-f]{12}") as failure:
            store.register("a", lora())
        incident = failure.value.message.rpartition(" ")[2]
        assert incident in caplog.text
        assert "ZeroDivisionError" in caplog.text
        monkeypatch.undo()
        assert store.register("a", lora()).method == "LORA"


def test_an_adapter_of_another_backbone_says_so_when_it_is_asked_for(tmp_path, llama):
    with Store(tmp_path / "store", llama) as store:
        (digest,) = add(store, 1)
    with Store(tmp_path / "store", sites("gpt2")) as store:
        # the digest of the tests' backbones is the same; their images must not be
        for image in (tmp_path / "store" / "images").iterdir():
            image.unlink()
        with pytest.raises(AdapterIncompatible):
            store.acquire(digest)


def test_images_outlive_a_restart(tmp_path, llama):
    with Store(tmp_path / "store", llama) as store:
        (digest,) = add(store, 1)
        before = bytes_of(store, store.acquire(digest))
    with Store(tmp_path / "store", llama) as store:
        (image,) = (tmp_path / "store" / "images").iterdir()
        written = image.stat().st_mtime_ns
        assert bytes_of(store, store.acquire(digest)) == before
        assert image.stat().st_mtime_ns == written


def test_a_version_has_one_image_at_a_time(tmp_path, llama):
    names = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        with Store(tmp_path / "store", llama, dtype=dtype) as store:
            (digest,) = add(store, 1)
            assert store.acquire(digest).block.nbytes
        (image,) = (tmp_path / "store" / "images").iterdir()
        names.append(image.name)
    assert names[0] == names[2] != names[1]
