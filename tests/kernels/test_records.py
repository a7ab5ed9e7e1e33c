"""Deltas of linears that are records, kind by kind, against the oracle in fp64."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Implementation
from tests.kernels.examples import GROUPS, Kinds, Loaded, applied, assert_no_worse_than_torch, geometry, random_adapter
from weft.kernels import reference
from weft.kernels.batch import Block, Segment
from weft.kernels.extras import Extra, Kind
from weft.kernels.layout import BETA_OFF, RANK, SIGMA_OFF, SiteShape, unpack_records

# single rows, short and long segments; adapters that come again, with others and the base between them
MIX = [(1, 0), (2, None), (1, 1), (20, 2), (1, 0), (1, 3), (1, 2), (3, None), (3, 3), (40, 1)]
ADAPTERS = 4
# ranks of two banks that adapters share
BANKS = (7, 24)


@dataclass
class Noise:
    """Numbers that a dtype holds exactly, so that only arithmetic is measured."""

    dtype: torch.dtype
    dice: random.Random
    drawn: torch.Generator

    def factor(self, *size: int) -> Tensor:
        """[.., n] of the size 1 / sqrt(n)."""
        return (torch.randn(*size, generator=self.drawn) / math.sqrt(size[-1])).to(self.dtype)

    def vector(self, *size: int) -> Tensor:
        """The same around 1, in fp32."""
        return (1 + torch.randn(*size, generator=self.drawn) / 4).to(self.dtype).float()

    def some(self, of: int) -> Tensor:
        """A third of the numbers below ``of``, ascending."""
        return torch.tensor(sorted(self.dice.sample(range(of), 1 + of // 3)), dtype=torch.int32)


def columns(shape: SiteShape, noise: Noise, adapter: int) -> tuple[Tensor | None, ...]:
    index = noise.some(shape.in_features)
    return index, noise.factor(len(index), shape.out_features)


def dense(shape: SiteShape, noise: Noise, adapter: int) -> tuple[Tensor | None, ...]:
    return (noise.factor(shape.out_features, shape.in_features),)


def gated(shape: SiteShape, noise: Noise, adapter: int) -> tuple[Tensor | None, ...]:
    rank = noise.dice.choice([1, 5, 17])
    gate, bias = noise.vector(1, shape.in_features) - 1, noise.vector(1) if adapter % 2 else None
    return noise.factor(rank, shape.in_features), noise.factor(rank, shape.out_features), gate, bias


def shared(shape: SiteShape, noise: Noise, adapter: int) -> tuple[Tensor | None, ...]:
    return noise.vector(BANKS[adapter == 3]), noise.vector(shape.out_features)


MAKERS: Mapping[Kind, Callable[[SiteShape, Noise, int], tuple[Tensor | None, ...]]] = {
    Kind.COLUMNS: columns,
    Kind.DENSE: dense,
    Kind.GATED: gated,
    Kind.SHARED: shared,
}
FORMULAS: Mapping[Kind, Callable[..., Tensor]] = {
    Kind.COLUMNS: reference.columns,
    Kind.DENSE: reference.dense,
    Kind.GATED: reference.gated,
    Kind.SHARED: reference.shared,
}


def loaded(kinds: Sequence[Kind], dtype: torch.dtype, device: str) -> Loaded:
    """Adapters with records of these kinds at most sites; the last has its own bank, one has other operators too."""
    of, noise = geometry(dtype), Noise(dtype, random.Random(7), torch.Generator().manual_seed(7))

    def record(kind: Kind, site: int, adapter: int) -> Extra:
        tensors = MAKERS[kind](of.sites[site], noise, adapter)
        return Extra(kind, site, tensors, (int(adapter == 3),) if kind is Kind.SHARED else ())

    records = [
        [record(kind, site, adapter) for site in range(len(of.sites)) if (site + adapter) % 5 for kind in kinds]
        for adapter in range(ADAPTERS)
    ]
    widest, tallest = max(s.in_features for s in of.sites), max(s.out_features for s in of.sites)
    banks = [[Extra(Kind.BANK, 0, (noise.factor(r, widest), noise.factor(r, tallest)))] for r in BANKS]
    terms = [random_adapter(of, 9, Kinds(kron=False)) if i == 2 else {} for i in range(ADAPTERS + len(BANKS))]
    made = Loaded.of(of, terms, device, [*records, *banks])
    made.blocks = [replace(block, banks=tuple(made.blocks[ADAPTERS:])) for block in made.blocks[:ADAPTERS]]
    return made


def added(x: Tensor, extra: Extra, banks: Sequence[Extra]) -> Tensor:
    """What a record adds to a site's outputs, in x's dtype."""
    pieces = [*extra.tensors, *(banks[extra.options[0]].tensors if extra.kind is Kind.SHARED else ())]
    numbers = [None if p is None else p if p.dtype == torch.int32 else p.to(x.dtype) for p in pieces]
    flat = {Kind.COLUMNS: 1, Kind.SHARED: 2}.get(extra.kind, 0)
    # what has one dimension lies as a matrix of one row
    return FORMULAS[extra.kind](x, *(n[0] if n is not None and i < flat else n for i, n in enumerate(numbers)))


def expected(y: Tensor, x: Tensor, segments: Sequence[Segment], group: int, arena: Loaded) -> tuple[Tensor, Tensor]:
    """(the oracle's outputs, plain torch's)."""
    want = reference.apply(y, x, segments, group, arena.arena, arena.geometry)
    plain = want.to(y.dtype)
    for segment in segments:
        block, own, left = segment.block, slice(segment.start, segment.stop), 0
        if block is None:
            continue
        found, *banks = (
            unpack_records(arena.geometry, arena.arena[b.offset : b.offset + b.nbytes]) for b in (block, *block.banks)
        )
        for site in arena.geometry.members[group]:
            right = left + arena.geometry.sites[site].out_features
            for extra in found:
                if extra.place == site:
                    bank = [records[0] for records in banks]
                    want[own, left:right] += added(x[own].double(), extra, bank)
                    plain[own, left:right] += added(x[own], extra, bank)
            left = right
    return want, plain


def small(arena: Loaded, tokens: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y, x): outputs so small that what is added shows, and so does how often it was rounded."""
    y, x = arena.tensors(tokens, group, dtype)
    return y.mul_(2**-6), x


