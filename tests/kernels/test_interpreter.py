"""The Triton kernels under Triton's interpreter: the very cases that the twin passes, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# interpreting takes a processor for minutes, so there are two processes of about the same length
HALVES = [["test_apply.py"], ["test_isolation.py", "test_norms.py", "test_deltas.py"]]


# fp16 takes the paths of bf16 and fp32; it is tried where there is time
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtypes", ["not fp16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_triton_passes_the_twins_cases(dtypes: str) -> None:
    cases = f"not real_size and {dtypes}"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-k", cases, "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    halves = [
        subprocess.Popen(
            [*command, *(str(HERE / name) for name in names)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=HERE.parents[1],
        )
        for names in HALVES
    ]
    for half, (out, _) in [(half, half.communicate()) for half in halves]:
        assert half.returncode == 0, out[-8000:]
        assert " passed" in out
        assert " skipped" not in out
