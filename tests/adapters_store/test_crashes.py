"""A kill, or a disk that fails, at any system call of a change leaves the change undone or done, never in between."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.adapters_store.files import lora
from tests.adapters_store.test_catalog import add
from weft.adapters_store.catalog import Catalog
from weft.adapters_store.errors import StoreFull, StoreIOError
from weft.adapters_store.files import digest_of

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "close", "unlink")


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it, and nothing runs after it."""


@contextmanager
def killed_at(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Die at the ``count``-th system call that changes the disk; every later call dies too. Yields the calls made."""
    made: list[str] = []

    def wrap(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments, **options):
            made.append(name)
            if len(made) > count:
                # also what would clean up: a dead process does not
                raise Killed(name)
            return call(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield made


def survive(root: Path, change: Callable[[Catalog], object], monkeypatch: pytest.MonkeyPatch, count: int) -> bool:
    """Run a change that dies at a call; whether it came to its end."""
    catalog = Catalog.open(root)
    ended = True
    with killed_at(count, monkeypatch):
        try:
            change(catalog)
        except Killed:
            ended = False
    catalog.close()
    return ended


def states(root: Path) -> dict[str, str]:
    """Names and versions after a restart, every version whole and nothing else in the store."""
    with Catalog.open(root) as catalog:
        assert catalog.problems == ()
        found = {entry.name: entry.digest for entry in catalog.list()}
        objects = {path.name for path in (root / "objects").iterdir()}
        assert objects == set(found.values())
        for digest in objects:
            assert digest_of(root / "objects" / digest) == digest
        assert list((root / "staging").iterdir()) == []
        return found


CHANGES: dict[str, Callable[[Catalog], object]] = {
    "register": lambda catalog: add(catalog, "new", lora(seed=1)),
    "replace": lambda catalog: add(catalog, "old", lora(seed=1), replace=True),
    "second_name": lambda catalog: add(catalog, "new", lora()),
    "delete": lambda catalog: catalog.remove_version(catalog.delete("old") or ""),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_done_or_undone_wherever_it_dies(name, tmp_path, monkeypatch):
    change = CHANGES[name]
    outcomes: list[tuple[bool, dict[str, str]]] = []
    for count in range(200):
        root = tmp_path / str(count)
        with Catalog.open(root) as catalog:
            before = {"old": add(catalog, "old", lora())[0].digest}
        ended = survive(root, change, monkeypatch, count)
        outcomes.append((ended, states(root)))
        if ended:
            break
    else:
        raise AssertionError("the change never ended")
    after = outcomes[-1][1]
    assert after != before
    assert len(outcomes) > 5, "a change is made of several calls"
    done = [found == after for _, found in outcomes]
    # once it shows, it stays: nothing in between, and an acknowledged change is never lost
    assert all(found in (before, after) for _, found in outcomes)
    assert done == sorted(done)


@contextmanager
def failing_at(count: int, code: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fail the ``count``-th system call that changes the disk, once. Yields the calls made."""
    made: list[str] = []

    def wrap(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments, **options):
            made.append(name)
            if len(made) == count + 1:
                raise OSError(code, os.strerror(code))
            return call(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for name in CALLS:
            if name != "close":
                patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield made


def failure(change: Callable[[Catalog], object], catalog: Catalog) -> StoreFull | StoreIOError | None:
    """How a change failed, if it did."""
    try:
        change(catalog)
    except (StoreFull, StoreIOError) as error:
        return error
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["no_space", "io_error"])
@pytest.mark.parametrize("name", ["register", "replace", "second_name"])
def test_a_disk_that_fails_once_fails_one_change(name, code, tmp_path, monkeypatch):
    change = CHANGES[name]
    for count in range(200):
        root = tmp_path / str(count)
        with Catalog.open(root) as catalog:
            kept = add(catalog, "old", lora())[0]
            with failing_at(count, code, monkeypatch) as made:
                error = failure(change, catalog)
            failed = error is not None
            assert error is None or isinstance(error, StoreFull) == (code == errno.ENOSPC)
            assert catalog.writable or code == errno.EIO
            if failed:
                assert catalog.get("old") == kept, "what was there is served as before"
                assert "new" not in catalog.names()
            if failed and catalog.writable:
                change(catalog)
            expected = {entry.name: entry.digest for entry in catalog.list()}
        found = states(root)
        # not acknowledged: it may be there after a restart, whole, or not
        assert found == expected or not catalog.writable
        if len(made) <= count:
            break
    else:
        raise AssertionError("the change never ended")
    assert count > 5
