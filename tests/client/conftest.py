"""What the tests of the client and of the command line share."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.fake_server import FakeServer

WEIGHTS = bytes(range(256)) * 4096 * 2 + b"tail"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as in a file, whatever terminal or runner the tests run under."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A fresh fake server."""
    with FakeServer() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as peft saves it; the weights are a bit over 2 MiB."""
    root = tmp_path / "fr-legal"
    root.mkdir()
    (root / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (root / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return root
