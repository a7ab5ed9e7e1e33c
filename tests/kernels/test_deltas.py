"""Deltas of linears that are mostly zero, against the oracle in fp64."""

import random

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import INTERPRETED, Implementation
from tests.kernels.examples import GROUPS, Kinds, Loaded, applied, assert_no_worse_than_torch, geometry, random_adapter
from weft.kernels import reference
from weft.kernels.batch import Segment
from weft.kernels.extras import Extra, Kind
from weft.kernels.layout import Geometry, unpack_records

MIX = [(1, 0), (2, None), (1, 1), (20, 2), (1, 0), (1, 3), (3, None), (40, 1)]


def entries(of: Geometry, site: int, count: int, dice: random.Random, noise: torch.Generator) -> Extra:
    """So many entries, half of them in the first quarter of the outputs; some outputs have none."""
    shape = of.sites[site]
    size = shape.in_features * shape.out_features
    flat = sorted({dice.randrange(size // 4 if i % 2 else size) for i in range(count)})
    index = torch.tensor(flat, dtype=torch.int32)
    return Extra(Kind.SPARSE, site, (index, torch.randn(len(flat), generator=noise).to(of.dtype)))


def rows(of: Geometry, site: int, count: int, dice: random.Random, noise: torch.Generator) -> Extra:
    shape = of.sites[site]
    index = torch.tensor(sorted(dice.sample(range(shape.out_features), count)), dtype=torch.int32)
    weight = torch.randn(count, shape.in_features, generator=noise) / shape.in_features**0.5
    return Extra(Kind.ROWS, site, (index, weight.to(of.dtype)))


def loaded(dtype: torch.dtype, device: str) -> Loaded:
    """Adapters with entries, rows, both beside other operators, and two records of a kind at one site."""
    of, dice, noise = geometry(dtype), random.Random(5), torch.Generator().manual_seed(5)
    records = [
        [entries(of, site, count, dice, noise) for site, count in ((0, 1), (1, 200), (3, 40), (5, 300))],
        [rows(of, site, count, dice, noise) for site, count in ((1, 6), (2, 40), (4, 3))],
        [make(of, site, 5, dice, noise) for site in range(6) for make in (entries, rows)],
        [entries(of, 0, 50, dice, noise), entries(of, 0, 60, dice, noise), rows(of, 0, 2, dice, noise)],
    ]
    adapters = [random_adapter(of, 7, Kinds(kron=False)) if i == 2 else {} for i in range(len(records))]
    return Loaded.of(of, adapters, device, records)


def dense(extra: Extra, of: Geometry) -> Tensor:
    """The delta [out, in] of a record, in its own dtype."""
    shape, (index, values) = of.sites[extra.place], extra.tensors
    assert index is not None
    assert values is not None
    delta = torch.zeros(shape.out_features, shape.in_features, dtype=values.dtype, device=values.device)
    if extra.kind is Kind.ROWS:
        delta[index.flatten().long()] = values
    else:
        delta.view(-1)[index.flatten().long()] = values.flatten()
    return delta


def expected(y: Tensor, x: Tensor, segments: list[Segment], group: int, arena: Loaded) -> tuple[Tensor, Tensor]:
    """(the oracle's outputs, plain torch's)."""
    want = reference.apply(y, x, segments, group, arena.arena, arena.geometry)
    plain = want.to(y.dtype)
    for segment in segments:
        block, own, left = segment.block, slice(segment.start, segment.stop), 0
        found = unpack_records(arena.geometry, arena.arena[block.offset : block.offset + block.nbytes]) if block else ()
        for site in arena.geometry.members[group]:
            right = left + arena.geometry.sites[site].out_features
            for extra in found:
                if extra.place == site:
                    delta = dense(extra, arena.geometry)
                    want[own, left:right] += x[own].double() @ delta.double().T
                    plain[own, left:right] += x[own] @ delta.T
            left = right
    return want, plain


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_deltas_match_the_oracle(implementation: Implementation, dtype: torch.dtype, group: int) -> None:
    arena = loaded(dtype, implementation.device)
    segments = arena.segments(MIX)
    y, x = arena.tensors(segments[-1].stop, group, dtype)
    got = applied(implementation.load(arena), segments, y, x, group)
    want, plain = expected(y, x, segments, group, arena)
    assert_no_worse_than_torch(got, plain, want)
    # what is measured is no rounding of the base
    assert (got.double() - y.double()).norm() > y.double().norm() / 10


def test_the_oracle_of_entries_is_the_matrix() -> None:
    of = geometry(torch.float32)
    extra = entries(of, 3, 90, random.Random(0), torch.Generator().manual_seed(0))
    index, values = extra.tensors
    assert index is not None
    assert values is not None
    x = torch.randn(4, 100)
    torch.testing.assert_close(reference.entries(x, index, values, 64), x.double() @ dense(extra, of).double().T)


@pytest.mark.parametrize("spread", ["one output", "one input", "every output once", "all of a corner"])
def test_entries_may_lie_anyhow(implementation: Implementation, spread: str) -> None:
    of = geometry(torch.float32)
    wide, tall = of.sites[3].in_features, of.sites[3].out_features
    flat = {
        "one output": torch.arange(wide) + 37 * wide,
        "one input": torch.arange(tall) * wide + 99,
        "every output once": torch.arange(tall) * wide + torch.arange(tall) * 7 % wide,
        "all of a corner": (torch.arange(tall - 9, tall)[:, None] * wide + torch.arange(90, wide)).flatten(),
    }[spread]
    values = torch.randn(len(flat), generator=torch.Generator().manual_seed(0))
    extra = Extra(Kind.SPARSE, 3, (flat.int(), values))
    arena = Loaded.of(of, [{}], implementation.device, [[extra]])
    segments = arena.segments([(3, 0), (1, None)])
    y, x = arena.tensors(4, 1, torch.float32)
    got = applied(implementation.load(arena), segments, y, x, 1)
    want, plain = expected(y, x, segments, 1, arena)
    assert_no_worse_than_torch(got, plain, want)
    untouched = torch.ones(tall, dtype=torch.bool)
    untouched[flat // wide] = False
    assert torch.equal(got[:3, :tall][:, untouched], y[:3, :tall][:, untouched])


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_a_row_gets_its_delta_alike_in_any_company(
    implementation: Implementation, dtype: torch.dtype, group: int
) -> None:
    arena = loaded(dtype, implementation.device)
    kernels = implementation.load(arena)
    y, x = arena.tensors(12, group, dtype)
    for watched in (0, 3) if INTERPRETED else range(4):
        results = [
            applied(kernels, arena.segments([(4, before), (3, watched), (5, behind)]), y, x, group)[4:7]
            for before, behind in ((None, None), (watched, watched), (1, 2), (3, 0))
        ]
        for got in results[1:]:
            assert torch.equal(got, results[0])
