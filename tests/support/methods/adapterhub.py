"""AdapterHub's methods: its library's golden adapters moved away from their values, judged by hooks on plain models."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.adapterhub import FAMILIES, folder, kinds
from tests.support.backbones import build
from tests.support.hub_oracle import oracle
from tests.support.methods.case import ALL, Case, Oracle

# one of each method and of what is computed in another way
KINDS = (
    "houlsby",
    "houlsby_gated",
    "pfeiffer",
    "pfeiffer_norm",
    "parallel",
    "parallel_learned",
    "adapter_plus",
    "compacter",
    "compacter_plus",
    "lora",
    "lora_gated",
    "dora",
    "vera",
    "ia3",
    "prefix",
    "prefix_flat",
    "prefix_gated",
    "mam",
    "unipelt",
)


def _make(kind: str) -> Callable[[str, Path, int], Path]:
    def make(family: str, target: Path, seed: int) -> Path:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder(family, kind) / "adapter_config.json", target)
        random = torch.Generator().manual_seed(seed)
        moved = {
            name: value + 0.4 * value.abs().mean() * torch.randn(value.shape, generator=random)
            for name, value in load_file(folder(family, kind) / "adapter.safetensors").items()
        }
        save_file(moved, target / "adapter.safetensors")
        return target

    return make


def _oracle(family: str, target: Path) -> Oracle:
    return oracle(build(family), target)


CASES = tuple(
    Case(f"hub_{kind}", _make(kind), _oracle, tuple(f for f in ALL if f in FAMILIES and kind in kinds(f)))
    for kind in KINDS
)
