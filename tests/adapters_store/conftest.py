"""What the store's tests share: the sites of the tiny models."""

from functools import cache

import pytest

from tests.adapters_store.peft_models import ModelSites, build, sites_of


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
