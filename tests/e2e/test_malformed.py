"""Bad adapters through the socket: each refused by field and words, nothing kept, the next request served."""

import os

import pytest

from tests.adapters_store.files import lora
from tests.adapters_store.malformed import MALFORMED
from tests.support.backbones import build
from tests.support.server import Server, serving
from weft.client import Client
from weft.client.errors import InvalidRequest

PROMPT = (5, 9, 33)
# what the door sees before the store does: field and words
AT_THE_DOOR = {"bytes_empty": ("header.weights_size", "must be >= 1, got 0")}
# what the client does not even send
IN_THE_FOLDER = ("json_large",)
# names of fields are cut to this on the wire
FIELD_LENGTH = 150


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    build("llama").save_pretrained(folder / "model")
    with serving(folder / "store", model=folder / "model") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server):
    with server.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def good(client: Client, tmp_path_factory):
    """An adapter that must go on answering, and its answer."""
    client.register("good", lora().write(tmp_path_factory.mktemp("good")))
    return client.generate(PROMPT, adapter="good", max_new_tokens=4).token_ids


def test_the_corpus_is_large_enough_to_mean_something():
    assert len(MALFORMED) >= 30


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_adapter_is_refused_by_field_and_nothing_changes(name, server, client, good, tmp_path):
    case = MALFORMED[name]
    field, words = AT_THE_DOOR.get(name, (case.field, case.words))
    before = (client.list(), client.info().memory, sorted(os.listdir(server.store / "objects")))
    with pytest.raises(InvalidRequest) as refusal:
        client.register("bad", case.files.write(tmp_path))
    assert words in refusal.value.message
    named = {violation.field[:FIELD_LENGTH] for violation in refusal.value.violations}
    assert named == ({field[:FIELD_LENGTH]} if field and name not in IN_THE_FOLDER else set())
    assert (client.list(), client.info().memory, sorted(os.listdir(server.store / "objects"))) == before
    assert client.generate(PROMPT, adapter="good", max_new_tokens=4).token_ids == good
