"""Batches to try kernels on: geometries, random operators, arenas, mixes of adapters; plain torch as a yardstick."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels import activation, layout
from weft.kernels.activation import activate
from weft.kernels.batch import Block, Segment
from weft.kernels.dispatch import Kernels
from weft.kernels.extras import Extra
from weft.kernels.layout import ALIGN, Geometry, SiteShape, SiteTerms, unpack

# three sites sharing an input of awkward width, one pair, one alone; nothing is a power of two
SITES = (
    SiteShape(36, 20),
    SiteShape(36, 6),
    SiteShape(36, 48),
    SiteShape(100, 64),
    SiteShape(100, 36),
    SiteShape(20, 36),
)
GROUPS = (3, 2, 1)

# segment lengths and, per segment, which adapter (None: base)
MIXES: Mapping[str, Sequence[tuple[int, int | None]]] = {
    "nothing": [],
    "all base": [(3, None), (1, None)],
    "one adapter": [(1, 0), (1, 0), (2, 0)],
    "all different": [(1, 0), (1, 1), (1, 2), (1, 3)],
    "half base": [(2, None), (1, 1), (1, None), (3, 2), (1, None)],
    "prompts and answers": [(1, 0), (0, 1), (33, 1), (1, 2), (5, None), (3, 3)],
}
# a segment that large tiles are for, between short ones
LONG: Sequence[tuple[int, int | None]] = [(1, 1), (66, 2), (1, 0)]


def geometry(dtype: torch.dtype) -> Geometry:
    return Geometry(SITES, GROUPS, dtype)


def divisors(value: int) -> list[int]:
    return [d for d in range(1, value + 1) if value % d == 0]


@dataclass(frozen=True)
class Kinds:
    """Which operators random adapters have."""

    low_rank: bool = True
    kron: bool = True
    vectors: bool = True
    bends: bool = True


def random_terms(shape: SiteShape, kinds: Kinds, dice: random.Random, noise: torch.Generator) -> SiteTerms:
    wide, tall = shape.in_features, shape.out_features

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=noise)

    def vector(length: int) -> Tensor | None:
        return 1 + normal(length) / 10 if kinds.vectors and dice.random() < 0.5 else None

    low_rank, krons, inner, act = None, [], None, 0
    if kinds.low_rank and dice.random() < 0.7:
        rank = dice.choice([1, 3, 8, 17, 33])
        low_rank = normal(rank, wide) / wide**0.5, normal(tall, rank) / rank**0.5
        if kinds.bends:
            act = dice.choice([0, 0, *range(len(activation.NAMES))])
            inner = normal(rank) if dice.random() < 0.5 else None
    if kinds.kron and dice.random() < 0.5:
        o1 = dice.choice(divisors(tall))
        for _ in range(dice.choice([1, 2, 3])):
            i1 = dice.choice(divisors(wide))
            krons.append((normal(o1, i1) / i1**0.5, normal(tall // o1, wide // i1) / (wide // i1) ** 0.5))
    return SiteTerms(low_rank, tuple(krons), vector(tall), vector(tall), vector(wide), inner, act)


def random_adapter(of: Geometry, seed: int, kinds: Kinds) -> dict[int, SiteTerms]:
    """Operators at most sites; the next seed has them at other sites, in other shapes."""
    dice, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    return {i: random_terms(s, kinds, dice, noise) for i, s in enumerate(of.sites) if dice.random() < 0.9}


@dataclass
class Loaded:
    """Adapters in an arena, every byte around them 0xFF, which reads as NaN in all dtypes."""

    geometry: Geometry
    arena: Tensor
    blocks: list[Block]

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        adapters: Sequence[Mapping[int, SiteTerms]],
        device: str = "cpu",
        records: Sequence[Sequence[Extra]] = (),
    ) -> "Loaded":
        extras = [*records, *[()] * (len(adapters) - len(records))]
        images = [layout.pack(geometry, adapter, extra) for adapter, extra in zip(adapters, extras, strict=True)]
        arena = torch.full((ALIGN * (len(images) + 1) + sum(map(len, images)),), 255, dtype=torch.uint8)
        blocks, at = [], ALIGN
        for key, image in enumerate(images):
            arena[at : at + len(image)] = image
            blocks.append(Block(key, at, len(image), layout.directory(image)))
            at += len(image) + ALIGN
        return cls(geometry, arena.to(device), blocks)

    @classmethod
    def random(cls, dtype: torch.dtype, count: int, kinds: Kinds, seed: int = 0, device: str = "cpu") -> "Loaded":
        shape = geometry(dtype)
        return cls.of(shape, [random_adapter(shape, seed * count + i, kinds) for i in range(count)], device)

    def segments(self, mix: Sequence[tuple[int, int | None]]) -> list[Segment]:
        segments, at = [], 0
        for length, adapter in mix:
            segments.append(Segment(at, at + length, None if adapter is None else self.blocks[adapter]))
            at += length
        return segments

    def tensors(self, tokens: int, group: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(y, x) for a group, as views of wider tensors."""
        noise = torch.Generator().manual_seed(seed)
        views = []
        for width in (self.geometry.out_features(group), self.geometry.in_features(group)):
            wide = torch.randn(tokens, width + 24, generator=noise).to(self.arena.device, dtype)
            views.append(wide[:, 8 : 8 + width])
        return views[0], views[1]


