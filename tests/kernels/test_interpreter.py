"""The Triton kernels under Triton's interpreter: the very cases that the twin passes, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# interpreting takes a processor for minutes, so there are two processes of about the same length
HALVES = [["test_apply.py"], ["test_isolation.py", "test_norms.py", "test_deltas.py"]]


# tiles in half precision, which nothing else runs where no GPU is: every kernel once, on one mix of adapters
FEW = (
    "test_outputs_match_the_oracle and half and everything-1]",
    "test_scaled_inputs_match_the_oracle and fp16-5]",
    "test_deltas_match_the_oracle and fp16-2]",
    "test_overridden_norms_match_the_oracle and norm-3-0]",
)
SOME = "not fp16 or " + " or ".join(f"({case})" for case in FEW)


# the rest of fp16 is tried where there is time
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtypes", [SOME, pytest.param("fp16", marks=pytest.mark.slow)], ids=["some fp16", "all fp16"])
def test_triton_passes_the_twins_cases(dtypes: str) -> None:
    cases = f"not real_size and ({dtypes})"
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
