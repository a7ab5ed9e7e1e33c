"""What adapters add to a group's outputs, against the oracle in fp64."""

import math

import pytest
import torch

from tests.kernels.conftest import INTERPRETED, Implementation
from tests.kernels.examples import (
    GROUPS,
    LONG,
    MIXES,
    Kinds,
    Loaded,
    applied,
    assert_no_worse_than_torch,
    plain_torch,
)
from weft.kernels import reference
from weft.kernels.activation import NAMES, activate
from weft.kernels.batch import BatchError, Segment
from weft.kernels.layout import Geometry, SiteShape, SiteTerms

KINDS = {
    "low-rank": Kinds(kron=False, vectors=False, bends=False),
    "bottlenecks": Kinds(kron=False, vectors=False),
    "kron": Kinds(low_rank=False, vectors=False),
    "vectors": Kinds(low_rank=False, kron=False),
    "everything": Kinds(),
}
# a mix of prompts and answers, base rows among them
ALONE = "half base"


# one kind alone takes its way in any mix; interpreting them all takes minutes
CASES = [(mix, kinds) for mix in MIXES for kinds in KINDS if not INTERPRETED or mix == ALONE or kinds == "everything"]


@pytest.mark.parametrize("group", range(len(GROUPS)))
@pytest.mark.parametrize(("mix", "kinds"), CASES)
def test_outputs_match_the_oracle(
    implementation: Implementation, dtype: torch.dtype, mix: str, kinds: str, group: int
) -> None:
    loaded = Loaded.random(dtype, 4, KINDS[kinds], seed=3, device=implementation.device)
    segments = loaded.segments(MIXES[mix])
    y, x = loaded.tensors(sum(length for length, _ in MIXES[mix]), group, dtype)
    got = applied(implementation.load(loaded), segments, y, x, group)
    want = reference.apply(y, x, segments, group, loaded.arena, loaded.geometry)
    assert_no_worse_than_torch(got, plain_torch(y, x, segments, group, loaded), want)


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_outputs_of_long_prompts_match_the_oracle(
    implementation: Implementation, dtype: torch.dtype, group: int
) -> None:
    loaded = Loaded.random(dtype, 4, Kinds(), seed=3, device=implementation.device)
    segments = loaded.segments(LONG)
    y, x = loaded.tensors(segments[-1].stop, group, dtype)
    got = applied(implementation.load(loaded), segments, y, x, group)
    want = reference.apply(y, x, segments, group, loaded.arena, loaded.geometry)
    assert_no_worse_than_torch(got, plain_torch(y, x, segments, group, loaded), want)


def test_long_sums_match_the_oracle(implementation: Implementation, dtype: torch.dtype) -> None:
    """Inputs so wide that their products are made in parts; sizes that divide by 16."""
    of = Geometry((SiteShape(1088, 64), SiteShape(1088, 32)), (2,), dtype)
    noise = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=noise) / math.sqrt(size[-1])

    kron = ((normal(8, 8), normal(8, 136)),)
    adapters = [
        {0: SiteTerms((normal(5, 1088), normal(64, 5))), 1: SiteTerms((normal(16, 1088), normal(32, 16)))},
        {0: SiteTerms((normal(3, 1088), normal(64, 3)), kron, beta=normal(64))},
        {1: SiteTerms((normal(33, 1088), normal(32, 33)), sigma=normal(32))},
    ]
    loaded = Loaded.of(of, adapters, implementation.device)
    segments = loaded.segments(LONG)
    y, x = loaded.tensors(segments[-1].stop, 0, dtype)
    got = applied(implementation.load(loaded), segments, y, x, 0)
    want = reference.apply(y, x, segments, 0, loaded.arena, of)
    assert_no_worse_than_torch(got, plain_torch(y, x, segments, 0, loaded), want)


