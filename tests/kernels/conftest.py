"""Which implementation the cases run on, and memory that is poisoned before it is written.

The same files run in three ways: on ``torch``; once more in a process of its own on ``triton`` under its
interpreter (``test_interpreter``), because with TRITON_INTERPRET set nothing can be compiled; and on a GPU.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.kernels.examples import Loaded
from weft.kernels import dispatch
from weft.kernels.dispatch import Kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Implementation:
    """An implementation and where its arenas lie."""

    name: str
    device: str

    def load(self, loaded: Loaded, working_set_bytes_max: int = 1 << 24) -> Kernels:
        return dispatch.load(self.name, loaded.arena, loaded.geometry, working_set_bytes_max)


HERE = Implementation("triton" if INTERPRETED else "torch", "cpu")
GPU = [Implementation(name, "cuda") for name in ("torch", "triton")]

# the interpreter multiplies and rounds bf16 wrongly
DTYPES = {"fp32": torch.float32, "fp16": torch.float16} | ({} if INTERPRETED else {"bf16": torch.bfloat16})


@pytest.fixture(
    params=[HERE, *(pytest.param(i, marks=pytest.mark.gpu) for i in GPU)], ids=lambda i: f"{i.name}-{i.device}"
)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    found: Implementation = request.param
    return found


@pytest.fixture(params=list(DTYPES.values()), ids=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory reads as NaN, so arithmetic that forgets part of its output, or reads past a factor, is caught."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fresh(*args: object, **options: object) -> torch.Tensor:
            tensor = allocate(*args, **options)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(255) if tensor.dtype == torch.uint8 else tensor

        return fresh

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=INTERPRETED)
def steady_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies by BLAS, where a row's sum depends on its place in a tile; on a device it does not."""
    from triton.runtime import interpreter

    def dot(self, a, b, d, *precision):
        left, right = (side.data.astype(d.data.dtype) for side in (a, b))
        product = np.add.reduce(left[:, :, None] * right[None, :, :], axis=1)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
