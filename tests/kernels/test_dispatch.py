"""Choosing an implementation."""

import subprocess
import sys

import pytest
import torch

from tests.kernels.examples import Kinds, Loaded
from weft.kernels import dispatch
from weft.kernels.dispatch import KernelsUnavailable
from weft.kernels.tiles import tiles_for


@pytest.fixture
def loaded() -> Loaded:
    return Loaded.random(torch.float32, 1, Kinds())


def test_a_cpu_runs_torch(loaded: Loaded) -> None:
    assert dispatch.load("auto", loaded.arena, loaded.geometry, 0).name == "torch"


def test_names_are_checked(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match=r"^kernels: expected one of auto, torch, triton, got 'cuda'$"):
        dispatch.load("cuda", loaded.arena, loaded.geometry, 0)


def test_triton_on_a_cpu_needs_its_interpreter(loaded: Loaded) -> None:
    with pytest.raises(KernelsUnavailable, match="needs a GPU"):
        dispatch.load("triton", loaded.arena, loaded.geometry, 0)


def test_arenas_are_checked(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match=r"^arena: expected contiguous uint8"):
        dispatch.load("torch", loaded.arena.view(torch.int32), loaded.geometry, 0)
    with pytest.raises(ValueError, match=r"^arena: expected a multiple of 256 bytes, got 255$"):
        dispatch.load("torch", loaded.arena[:255], loaded.geometry, 0)


def test_a_machine_without_triton_serves_and_says_what_it_lacks() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from weft.kernels import dispatch
from weft.kernels.layout import Geometry, SiteShape
geometry = Geometry((SiteShape(4, 4),), (1,), torch.float32)
arena = torch.zeros(256, dtype=torch.uint8)
assert dispatch.load("auto", arena, geometry, 0).name == "torch"
try:
    dispatch.load("triton", arena, geometry, 0)
except dispatch.KernelsUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "kernels=triton needs the triton package, which is not installed\n"


def test_the_twin_does_not_import_triton() -> None:
    program = "import sys, weft.kernels.twin; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("exact", [False, True])
def test_planes_cover_all_features_and_depend_on_them_only(exact: bool) -> None:
    tiles = tiles_for("a device nobody has tuned for", exact)
    for features in (1, 20, 511, 512, 513, 576, 1536, 4096, 11008, 14336):
        span, planes = tiles.split(features)
        assert (planes - 1) * span < features <= planes * span
        assert planes <= tiles.split_k["splits_max"]
        assert all(span % options["BK"] == 0 for options in tiles.shrink.values())