def acts(block: Block, members: range) -> bool:
    """Whether it has anything at these sites."""
    words = block.directory.sites[members.start : members.stop, (RANK, SIGMA_OFF, BETA_OFF)]
    return bool(words.any()) or any(record.place in members for record in block.directory.records)


TOGETHER = [*([kind] for kind in MAKERS), list(MAKERS)]


def named(kinds: Sequence[Kind]) -> str:
    return "+".join(kind.name for kind in kinds)


@pytest.mark.parametrize("group", range(len(GROUPS)))
@pytest.mark.parametrize("kinds", TOGETHER, ids=named)
def test_a_kind_matches_the_oracle(
    implementation: Implementation, dtype: torch.dtype, kinds: list[Kind], group: int
) -> None:
    arena = loaded(kinds, dtype, implementation.device)
    segments = arena.segments(MIX)
    y, x = small(arena, segments[-1].stop, group, dtype)
    got = applied(implementation.load(arena), segments, y, x, group)
    want, plain = expected(y, x, segments, group, arena)
    assert_no_worse_than_torch(got, plain, want)
    for segment in segments:
        changed = not torch.equal(got[segment.start : segment.stop], y[segment.start : segment.stop])
        assert changed == (segment.block is not None and acts(segment.block, arena.geometry.members[group]))


@pytest.mark.parametrize("kinds", TOGETHER, ids=named)
@pytest.mark.parametrize(("before", "own", "behind"), [(4, 1, 5), (1, 1, 1), (4, 3, 5), (1, 40, 1)])
def test_a_row_gets_a_kind_alike_in_any_company(
    implementation: Implementation, dtype: torch.dtype, before: int, own: int, behind: int, kinds: list[Kind]
) -> None:
    """Its neighbours have the same adapter, others with the same bank or another, or none; bit for bit."""
    arena = loaded(kinds, dtype, implementation.device)
    kernels = implementation.load(arena)
    for group in range(len(GROUPS)):
        y, x = arena.tensors(before + own + behind, group, dtype)
        for watched in (0, 3):
            results = [
                applied(kernels, arena.segments([(before, left), (own, watched), (behind, right)]), y, x, group)
                for left, right in ((None, None), (watched, watched), (1, 2), (3, 0), (None, 1))
            ]
            for got in results[1:]:
                assert torch.equal(got[before : before + own], results[0][before : before + own])
