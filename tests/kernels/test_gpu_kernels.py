"""The timing of kernels runs through: every case does something, to every layer's own adapters."""

from collections.abc import Callable

import pytest
import torch

from weft.bench import gpu_kernels
from weft.kernels import dispatch

CPU = torch.device("cpu")


def test_every_case_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "REQUESTS", 4)
    monkeypatch.setattr(gpu_kernels, "DISTINCT", (1, 4))
    rows = list(gpu_kernels.measured(CPU, 64, 32))
    assert len(rows) == 2 * len(gpu_kernels.CASES)
    assert all(float(str(row["us"])) > 0 for row in rows)


@pytest.mark.parametrize("name", gpu_kernels.CASES)
def test_every_case_changes_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "REQUESTS", 4)
    case = gpu_kernels.CASES[name]
    shape, arena, blocks = gpu_kernels.loaded(case, 2, 64, 32, CPU)
    kernels = dispatch.load("torch", arena, shape, 1 << 24)
    touched: list[torch.Tensor] = []

    def seen(done: Callable[..., None]) -> Callable[..., None]:
        def call(y: torch.Tensor, *rest: object) -> None:
            touched.append(y)
            done(y, *rest)

        return call

    for entry in ("apply", "override_norm"):
        monkeypatch.setattr(kernels, entry, seen(getattr(kernels, entry)))
    gpu_kernels.layers(case, kernels, blocks, 64, 32)()
    assert len(touched) == gpu_kernels.LAYERS
    assert touched[-1].flatten(1).any(dim=1).all()
