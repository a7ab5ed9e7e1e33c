"""Norms with adapters' own weights, against the oracle in fp64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Implementation
from tests.kernels.examples import Loaded, assert_no_worse_than_torch, geometry
from weft.kernels import reference
from weft.kernels.batch import Segment
from weft.kernels.dispatch import Kernels
from weft.kernels.extras import Extra, Kind
from weft.kernels.norms import Norm

PLACES = 3
# per adapter and place: whether it has a weight and a bias of its own
OWN = [[(1, 1), (1, 0), (0, 1)], [(1, 0), (0, 0), (1, 1)], [(0, 0), (0, 1), (1, 0)]]
MIX = [(1, 0), (2, None), (1, 1), (20, 2), (1, 0), (3, None), (2, 1)]
FORMS = {
    "layer norm": Norm(torch.ones(1), torch.ones(1), 1e-5, True, 0.0),
    "rms": Norm(torch.ones(1), None, 1e-6, False, 0.0),
    "rms around one": Norm(torch.ones(1), None, 1e-6, False, 1.0),
}


def loaded(dtype: torch.dtype, features: int, device: str) -> Loaded:
    noise = torch.Generator().manual_seed(1)
    vector = lambda there: torch.randn(features, generator=noise) if there else None  # noqa: E731
    records = [
        [Extra(Kind.NORM, place, (vector(w), vector(b))) for place, (w, b) in enumerate(own) if w or b] for own in OWN
    ]
    return Loaded.of(geometry(dtype), [{} for _ in OWN], device, records)


def module(form: str, features: int, dtype: torch.dtype, device: str) -> Norm:
    noise = torch.Generator().manual_seed(2)
    bias = torch.randn(features, generator=noise).to(device, dtype) if FORMS[form].bias is not None else None
    return replace(FORMS[form], weight=torch.randn(features, generator=noise).to(device, dtype), bias=bias)


def frozen(x: Tensor, norm: Norm) -> Tensor:
    return reference.norm(x, norm, None, None).to(x.dtype)


def numbers(tokens: int, groups: int, features: int, dtype: torch.dtype, device: str) -> Tensor:
    """[tokens, groups, features], off zero and of several sizes, as a view that is not contiguous."""
    noise = torch.Generator().manual_seed(3)
    x = (torch.randn(groups, tokens, features + 8, generator=noise) + 0.5) * torch.logspace(-3, 2, tokens)[:, None]
    return x.to(device, dtype).transpose(0, 1)[:, :, 8:]


def overridden(kernels: Kernels, segments: list[Segment], x: Tensor, place: int, norm: Norm) -> Tensor:
    out = frozen(x, norm).contiguous()
    kernels.override_norm(out, x, kernels.rows(segments), place, norm)
    return out


@pytest.mark.parametrize("place", range(PLACES))
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_overridden_norms_match_the_oracle(
    implementation: Implementation, dtype: torch.dtype, form: str, groups: int, place: int
) -> None:
    features = 20
    arena = loaded(dtype, features, implementation.device)
    norm = module(form, features, dtype, implementation.device)
    segments = arena.segments(MIX)
    x = numbers(segments[-1].stop, groups, features, dtype, implementation.device)
    got = overridden(implementation.load(arena), segments, x, place, norm)
    want, plain = frozen(x, norm).double(), frozen(x, norm)
    for segment in segments:
        record = next((r for r in segment.block.directory.records if r.place == place), None) if segment.block else None
        rows = slice(segment.start, segment.stop)
        if record is None:
            assert torch.equal(got[rows], plain[rows])
            continue
        assert segment.block is not None
        pieces = implementation.load(arena)._pieces_of(segment.block, record)
        weight, bias = (None if piece is None else piece[0] for piece in pieces)
        want[rows] = reference.norm(x[rows], norm, weight, bias)
        own = (norm.weight if weight is None else weight).to(dtype)
        rough = reference.norm(x[rows], norm, torch.zeros_like(own) + 1 - norm.offset, 0 * own).to(dtype)
        shift = norm.bias if bias is None else bias
        plain[rows] = rough * (norm.offset + own) + (0 if shift is None else shift.to(dtype))
    assert_no_worse_than_torch(got, plain, want)


def test_a_row_is_normed_alike_in_any_company(implementation: Implementation, dtype: torch.dtype) -> None:
    features = 100
    arena = loaded(dtype, features, implementation.device)
    norm = module("layer norm", features, dtype, implementation.device)
    x = numbers(9, 2, features, dtype, implementation.device)
    kernels = implementation.load(arena)
    results = [
        overridden(kernels, arena.segments([(4, before), (2, 0), (3, behind)]), x, 0, norm)[4:6]
        for before, behind in ((None, None), (0, 0), (1, 2), (2, None))
    ]
    for got in results[1:]:
        assert torch.equal(got, results[0])


def test_a_place_that_no_adapter_has_is_not_touched(implementation: Implementation) -> None:
    arena = loaded(torch.float32, 20, implementation.device)
    kernels = implementation.load(arena)
    rows = kernels.rows(arena.segments([(2, 1), (1, None)]))
    assert [kernels.has(rows, Kind.NORM, place) for place in range(PLACES)] == [True, False, True]
    x = numbers(3, 1, 20, torch.float32, implementation.device)
    out = torch.zeros_like(x).contiguous()
    kernels.override_norm(out, x, rows, 1, module("rms", 20, torch.float32, implementation.device))
    assert not out.any()
