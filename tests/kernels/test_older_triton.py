"""The compile proof again with the oldest Triton that is served on: a GPU machine may have it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "3.6.0"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton is published for Linux only")
def test_no_kernel_spills_with_the_oldest_triton(tmp_path):
    where = tmp_path / "triton"
    install = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", where, f"triton=={OLDEST}"]
    subprocess.run(install, check=True)
    env = {**os.environ, "PYTHONPATH": f"{where}:{ROOT / 'build' / 'links'}"}
    code = f"import triton; assert triton.__version__ == {OLDEST!r}, triton.__version__"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    proof = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_compiled.py"]
    done = subprocess.run(proof, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
