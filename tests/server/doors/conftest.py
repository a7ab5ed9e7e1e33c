"""One server for all tests of a module that leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.server.doors.harness import Running, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with short limits and a tokenizer."""
    with running(tmp_path_factory.mktemp("server"), queue_requests_max=4, queue_tokens_max=600) as started:
        yield started
