"""Sparse deltas of single rows, joined: the same bits as one by one, under a budget, gone with their blocks."""

import pytest
import torch
from torch import Tensor

from tests.kernels.examples import geometry
from weft.kernels import layout
from weft.kernels.batch import Block, Segment
from weft.kernels.extras import Extra, Kind
from weft.kernels.layout import ALIGN
from weft.kernels.twin import TorchKernels

OF = geometry(torch.float32)
SHAPE = OF.sites[0]


def delta(seed: int, share: float) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    kept = torch.rand(SHAPE.out_features, SHAPE.in_features, generator=random) < share
    return torch.randn(kept.shape, generator=random) * kept


def record(whole: Tensor) -> Extra:
    index = whole.flatten().nonzero().flatten()
    return Extra(Kind.SPARSE, 0, (index.int(), whole.flatten()[index]))


@pytest.fixture(scope="module")
def loaded() -> tuple[Tensor, list[Block], list[Tensor]]:
    """Four adapters of different density; one has a single entry."""
    wholes = [delta(seed, share) for seed, share in ((1, 0.3), (2, 0.02), (3, 0.9))]
    single = torch.zeros_like(wholes[0])
    single[3, 5] = 2.0
    wholes.append(single)
    images = [layout.pack(OF, {}, [record(whole)]) for whole in wholes]
    arena = torch.cat([*images, torch.zeros(ALIGN, dtype=torch.uint8)])
    blocks, at = [], 0
    for key, image in enumerate(images):
        blocks.append(Block(key, at, len(image), layout.directory(image)))
        at += len(image)
    return arena, blocks, wholes


def run(kernels: TorchKernels, blocks: list[Block | None], seed: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(y before, x, y after) with one row for each of these blocks."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randn(len(blocks), OF.out_features(0), generator=random)
    x = torch.randn(len(blocks), SHAPE.in_features, generator=random)
    after = y.clone()
    kernels.apply(after, x, kernels.rows([Segment(i, i + 1, block) for i, block in enumerate(blocks)]), 0)
    return y, x, after


def test_rows_gain_what_their_matrices_say(loaded):
    arena, blocks, wholes = loaded
    order = [2, None, 0, 3, 1, 0]
    kernels = TorchKernels(arena, OF, 1 << 20)
    y, x, after = run(kernels, [None if i is None else blocks[i] for i in order])
    for row, which in enumerate(order):
        want = y[row].double()
        if which is not None:
            want[: SHAPE.out_features] += wholes[which].double() @ x[row].double()
        torch.testing.assert_close(after[row].double(), want, rtol=1e-6, atol=1e-6)


def test_company_and_budget_change_no_bit(loaded):
    arena, blocks, _ = loaded
    _, _, mixed = run(TorchKernels(arena, OF, 1 << 20), list(blocks))
    for row, block in enumerate(blocks):
        lonely: list[Block | None] = [None] * len(blocks)
        lonely[row] = block
        assert torch.equal(run(TorchKernels(arena, OF, 1 << 20), lonely)[2][row], mixed[row])
    assert torch.equal(run(TorchKernels(arena, OF, 0), list(blocks))[2], mixed)


def test_what_is_kept_has_a_limit_and_goes_with_its_block(loaded):
    arena, blocks, _ = loaded
    kernels = TorchKernels(arena, OF, 1 << 20)
    before = kernels.working_set_bytes
    run(kernels, list(blocks))
    kept = kernels.working_set_bytes - before
    assert kept > 0
    run(kernels, list(blocks))
    assert kernels.working_set_bytes - before == kept
    kernels.forget(blocks[1].key)
    assert kernels.working_set_bytes == before
    tight = TorchKernels(arena, OF, 2 * (kept + 8))
    for order in ([0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0]):
        run(tight, [blocks[i] for i in order])
        assert tight.working_set_bytes <= kept + 8
