"""Every kernel compiles for the devices we serve on, without one, and keeps its numbers in registers."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which this machine's platform has no wheel of")

from tests.kernels import aot


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile anew, and leave nothing behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("target", list(aot.TARGETS))
@pytest.mark.parametrize("variant", list(aot.variants()), ids=str)
def test_no_kernel_spills(variant: aot.Variant, target: str) -> None:
    usage = aot.compile_variant(variant, target)
    assert usage["spilled"] == 0
    # what every one of these devices grants a program
    assert usage["shared"] <= 64 * 1024
