"""What the store's tests share: the sites of the tiny models, and a small store."""

from collections.abc import Iterator
from functools import cache

import pytest

from tests.adapters_store.files import lora
from tests.adapters_store.peft_models import ModelSites, build, sites_of
from tests.adapters_store.stores import Store


@cache
def sites(family: str) -> ModelSites:
    """The sites of an untouched tiny model."""
    return sites_of(build(family))


@pytest.fixture(scope="session")
def llama() -> ModelSites:
    return sites("llama")


@pytest.fixture(scope="session")
def gpt2() -> ModelSites:
    return sites("gpt2")


@pytest.fixture
def block_bytes(llama, tmp_path_factory) -> int:
    """Length of the block of ``lora()``."""
    with Store(tmp_path_factory.mktemp("size"), llama) as store:
        return store.register("a", lora()).device_bytes


@pytest.fixture
def small(tmp_path, llama, block_bytes) -> Iterator[Store]:
    """A store whose arena holds two adapters like ``lora()``."""
    with Store(tmp_path / "store", llama, 2 * block_bytes) as store:
        yield store
