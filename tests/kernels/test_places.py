"""Records that act elsewhere than on a linear: behind sublayers, in front of keys, on embeddings; against fp64."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Implementation
from tests.kernels.examples import Loaded, assert_no_worse_than_torch
from tests.kernels.test_records import Noise
from weft.kernels import activation, reference
from weft.kernels.batch import Segment, SoftSpan
from weft.kernels.extras import Extra, Kind
from weft.kernels.layout import Geometry, SiteShape
from weft.kernels.parts import TAP_H, TAP_NORMED, TAP_RESIDUAL, TAP_SUM

# the width of the stream: 36 = 4 * 9 for Kronecker terms
WIDE = 36
MIX = [(1, 0), (2, None), (1, 1), (7, 0), (1, None), (34, 1), (1, 0)]


def noise(dtype: torch.dtype, seed: int = 3) -> Noise:
    return Noise(dtype, random.Random(seed), torch.Generator().manual_seed(seed))


def loaded(dtype: torch.dtype, device: str, *records: Extra) -> Loaded:
    """One adapter for each record."""
    of = Geometry((SiteShape(WIDE, WIDE),), (1,), dtype, hidden=1)
    return Loaded.of(of, [{} for _ in records], device, [[record] for record in records])


def numbers(tokens: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return torch.randn(tokens, WIDE, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# bottlenecks: what their matrices are made of, and everything they may have


@dataclass(frozen=True)
class Neck:
    """A variant: terms of its maps (0: a matrix), width between them (0: a single map), and which parts it has."""

    tap: int
    function: str = "relu"
    terms: int = 0
    factored: bool = False
    rank: int = 12
    biased: bool = False
    normed: bool = False
    gated: bool = False
    skip: bool = False


NECKS: Mapping[str, Neck] = {
    "plain": Neck(TAP_H),
    "all parts": Neck(TAP_SUM, "silu", biased=True, normed=True, gated=True, skip=True),
    "residual": Neck(TAP_RESIDUAL, "gelu_tanh", biased=True, gated=True),
    "normed": Neck(TAP_NORMED, "tanh", normed=True, rank=40),
    "kron": Neck(TAP_SUM, "gelu", terms=3, biased=True),
    "factored kron": Neck(TAP_H, "silu", terms=4, factored=True, biased=True, gated=True),
    "one map": Neck(TAP_NORMED, terms=1, rank=0, skip=True),
}
EPSILON = 1e-5


def mapped(neck: Neck, of: Noise, wide: int, tall: int) -> tuple[list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    """(pieces of a map [tall, wide], the pairs whose Kronecker products it is the sum of)."""
    if not neck.terms:
        matrix = of.factor(tall, wide)
        return [matrix], [(torch.ones(1, 1, dtype=matrix.dtype), matrix)]
    pieces: list[Tensor | None] = []
    pairs = []
    for _ in range(neck.terms):
        w1 = of.factor(4, 4)
        if neck.factored:
            left, right = of.factor(2, tall // 4), of.factor(2, wide // 4)
            pieces += [w1, left, right]
            pairs.append((w1, (left.double().T @ right.double())))
        else:
            w2 = of.factor(tall // 4, wide // 4)
            pieces += [w1, w2, None]
            pairs.append((w1, w2))
    return pieces, pairs


def bottleneck(neck: Neck, of: Noise) -> tuple[Extra, reference.Bottleneck]:
    """(the record, the same written out in fp64)."""
    down, down_pairs = mapped(neck, of, WIDE, neck.rank or WIDE)
    up, up_pairs = mapped(neck, of, neck.rank, WIDE) if neck.rank else ([], [])
    norm = (of.vector(WIDE), of.vector(WIDE) - 1) if neck.normed else (None, None)
    gate = (of.vector(1, WIDE) - 1, of.vector(1)) if neck.gated else (None, None)
    skip = of.vector(WIDE) if neck.skip else None
    biases = (of.factor(neck.rank or WIDE), of.factor(WIDE)) if neck.biased else (None, None)
    code = activation.NAMES.index(neck.function)
    bits = int(torch.tensor(EPSILON).view(torch.int32))
    options = neck.tap, code, neck.terms, neck.terms if neck.rank else 0, bits if neck.normed else 0
    record = Extra(Kind.BOTTLENECK, 0, (*norm, *gate, skip, *biases, *down, *up), options)

    def whole(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        products = [torch.kron(w1.double(), w2.double().contiguous()) for w1, w2 in pairs]
        return torch.stack(products).sum(dim=0)

    written = reference.Bottleneck(
        whole(down_pairs),
        whole(up_pairs) if neck.rank else None,
        code,
        down_bias=biases[0],
        up_bias=biases[1],
        norm=None if norm[0] is None or norm[1] is None else (norm[0], norm[1], EPSILON),
        gate=None if gate[0] is None else (gate[0], gate[1]),
        skip=skip,
    )
    return record, written


def in_dtype(of: reference.Bottleneck, dtype: torch.dtype) -> reference.Bottleneck:
    def own(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    return reference.Bottleneck(
        of.down.to(dtype),
        own(of.up),
        of.act,
        down_bias=own(of.down_bias),
        up_bias=own(of.up_bias),
        norm=None if of.norm is None else (of.norm[0].to(dtype), of.norm[1].to(dtype), of.norm[2]),
        gate=None if of.gate is None else (of.gate[0].to(dtype), own(of.gate[1])),
        skip=own(of.skip),
    )


@pytest.mark.parametrize("name", NECKS)
def test_bottlenecks_match_the_oracle(implementation: Implementation, dtype: torch.dtype, name: str) -> None:
    neck, device = NECKS[name], implementation.device
    made = [bottleneck(neck, noise(dtype, seed)) for seed in (1, 2)]
    arena = loaded(dtype, device, *(record for record, _ in made))
    segments, kernels = arena.segments(MIX), implementation.load(arena)
    h, x_res, ln_x = (numbers(segments[-1].stop, dtype, device, seed) for seed in (4, 5, 6))
    h *= 2**-6
    taps = {TAP_H: h, TAP_SUM: h + x_res, TAP_RESIDUAL: x_res, TAP_NORMED: ln_x}
    got, want, plain = h.clone(), h.double(), h.clone()
    kernels.hidden(got, x_res, ln_x, kernels.rows(segments), 0)
    for segment in segments:
        own = slice(segment.start, segment.stop)
        if segment.block is None:
            assert torch.equal(got[own], h[own])
            continue
        _, written = made[segment.block.key]
        exact = h[own].double() + x_res[own].double() if neck.tap == TAP_SUM else taps[neck.tap][own].double()
        want[own] += reference.bottleneck(exact, in_dtype(written, torch.float64))
        plain[own] += reference.bottleneck(taps[neck.tap][own], in_dtype(written, dtype))
        assert not torch.equal(got[own], h[own])
    assert_no_worse_than_torch(got, plain, want)


@pytest.mark.parametrize("name", NECKS)
def test_a_row_passes_its_bottleneck_alike_in_any_company(
    implementation: Implementation, dtype: torch.dtype, name: str
) -> None:
    made = [bottleneck(NECKS[name], noise(dtype, seed))[0] for seed in (1, 2)]
    made.append(bottleneck(NECKS["all parts"], noise(dtype, 3))[0])
    arena = loaded(dtype, implementation.device, *made)
    kernels = implementation.load(arena)
    for before, own, behind in ((4, 1, 5), (1, 1, 1), (4, 3, 5), (1, 40, 1)):
        h, x_res, ln_x = (numbers(before + own + behind, dtype, implementation.device, seed) for seed in (4, 5, 6))
        results = []
        for left, right in ((None, None), (0, 0), (1, 2), (2, None)):
            out = h.clone()
            rows = kernels.rows(arena.segments([(before, left), (own, 0), (behind, right)]))
            kernels.hidden(out, x_res, ln_x, rows, 0)
            results.append(out[before : before + own])
        for got in results[1:]:
            assert torch.equal(got, results[0])


# prefixes

HEADS, COUNT = 2, 5


# what a gate may read of a call's rows: the mean over all, the first, the last
READS = (slice(None), slice(0, 1), slice(-1, None))


def prefix(of: Noise, gates: int, biased: bool, reads: int) -> Extra:
    tables = of.factor(HEADS * COUNT, 8), of.factor(HEADS * COUNT, 6)
    per_token = gates == COUNT
    gate = (of.factor if per_token else of.vector)(gates, WIDE) - 1 if gates else None
    bias = of.vector(gates) if gates and biased else None
    return Extra(Kind.PREFIX, 1, (*tables, gate, bias), (COUNT, 0, int(per_token), reads))


@pytest.mark.parametrize(
    ("gates", "biased", "reads"),
    [(0, False, 0), (1, True, 0), (2, False, 0), (2, True, 0), (COUNT, True, 0), (COUNT, False, 1), (COUNT, True, 2)],
)
def test_prefixes_match_the_oracle(
    implementation: Implementation, dtype: torch.dtype, gates: int, biased: bool, reads: int
) -> None:
    extras = [prefix(noise(dtype, seed), gates, biased, reads) for seed in (1, 2)]
    arena = loaded(dtype, implementation.device, *extras)
    segments, kernels = arena.segments(MIX), implementation.load(arena)
    x = numbers(segments[-1].stop, dtype, implementation.device, 4)
    rows = kernels.rows(segments)
    for segment in segments:
        found = kernels.prefix(rows, segment.start, 1, HEADS, x if gates else None)
        assert kernels.prefix(rows, segment.start, 0, HEADS, x) is None
        if segment.block is None:
            assert found is None
            continue
        assert found is not None
        *tables, gate, bias = (None if t is None else t.to(x.device) for t in extras[segment.block.key].tensors)
        for got, table, first in zip(found, tables, (True, False), strict=True):
            assert table is not None
            results = []
            for to in (torch.float64, dtype):
                own = x[segment.start : segment.stop][READS[reads]].to(to)
                value = (
                    None if gate is None else reference.gate(own, gate.to(to), None if bias is None else bias.to(to))
                )
                results.append(reference.prefix(table.to(to).view(HEADS, COUNT, -1), value, gates == COUNT, first))
            assert_no_worse_than_torch(got, results[1], results[0])


# embeddings

VOCABULARY = 50
IDS = (0, 7, 7, 49, 13, 12, 14, 48)


def embedded(
    implementation: Implementation, arena: Loaded, segments: list[Segment], soft: tuple[SoftSpan, ...] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, what the frozen embedding puts out, what becomes of it)."""
    dtype, kernels = arena.geometry.dtype, implementation.load(arena)
    tokens = segments[-1].stop
    ids = torch.tensor((IDS * tokens)[:tokens], device=implementation.device)
    frozen = numbers(tokens, dtype, implementation.device, 4) * 2**-6
    out = frozen.clone()
    kernels.embed(out, ids, kernels.rows(segments), soft)
    return ids, frozen, out


