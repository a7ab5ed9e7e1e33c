"""Several adapters in one request, on the real server over its socket, in one batch with plain requests."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.server import Server, serving, until
from weft.adapters_store.composition import derive
from weft.client import Adapters, Client, Finished, errors
from weft.server.demo import tasks

FOLDERS = tasks.ASSETS_DIR / "adapters"
COMPOSED = 'weft_memory_bytes{kind="composed",tier="device"}'
PLAIN = 'weft_memory_bytes{kind="adapters",tier="device"}'
# two of low rank, one of Kronecker products, one that scales
REVERSE, SWAP, SORT, UPPER = "reverse-lora-r2", "swap-lora-r4", "sort-krona", "upper-ia3"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def client(server: Server):
    """A connection to a server that has four adapters, and no others afterwards."""
    with server.client() as connected:
        for name in (REVERSE, SWAP, SORT, UPPER):
            connected.register(name, FOLDERS / name)
        yield connected
        for each in connected.list():
            connected.delete(each.name)


def answer(client: Client, adapter: Adapters, prompt: str) -> tuple[int, ...]:
    return client.generate(prompt, adapter=adapter, max_new_tokens=16, ignore_eos=True).token_ids


def test_composed_and_plain_requests_answer_in_one_batch_as_they_do_alone(server, client):
    said: list[Adapters] = [
        "", REVERSE, SORT, UPPER, [(REVERSE, 0.5), (SWAP, 0.5)], [REVERSE, SORT], [SORT, UPPER], [UPPER, SORT],
        {REVERSE: 1.0, SWAP: 0.0}, [(REVERSE, -1.0)],
    ]  # fmt: skip
    prompts = [prompt for prompt, _ in tasks.held_out(tasks.DEMO_ADAPTERS[0].task, 3, 7)]
    jobs = [(each, prompt) for each in said for prompt in prompts]
    alone = [answer(client, *job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: answer(client, *job), jobs))
    assert together == alone
    by_list = {str(each): [a for (e, _), a in zip(jobs, alone, strict=True) if e == each] for each in said}
    # one list is the single adapter, all others differ from each other
    assert by_list.pop(str(said[8])) == by_list[str(REVERSE)]
    assert len({str(answers) for answers in by_list.values()}) == len(by_list)


def test_the_task_of_one_adapter_is_answered_with_another_switched_off(client):
    pairs = tasks.held_out(tasks.DEMO_ADAPTERS[0].task, 5, 3)
    digest = client.get(REVERSE).digest
    for prompt, want in pairs:
        found = client.generate(prompt, adapter=[(REVERSE, 1.0), (UPPER, 0.0)], max_new_tokens=24)
        assert (found.text, found.adapter_digest) == (want, digest)


def test_the_version_that_answers_is_named_by_its_list(client):
    a, b = (client.get(name).digest for name in (REVERSE, SWAP))
    found = client.generate("abc=", adapter={REVERSE: 1.0, SWAP: 0.25}, max_new_tokens=2)
    assert found.adapter_digest == derive([(a, 1.0), (b, 0.25)])[0]
    assert client.generate("abc=", adapter=[(SWAP, 0.0)], max_new_tokens=2).adapter_digest == ""


def test_what_does_not_go_together_is_refused_by_name(client):
    with pytest.raises(errors.InvalidRequest) as refusal:
        client.generate("abc=", adapter=[(REVERSE, 1.0), (UPPER, 0.5)])
    assert refusal.value.reason == "ADAPTER_INVALID"
    assert refusal.value.violations[0].field == "adapters"
    assert str(refusal.value).startswith(f"weight of {UPPER}: expected 1, got 0.5 (it scales the ")
    stream = client.stream("abc=", adapter=[(REVERSE, 1.0), (UPPER, 0.5)])
    with pytest.raises(errors.InvalidRequest, match=f"weight of {UPPER}"):
        list(stream)
    assert answer(client, REVERSE, "abc=")


def test_derived_bytes_are_counted_apart_and_go_with_their_members(server, client):
    until(lambda: server.scrape()[COMPOSED] == 0)
    single = {name: client.get(name).device_bytes for name in (REVERSE, SWAP)}
    for name in single:
        answer(client, name, "abc=")
    plain = server.scrape()[PLAIN]
    answer(client, [REVERSE, SWAP], "abc=")
    answer(client, [REVERSE, SORT], "abc=")
    page = server.scrape()
    assert page[PLAIN] == plain, "N times A does not count what is derived"
    assert page[COMPOSED] == client.info().memory.composed_bytes > max(single.values())
    assert len(os.listdir(server.store / "composed")) == 2
    client.delete(SWAP)
    until(lambda: 0 < server.scrape()[COMPOSED] < page[COMPOSED])
    client.delete(REVERSE)
    until(lambda: server.scrape()[COMPOSED] == 0)
    assert os.listdir(server.store / "composed") == []


def test_a_member_in_use_is_deleted_when_its_last_request_ends(server, client):
    stream = client.stream("abcdef=", adapter=[REVERSE, SORT], max_new_tokens=300, ignore_eos=True)
    next(stream)
    digest = client.get(SORT).digest
    client.delete(SORT)
    with pytest.raises(errors.NotFound):
        client.generate("abc=", adapter=[REVERSE, SORT])
    assert (server.store / "objects" / digest).exists()
    *_, last = stream
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == 300
    until(lambda: not (server.store / "objects" / digest).exists())
    until(lambda: server.scrape()[COMPOSED] == 0)