def test_factors_far_from_square_match_the_oracle(implementation: Implementation, dtype: torch.dtype) -> None:
    """Terms that are fused beside terms that go in two stages, some with all that a site can have."""
    of = Geometry((SiteShape(320, 192), SiteShape(320, 96)), (2,), dtype)
    noise = torch.Generator().manual_seed(0)

    def term(o1: int, i1: int, site: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = of.sites[site]
        sizes = (o1, i1), (shape.out_features // o1, shape.in_features // i1)
        w1, w2 = (torch.randn(*size, generator=noise) / math.sqrt(size[1]) for size in sizes)
        return w1, w2

    pair = torch.randn(3, 320, generator=noise) / 18, torch.randn(96, 3, generator=noise)
    adapters = [
        {0: SiteTerms(krons=(term(4, 4, 0),)), 1: SiteTerms(krons=(term(8, 32, 1),))},
        {0: SiteTerms(krons=(term(12, 20, 0), term(12, 5, 0), term(12, 2, 0)), sigma=torch.linspace(1, 2, 192))},
        {1: SiteTerms(pair, (term(3, 2, 1), term(3, 1, 1)), beta=torch.ones(96), inner=torch.ones(3), act=2)},
    ]
    loaded = Loaded.of(of, adapters, implementation.device)
    segments = loaded.segments([(1, 0), (1, 0), (2, 1), (5, 2), (1, None), (20, 0), (66, 2)])
    y, x = loaded.tensors(segments[-1].stop, 0, dtype)
    got = applied(implementation.load(loaded), segments, y, x, 0)
    want = reference.apply(y, x, segments, 0, loaded.arena, of)
    assert_no_worse_than_torch(got, plain_torch(y, x, segments, 0, loaded), want)


@pytest.mark.parametrize("function", NAMES)
def test_functions_are_exact_over_their_range(implementation: Implementation, function: str) -> None:
    """Through maps that change nothing, so that what is seen is the function, also where it is almost flat."""
    of, eye = Geometry((SiteShape(64, 64),), (1,), torch.float32), torch.eye(64)
    loaded = Loaded.of(of, [{0: SiteTerms((eye, eye), act=NAMES.index(function))}], implementation.device)
    x = torch.cat([torch.linspace(-90, 90, 1024), torch.linspace(-1, 1, 1024), torch.logspace(-6, 0, 512)])
    x = torch.cat([x, -x]).view(-1, 64).to(implementation.device)
    for mix in ([(1, 0)] * len(x), [(len(x), 0)]):
        got = applied(implementation.load(loaded), loaded.segments(mix), torch.zeros_like(x), x, 0)
        want = activate(x.double(), NAMES.index(function))
        # of the number where functions pass through zero, of one where they cancel far from there
        scale = torch.where(x.abs() < 1, want.abs(), want.abs().clamp(min=1))
        assert ((got - want).abs() <= 1e-6 * scale).all()


def test_a_function_of_no_number_is_no_number(implementation: Implementation) -> None:
    of, eye = Geometry((SiteShape(16, 16),), (1,), torch.float32), torch.eye(16)
    adapters = [{0: SiteTerms((eye, eye), act=code)} for code in range(len(NAMES))]
    loaded = Loaded.of(of, adapters, implementation.device)
    segments = loaded.segments([(1, code) for code in range(len(NAMES))])
    x = torch.full((len(NAMES), 16), torch.nan, device=implementation.device)
    assert applied(implementation.load(loaded), segments, torch.zeros_like(x), x, 0).isnan().all()


@pytest.mark.parametrize("mix", [ALONE, "prompts and answers"] if INTERPRETED else MIXES)
def test_base_rows_keep_every_bit(implementation: Implementation, dtype: torch.dtype, mix: str) -> None:
    loaded = Loaded.random(dtype, 4, Kinds(), device=implementation.device)
    segments = loaded.segments(MIXES[mix])
    y, x = loaded.tensors(sum(length for length, _ in MIXES[mix]), 0, dtype)
    # a sum with zero would turn this into +0
    y[:, 0] = -0.0
    got = applied(implementation.load(loaded), segments, y, x, 0)
    for segment in segments:
        if segment.block is None:
            rows = slice(segment.start, segment.stop)
            width = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(got[rows].contiguous().view(width), y[rows].contiguous().view(width))


def test_inputs_and_outputs_may_have_other_dtypes_than_the_factors(implementation: Implementation) -> None:
    loaded = Loaded.random(torch.float16, 4, Kinds(), seed=1, device=implementation.device)
    segments = loaded.segments(MIXES["half base"])
    tokens = segments[-1].stop
    for x_dtype, y_dtype in ((torch.float32, torch.float32), (torch.float16, torch.float32)):
        y, x = loaded.tensors(tokens, 1, torch.float32)
        x = x.to(x_dtype)
        got = applied(implementation.load(loaded), segments, y.to(y_dtype), x, 1)
        want = reference.apply(y, x, segments, 1, loaded.arena, loaded.geometry)
        assert_no_worse_than_torch(got, plain_torch(y, x.half(), segments, 1, loaded).to(y_dtype), want)


@pytest.mark.parametrize("site", range(6))
def test_scaled_inputs_match_the_oracle(implementation: Implementation, dtype: torch.dtype, site: int) -> None:
    loaded = Loaded.random(dtype, 4, Kinds(), device=implementation.device)
    segments = loaded.segments(MIXES["prompts and answers"])
    group = [0, 0, 0, 1, 1, 2][site]
    _, x = loaded.tensors(segments[-1].stop, group, dtype)
    kernels = implementation.load(loaded)
    rows = kernels.rows(segments)
    before = x.clone()
    got = kernels.scale_input(x, rows, site)
    want = reference.scale_input(x, segments, site, loaded.arena, loaded.geometry)
    assert torch.equal(x, before)
    assert torch.equal(got, want.to(dtype))
    scaled = {row for start, stop in kernels.input_scaled(rows, site) for row in range(start, stop)}
    assert scaled >= {row for row in range(len(x)) if not torch.equal(got[row], x[row])}


def test_a_group_without_operators_is_not_touched(implementation: Implementation) -> None:
    loaded = Loaded.random(torch.float32, 2, Kinds(), device=implementation.device)
    kernels = implementation.load(loaded)
    base = kernels.rows(loaded.segments([(2, None)]))
    assert not any(kernels.touches(base, group) for group in range(len(GROUPS)))
    rows = kernels.rows(loaded.segments([(2, None), (1, 0)]))
    for group, members in enumerate(loaded.geometry.members):
        words = loaded.blocks[0].directory.sites[members.start : members.stop, [1, 4, 5, 6]]
        assert kernels.touches(rows, group) == bool(words.any())


def test_rows_are_applied_many_times(implementation: Implementation) -> None:
    loaded = Loaded.random(torch.float32, 4, Kinds(), device=implementation.device)
    kernels = implementation.load(loaded)
    segments = loaded.segments(MIXES["half base"])
    rows = kernels.rows(segments)
    for group in (1, 2, 1) if INTERPRETED else (0, 1, 2, 0, 1, 2):
        y, x = loaded.tensors(segments[-1].stop, group, torch.float32)
        got = y.clone()
        kernels.apply(got, x, rows, group)
        assert torch.equal(got, applied(implementation.load(loaded), segments, y, x, group))


def test_shapes_are_checked(implementation: Implementation) -> None:
    loaded = Loaded.random(torch.float32, 2, Kinds(), device=implementation.device)
    kernels = implementation.load(loaded)
    rows = kernels.rows(loaded.segments([(2, 0)]))
    y, x = loaded.tensors(2, 0, torch.float32)
    with pytest.raises(BatchError, match=r"^y: expected \[2, 74\], got \[2, 73\]$"):
        kernels.apply(y[:, 1:], x, rows, 0)
    with pytest.raises(BatchError, match=r"^x: expected \[2, 36\], got \[1, 36\]$"):
        kernels.apply(y, x[:1], rows, 0)
    with pytest.raises(BatchError, match=r"^x: expected fp32, bf16 or fp16, got torch.float64$"):
        kernels.apply(y, x.double(), rows, 0)
    with pytest.raises(BatchError, match=r"^x: expected columns side by side"):
        kernels.apply(y, x.T.contiguous().T, rows, 0)
    with pytest.raises(BatchError, match=r"^segments: expected one that starts at row 2, got 3..4$"):
        kernels.rows([Segment(0, 2, None), Segment(3, 4, None)])