def applied(kernels: Kernels, segments: Sequence[Segment], y: Tensor, x: Tensor, group: int) -> Tensor:
    """What ``apply`` makes of a copy of y that is laid out like y."""
    out = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device)
    out.copy_(y)
    kernels.apply(out, x, kernels.rows(segments), group)
    return out


def plain_torch(y: Tensor, x: Tensor, segments: Sequence[Segment], group: int, loaded: Loaded) -> Tensor:
    """The formula as a user of torch would write it, every operation in the tensors' own dtype."""
    result = y.clone()
    for segment in segments:
        block, rows, left = segment.block, slice(segment.start, segment.stop), 0
        terms = (
            {} if block is None else unpack(loaded.geometry, loaded.arena[block.offset : block.offset + block.nbytes])
        )
        for index in loaded.geometry.members[group]:
            right = left + loaded.geometry.sites[index].out_features
            if index in terms:
                result[rows, left:right] = _plain_site(y[rows, left:right], x[rows], terms[index])
            left = right
    return result


def _plain_site(y: Tensor, x: Tensor, terms: SiteTerms) -> Tensor:
    own: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(x.dtype)  # noqa: E731
    if terms.sigma is not None:
        y = own(y * terms.sigma)
    if terms.low_rank is not None:
        a, b = terms.low_rank
        hidden = x @ own(a).T
        hidden = hidden if terms.inner is None else own(hidden + terms.inner)
        y = y + activate(hidden, terms.act) @ own(b).T
    for w1, w2 in terms.krons:
        folded = x.reshape(len(x), w1.shape[1], w2.shape[1])
        y = y + (own(w1) @ (folded @ own(w2).T)).reshape(y.shape)
    return y if terms.beta is None else own(y + terms.beta)


def assert_no_worse_than_torch(got: Tensor, plain: Tensor, want: Tensor) -> None:
    """At most twice as far from the fp64 oracle as plain torch in the same dtype is, in the mean of squares.

    The single worst number of two equally good results differs by more than that, so it has twice the leeway.
    Where torch was lucky its yardstick is the unit of rounding.
    """
    assert got.dtype == plain.dtype
    assert got.isfinite().all()
    if got.numel():
        wrong = (got.double() - want).abs()
        yardstick = torch.maximum((plain.double() - want).abs(), want.abs() * torch.finfo(got.dtype).eps / 2)
        assert wrong.norm() <= 2 * yardstick.norm(), f"{wrong.norm():.3g}, plain torch {yardstick.norm():.3g}"
        assert wrong.max() <= 4 * yardstick.max(), f"off by {wrong.max():.3g}, plain torch by {yardstick.max():.3g}"
