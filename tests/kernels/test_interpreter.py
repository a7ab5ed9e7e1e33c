"""The Triton kernels under Triton's interpreter: the very cases that the twin passes, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(900)
def test_triton_passes_the_twins_cases() -> None:
    cases = [str(HERE / name) for name in ("test_apply.py", "test_isolation.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-k", "not real_size", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *cases], capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
