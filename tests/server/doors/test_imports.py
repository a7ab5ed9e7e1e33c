"""What the two processes carry: the front no torch, the engine no gRPC."""

import subprocess
import sys

import pytest

FRONT = ["weft.server.app", "weft.server.doors.door", "weft.server.text", "weft.server.registration"]


def loaded(module: str) -> set[str]:
    """Top-level packages in a process that imported this."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", FRONT)
def test_the_front_imports_neither_torch_nor_transformers(module):
    assert not loaded(module) & {"torch", "transformers", "triton"}


@pytest.mark.parametrize("module", ["weft.server.spawned", "weft.server.engine.messages", "weft.server.engine.config"])
def test_what_both_processes_share_imports_nothing_heavy(module):
    assert not loaded(module) & {"torch", "transformers", "grpc", "google", "prometheus_client", "tokenizers", "jinja2"}
