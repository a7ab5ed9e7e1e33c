"""Adapters that must be refused are refused with the right field and words, and leave nothing behind."""

from collections.abc import Iterator

import pytest

from tests.adapters_store.files import VALID
from tests.adapters_store.malformed import MALFORMED
from tests.adapters_store.peft_models import ModelSites
from tests.adapters_store.stores import Store
from weft.adapters_store.errors import AdapterInvalid


@pytest.fixture(scope="module")
def store(tmp_path_factory, llama: ModelSites) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("store"), llama) as store:
        yield store


def test_the_corpus_is_large():
    assert len(MALFORMED) >= 150


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_adapter_is_refused_and_leaves_nothing(name, store):
    case = MALFORMED[name]
    with pytest.raises(AdapterInvalid) as refusal:
        store.register("adapter", case.files)
    assert refusal.value.field == case.field
    assert case.words in refusal.value.message
    assert len(refusal.value.message) < 1200
    assert store.files() == []
    assert store.catalog.names() == ()


@pytest.mark.parametrize("kind", VALID)
def test_what_the_corpus_breaks_is_valid_to_begin_with(kind, store):
    report = store.register(kind, VALID[kind]()).report
    assert report.sites
    store.remove(kind)
    assert store.files() == []