def test_rows_of_embeddings_are_the_adapters(implementation: Implementation, dtype: torch.dtype) -> None:
    listed = torch.tensor([0, 7, 12, 49], dtype=torch.int32), torch.tensor([13], dtype=torch.int32)
    tables = [noise(dtype, seed).factor(len(ids), WIDE) for seed, ids in enumerate(listed)]
    extras = [Extra(Kind.EMBED_ROWS, 0, (ids, rows)) for ids, rows in zip(listed, tables, strict=True)]
    arena = loaded(dtype, implementation.device, *extras)
    segments = arena.segments(MIX)
    ids, frozen, got = embedded(implementation, arena, segments)
    for segment in segments:
        own, key = slice(segment.start, segment.stop), None if segment.block is None else segment.block.key
        want = frozen[own] if key is None else reference.embed_rows(frozen[own], ids[own], listed[key], tables[key])
        assert torch.equal(got[own], want)
    assert not torch.equal(got, frozen)


def test_entries_of_embeddings_match_the_oracle(implementation: Implementation, dtype: torch.dtype) -> None:
    # of the first and the last row, of neighbours, of a row that no id names
    places = torch.tensor([0, 5, 7 * WIDE, 8 * WIDE - 1, 8 * WIDE, 20 * WIDE + 3, VOCABULARY * WIDE - 1])
    pieces = [(i.int()[None], noise(dtype, s).factor(1, len(i))) for s, i in enumerate((places, places[2:3]))]
    arena = loaded(dtype, implementation.device, *(Extra(Kind.EMBED_ENTRIES, 0, each) for each in pieces))
    segments = arena.segments(MIX)
    ids, frozen, got = embedded(implementation, arena, segments)
    want, plain = frozen.double(), frozen.clone()
    for segment in segments:
        own = slice(segment.start, segment.stop)
        if segment.block is None:
            assert torch.equal(got[own], frozen[own])
            continue
        index, values = pieces[segment.block.key]
        for out in (want, plain):
            out[own] = reference.embed_entries(out[own], ids[own], index[0], values[0].to(out))
    assert_no_worse_than_torch(got, plain, want)
    assert not torch.equal(got, frozen)


