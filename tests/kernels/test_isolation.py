"""No row sees another: in a batch of one shape nothing that happens to other rows changes a bit of this one."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import INTERPRETED, Implementation
from tests.kernels.examples import GROUPS, Kinds, Loaded, applied, random_terms
from weft.kernels.activation import NAMES
from weft.kernels.batch import Segment
from weft.kernels.layout import Geometry, SiteShape, SiteTerms

# lengths of the requests' segments, and the one that is watched
DECODING = ([1, 1, 1, 1, 1, 1], 2)
SEVERAL_ROWS = ([1, 3, 2, 1, 1], 2)
PROMPT = ([1, 34, 37, 1, 66], 2)
AMONG_PROMPTS = ([40, 1, 34, 1], 1)
SHAPES = {"decoding": DECODING, "several rows": SEVERAL_ROWS, "a prompt": PROMPT, "among prompts": AMONG_PROMPTS}
EVERY = [(shape, group) for shape in SHAPES for group in range(len(GROUPS))]
# groups differ in how many sites they have; interpreting each shape at all of them takes minutes
INTERPRETED_ONES = [("decoding", 1), ("decoding", 2), ("several rows", 0), ("a prompt", 1), ("among prompts", 0)]

# adapters of the others while the watched segment has adapter 0: alone, with twins, crowded, the same shapes
OTHERS: Sequence[Sequence[int | None]] = [
    [None, None, None, None, None],
    [0, 0, 0, 0, 0],
    [1, 2, 3, 4, 1],
    [None, 0, 1, None, 0],
    [4, 0, 0, 2, None],
]


def kinds_of(shape: str) -> Kinds:
    """All kinds; the interpreter is too slow for Kronecker terms in many rows."""
    return Kinds(kron=not INTERPRETED or shape == "decoding")


def batch(loaded: Loaded, lengths: Sequence[int], watched: int, others: Sequence[int | None]) -> list[Segment]:
    adapters = [*others[:watched], 0, *others[watched:]]
    return loaded.segments(list(zip(lengths, adapters, strict=False)))


def assert_bit_equal(left: Tensor, right: Tensor) -> None:
    same_width = {2: torch.int16, 4: torch.int32}[left.itemsize]
    assert torch.equal(left.contiguous().view(same_width), right.contiguous().view(same_width))


@pytest.mark.parametrize(("shape", "group"), INTERPRETED_ONES if INTERPRETED else EVERY)
def test_a_row_does_not_see_its_neighbours_adapters(
    implementation: Implementation, dtype: torch.dtype, shape: str, group: int
) -> None:
    lengths, watched = SHAPES[shape]
    loaded = Loaded.random(dtype, 5, kinds_of(shape), seed=2, device=implementation.device)
    y, x = loaded.tensors(sum(lengths), group, dtype)
    start = sum(lengths[:watched])
    rows = slice(start, start + lengths[watched])
    kernels = implementation.load(loaded)
    first = None
    for others in OTHERS[::2] if INTERPRETED else OTHERS:
        got = applied(kernels, batch(loaded, lengths, watched, others), y, x, group)[rows]
        first = got if first is None else first
        assert_bit_equal(got, first)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_see_its_neighbours_failures(
    implementation: Implementation, dtype: torch.dtype, shape: str
) -> None:
    lengths, watched = SHAPES[shape]
    loaded = Loaded.random(dtype, 5, kinds_of(shape), seed=2, device=implementation.device)
    segments = batch(loaded, lengths, watched, OTHERS[1])
    y, x = loaded.tensors(sum(lengths), 0, dtype)
    kernels = implementation.load(loaded)
    want = applied(kernels, segments, y, x, 0)
    rows = slice(segments[watched].start, segments[watched].stop)
    sick = torch.full_like(x, torch.nan)
    sick[rows] = x[rows]
    got = applied(kernels, segments, y, sick, 0)
    assert_bit_equal(got[rows], want[rows])


def test_a_bad_block_spoils_the_rows_of_its_adapter_only(implementation: Implementation, dtype: torch.dtype) -> None:
    loaded = Loaded.random(dtype, 5, Kinds(kron=False, vectors=False), seed=2, device=implementation.device)
    kernels = implementation.load(loaded)
    segments = loaded.segments([(1, 0), (1, 1), (1, 2), (2, 1), (40, 1), (1, 3), (36, 0)])
    y, x = loaded.tensors(segments[-1].stop, 0, dtype)
    before = applied(kernels, segments, y, x, 0)
    bad = loaded.blocks[1]
    head = int(loaded.arena[bad.offset : bad.offset + 16].cpu().view(torch.int32)[3]) * 16
    loaded.arena[bad.offset + head : bad.offset + bad.nbytes] = 255
    kernels.forget(bad.key)
    after = applied(kernels, segments, y, x, 0)
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        if segment.block is bad:
            assert after[rows].isnan().any(dim=1).all()
        else:
            assert_bit_equal(after[rows], before[rows])


@pytest.mark.parametrize("function", NAMES)
def test_a_bent_row_does_not_see_its_neighbours(
    implementation: Implementation, dtype: torch.dtype, function: str
) -> None:
    """Functions are computed many numbers at once, and what is left over by other code."""
    shape, noise = Geometry((SiteShape(40, 24),), (1,), dtype), torch.Generator().manual_seed(0)

    def terms(rank: int, act: int) -> dict[int, SiteTerms]:
        pair = torch.randn(rank, 40, generator=noise) / 4, torch.randn(24, rank, generator=noise) / 4
        return {0: SiteTerms(pair, inner=torch.randn(rank, generator=noise), act=act)}

    code = NAMES.index(function)
    adapters = [terms(20, code), terms(3, code), terms(17, (code + 1) % len(NAMES)), terms(33, code), terms(5, 0)]
    loaded = Loaded.of(shape, adapters, implementation.device)
    kernels = implementation.load(loaded)
    y, x = loaded.tensors(11, 0, dtype)
    results = []
    companies = [*OTHERS, [3, 1, 2, 4, None], [1, None, None, 1, 1]]
    for others in companies[::3] if INTERPRETED else companies:
        got = applied(kernels, batch(loaded, [1, 2, 1, 3, 2, 2], 3, others), y, x, 0)
        results.append(got[4:7])
    for got in results[1:]:
        assert_bit_equal(got, results[0])


@pytest.mark.parametrize("length", [1, 4, 32, 33, 64])
def test_rows_of_a_real_size_do_not_see_each_other(implementation: Implementation, length: int) -> None:
    shape = Geometry((SiteShape(576, 576), SiteShape(576, 192), SiteShape(1536, 576)), (2, 1), torch.bfloat16)
    noise = torch.Generator().manual_seed(0)

    def adapter(rank: int) -> dict[int, SiteTerms]:
        return {
            i: SiteTerms((torch.randn(rank, s.in_features, generator=noise), torch.randn(s.out_features, rank)))
            for i, s in enumerate(shape.sites)
        }

    mixed = random_terms(shape.sites[0], Kinds(), random.Random(1), noise)
    loaded = Loaded.of(shape, [adapter(16), adapter(16), adapter(8), adapter(64), {0: mixed}], implementation.device)
    kernels = implementation.load(loaded)
    for group in range(2):
        y, x = loaded.tensors(6 * length, group, torch.bfloat16)
        results = [applied(kernels, batch(loaded, [length] * 6, 3, others), y, x, group) for others in OTHERS]
        for got in results[1:]:
            assert_bit_equal(got[3 * length : 4 * length], results[0][3 * length : 4 * length])