@pytest.mark.parametrize("scaled", [False, True])
def test_pairs_on_embeddings_match_the_oracle(implementation: Implementation, dtype: torch.dtype, scaled: bool) -> None:
    pieces = []
    for seed in (1, 2):
        of = noise(dtype, seed)
        outer = of.vector(WIDE) if scaled else None
        pieces.append((of.factor(VOCABULARY, 6), of.factor(6, WIDE), outer))
    arena = loaded(dtype, implementation.device, *(Extra(Kind.EMBED_PAIR, 0, each) for each in pieces))
    segments = arena.segments(MIX)
    ids, frozen, got = embedded(implementation, arena, segments)
    want, plain = frozen.double(), frozen.clone()
    for segment in segments:
        own = slice(segment.start, segment.stop)
        if segment.block is None:
            assert torch.equal(got[own], frozen[own])
            continue
        for out in (want, plain):
            a, b, outer = (None if p is None else p.to(out) for p in pieces[segment.block.key])
            assert a is not None
            assert b is not None
            out[own] = reference.embed_pair(out[own], ids[own], a, b, outer)
    assert_no_worse_than_torch(got, plain, want)


def test_a_piece_of_a_soft_prompt_stands_where_its_span_says(
    implementation: Implementation, dtype: torch.dtype
) -> None:
    tables = [noise(dtype, seed).factor(count, WIDE) for seed, count in ((1, 6), (2, 3))]
    arena = loaded(dtype, implementation.device, *(Extra(Kind.SOFT, 0, (table,)) for table in tables))
    segments = arena.segments([(3, 0), (2, None), (5, 1)])
    soft = SoftSpan(0, 2, 4, arena.blocks[0]), SoftSpan(5, 8, 0, arena.blocks[1])
    _, frozen, got = embedded(implementation, arena, segments, soft)
    want = torch.cat([tables[0][4:6].to(got), frozen[2:5], tables[1].to(got), frozen[8:]])
    assert torch.equal(got, want)
