"""Parts of several adapters together: what adds up, what stands in line, and every refusal with both names."""

import pytest
import torch
from torch import Tensor

from tests.adapters_store.toy import HEADS, NORM, SIZE, WIDE, WORDS, Backbone, File, compose, load
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.merge import Member
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import (
    Bottleneck,
    EmbeddingEntries,
    EmbeddingPair,
    Gate,
    KronSum,
    KVPrefix,
    Matrix,
    NormOverride,
    Part,
    RowOverride,
    SoftPrompt,
    TokenMask,
)
from weft.adapters_store.traits import traits_of
from weft.kernels.extras import Kind
from weft.kernels.layout import unpack_records

BACKBONE = Backbone()
TOKENS = 4


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


H, X_RES, LN_X = (draw(seed, TOKENS, WIDE) for seed in (91, 92, 93))
IDS = torch.tensor([3, 0, 8, 3])


def tensors_of(parsed: ParsedAdapter, kind: Kind) -> list[list[Tensor | None]]:
    """What the block holds of a kind, record by record."""
    loaded = load(parsed, BACKBONE)
    records = unpack_records(BACKBONE.geometry, loaded.kernels.arena)
    return [list(record.tensors) for record in records if record.kind is kind]


def members(*said: ParsedAdapter | tuple[ParsedAdapter, float]) -> list[Member]:
    pairs = [each if isinstance(each, tuple) else (each, 1.0) for each in said]
    return [Member(name, parsed, weight) for name, (parsed, weight) in zip("abcdefgh", pairs, strict=False)]


# bottlenecks


def plain(seed: int, act: str = "relu", tap: str = "h", bias: bool = True, rank: int = 3) -> ParsedAdapter:
    file = File()
    down, up = Matrix(file.put(draw(seed, rank, WIDE))), Matrix(file.put(draw(seed + 1, WIDE, rank)))
    biases = (file.put(draw(seed + 2, rank)), file.put(draw(seed + 3, WIDE))) if bias else (None, None)
    return file.adapter(parts=[Bottleneck(0, "mlp", tap, act, down, biases[0], up, biases[1])])


def whole(seed: int, kind: str) -> ParsedAdapter:
    """One that needs a record of its own, whatever it is that it has."""
    file = File()
    down, up = Matrix(file.put(draw(seed, 3, WIDE))), Matrix(file.put(draw(seed + 1, WIDE, 3)))
    biases = file.put(draw(seed + 2, 3)), file.put(draw(seed + 3, WIDE))
    if kind == "kron":
        terms = KronSum(((file.put(draw(seed, 3, 1)), file.put(draw(seed + 4, 4, 3))),) * 2)
        part = Bottleneck(0, "mlp", "h", "gelu", down, biases[0], terms, biases[1])
    elif kind == "skip":
        part = Bottleneck(0, "mlp", "x_res", "relu", down, biases[0], up, biases[1], skip=file.put(draw(seed + 5, 1)))
    elif kind == "gate":
        gate = Gate(file.put(draw(seed + 5, 1, WIDE)))
        part = Bottleneck(0, "mlp", "ln_x", "tanh", down, biases[0], up, biases[1], gate=gate)
    else:
        one = Matrix(file.put(draw(seed, WIDE, WIDE)))
        part = Bottleneck(0, "mlp", "h", "identity", one, file.put(draw(seed + 3, WIDE)), None, None)
    return file.adapter(parts=[part])


PLAIN = {
    "biased": plain(10),
    "bare": plain(20, bias=False, rank=5),
    "again": plain(30),
}
WHOLE = {kind: whole(40 + 10 * i, kind) for i, kind in enumerate(("kron", "skip", "gate", "map"))}


def gained(parsed: ParsedAdapter) -> Tensor:
    return load(parsed, BACKBONE).hidden(H, X_RES, LN_X, 1) - H


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("second", [*PLAIN, *WHOLE])
@pytest.mark.parametrize("first", [*PLAIN, *WHOLE])
def test_bottlenecks_add_up_each_on_what_the_sublayer_made(first, second, weight):
    both = {**PLAIN, **WHOLE}
    together = gained(compose(*members(both[first], (both[second], weight))))
    alone = gained(both[first]) + weight * gained(both[second])
    assert float((together - alone).abs().max()) <= 1e-5
    assert float((together - gained(both[first])).abs().max()) >= 1e-2


def test_bottlenecks_at_other_places_do_not_meet():
    file = File()
    down, up = Matrix(file.put(draw(1, 2, WIDE))), Matrix(file.put(draw(2, WIDE, 2)))
    other = file.adapter(parts=[Bottleneck(1, "attention", "h", "gelu", down, None, up, None)])
    loaded = load(compose(*members(PLAIN["biased"], other)), BACKBONE)
    assert torch.equal(loaded.hidden(H, X_RES, LN_X, 1), load(PLAIN["biased"], BACKBONE).hidden(H, X_RES, LN_X, 1))
    assert torch.equal(loaded.hidden(H, X_RES, LN_X, 2), load(other, BACKBONE).hidden(H, X_RES, LN_X, 2))


# what stands in line


def soft(seed: int, count: int) -> ParsedAdapter:
    file = File()
    return file.adapter(parts=[SoftPrompt(file.put(draw(seed, count, WIDE)))])


def prefix(seed: int, count: int, shifts: bool = True, gated: bool = False, layers: int = 2) -> ParsedAdapter:
    file, parts = File(), []
    for layer in range(layers):
        keys, values = (file.put(draw(seed + 2 * layer + i, count, HEADS, SIZE)) for i in (0, 1))
        gate = Gate(file.put(draw(seed + 9, 1, WIDE))) if gated else None
        parts.append(KVPrefix(layer, keys, values, shifts, gate))
    return file.adapter(parts=parts)


def test_soft_prompts_stand_in_the_order_named():
    parsed = compose(*members(soft(1, 2), soft(2, 3), soft(3, 1)))
    ((rows,),) = tensors_of(parsed, Kind.SOFT)
    assert rows is not None
    assert torch.equal(rows, torch.cat([draw(1, 2, WIDE), draw(2, 3, WIDE), draw(3, 1, WIDE)]))
    assert traits_of(load(parsed, BACKBONE).block.directory).extra_rows == 6


@pytest.mark.parametrize("shifts", [True, False])
def test_prefixes_stand_in_the_order_named(shifts):
    parsed = compose(*members(prefix(1, 2, shifts), prefix(5, 3, shifts)))
    records = tensors_of(parsed, Kind.PREFIX)
    assert len(records) == 2
    for layer, tensors in enumerate(records):
        for at in (0, 1):
            both = torch.cat([draw(1 + 2 * layer + at, 2, HEADS, SIZE), draw(5 + 2 * layer + at, 3, HEADS, SIZE)])
            found = tensors[at]
            assert found is not None
            assert torch.equal(found, both.transpose(0, 1).reshape(-1, SIZE))
    assert traits_of(load(parsed, BACKBONE).block.directory).position_offset == 5 * shifts


# embeddings


def pair(seed: int, outer: bool = False) -> ParsedAdapter:
    file = File()
    scale = file.put(1 + draw(seed + 2, WIDE)) if outer else None
    part = EmbeddingPair(file.put(draw(seed, 2, WORDS)), file.put(draw(seed + 1, WIDE, 2)), 1.5, scale)
    return file.adapter(parts=[part])


def override(seed: int) -> ParsedAdapter:
    file = File()
    return file.adapter(parts=[RowOverride((3, 5), file.put(draw(seed, 2, WIDE)))])


def entries(seed: int) -> ParsedAdapter:
    """Some of the embedding [9, 12]: two of token 0, three of token 3, one of token 7, none of the others."""
    file, index = File(), torch.tensor([2, 11, 36, 40, 47, 84], dtype=torch.int32)
    return file.adapter(parts=[EmbeddingEntries(file.put(index), file.put(draw(seed, len(index))))])


def through(parsed: ParsedAdapter, out: Tensor) -> Tensor:
    return load(parsed, BACKBONE).embed(out, IDS)


@pytest.mark.parametrize("outer", [(False, False), (True, False), (False, True), (True, True)])
def test_pairs_on_the_embedding_act_one_after_the_other(outer):
    first, second = pair(1, outer[0]), pair(5, outer[1])
    got = through(compose(*members(first, second)), H)
    assert float((got - through(second, through(first, H))).abs().max()) <= 2e-6
    swapped = through(compose(*members(second, first)), H)
    assert (float((got - swapped).abs().max()) >= 1e-3) == any(outer)


def test_a_weight_multiplies_a_pair_on_the_embedding():
    gained = through(compose(*members((pair(1), -0.5))), H) - H
    assert float((gained + 0.5 * (through(pair(1), H) - H)).abs().max()) <= 2e-6


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_that_are_replaced_and_a_pair_add_up(order):
    both = override(7), pair(1)
    got = through(compose(*members(*(both[i] for i in order))), H)
    assert float((got - through(both[1], through(both[0], H))).abs().max()) <= 2e-6


def test_rows_are_replaced_before_they_are_scaled():
    got = through(compose(*members(override(7), pair(1, outer=True))), H)
    assert float((got - through(pair(1, outer=True), through(override(7), H))).abs().max()) <= 2e-6


def test_entries_are_added_to_the_rows_of_their_tokens():
    gained = through(entries(1), H) - H
    table = torch.zeros(WORDS, WIDE)
    table.view(-1)[[2, 11, 36, 40, 47, 84]] = draw(1, 6)
    assert float((gained - table[IDS]).abs().max()) <= 2e-6
    assert not bool(gained[IDS == 8].any())


def test_entries_of_several_add_up_each_with_its_weight():
    got = through(compose(*members(entries(1), (entries(2), -0.5), pair(5, outer=True))), H)
    both = through(entries(1), H) - 0.5 * (through(entries(2), H) - H)
    assert float((got - through(pair(5, outer=True), both)).abs().max()) <= 2e-6


# what cannot stand together


def norm(seed: int) -> ParsedAdapter:
    file = File()
    return file.adapter(parts=[NormOverride(NORM, file.put(1 + draw(seed, WIDE)))])


def masked(*tokens: int) -> ParsedAdapter:
    file = File()
    mask: list[Part] = [TokenMask(tokens)] if tokens else []
    return file.adapter(parts=[*mask, SoftPrompt(file.put(draw(1, 1, WIDE)))])


REFUSED = {
    "norms": (
        (norm(1), soft(1, 1), norm(2)),
        f"c: expected one override of the norm {NORM}, got another beside that of a (one would undo the other)",
    ),
    "rows": (
        (override(1), override(2)),
        "b: expected an override of embedding rows in one adapter, got another beside that of a "
        "(one would undo the other)",
    ),
    "rows_and_entries": (
        (override(1), entries(2)),
        "b: expected no other embedding beside an override of embedding rows in a, got a change of embedding entries",
    ),
    "entries_behind_a_scale": (
        (pair(1, outer=True), entries(2)),
        "b: expected embedding rows before a, which scales embeddings, got some behind it "
        "(name the two the other way round)",
    ),
    "rows_behind_a_scale": (
        (pair(1, outer=True), override(2)),
        "b: expected embedding rows before a, which scales embeddings, got some behind it "
        "(name the two the other way round)",
    ),
    "bottlenecks_that_bend_otherwise": (
        (plain(1), plain(5, act="gelu")),
        "b: expected a bottleneck that reads h and bends by relu, as that of a does behind the mlp of layer 0, "
        "got one that reads h and bends by gelu",
    ),
    "bottlenecks_that_read_otherwise": (
        (plain(1), plain(5), plain(9, tap="x_res")),
        "c: expected a bottleneck that reads h and bends by relu, as that of a and b does behind the mlp of layer 0, "
        "got one that reads x_res and bends by relu",
    ),
    "gated_prefixes": (
        (prefix(1, 2), prefix(5, 2, gated=True)),
        "b: expected a layer 0 without prefix, got one beside that of a (each gate is of one prefix)",
    ),
    "positions": (
        (prefix(1, 2), prefix(5, 2, shifts=False)),
        "b: expected positions of the text that begin behind the prefix, as a has them, got some that begin at 0",
    ),
    "lengths": (
        (prefix(1, 2), prefix(5, 3, layers=1)),
        "a: expected prefixes of one length in all layers, 5 as that of a and b, got 2 in layer 1 "
        "(they shift the text's positions)",
    ),
    "masks": (
        (masked(5, 6), masked(5)),
        "b: expected the invocation tokens of a, [5, 6], got [5] "
        "(whatever acts from a token on composes with its like only)",
    ),
    "a_mask_and_none": (
        (masked(), masked(5)),
        "b: expected the invocation tokens of a, none, got [5] "
        "(whatever acts from a token on composes with its like only)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_stand_together_is_refused_with_both_names(case):
    said, message = REFUSED[case]
    with pytest.raises(AdapterInvalid) as refusal:
        compose(*members(*said))
    assert str(refusal.value) == message


UNWEIGHTED = {
    "norm": (norm(1), "an override of a norm has no weight"),
    "rows": (override(1), "an override of embedding rows has no weight"),
    "soft_prompt": (soft(1, 2), "a soft prompt has no weight"),
    "prefix": (prefix(1, 2), "a prefix of keys and values has no weight"),
    "scale": (pair(1, outer=True), "a scale of embeddings has no weight"),
}


@pytest.mark.parametrize("kind", UNWEIGHTED)
def test_what_does_not_add_up_has_no_weight(kind):
    parsed, why = UNWEIGHTED[kind]
    with pytest.raises(AdapterInvalid) as refusal:
        compose(*members(parsed, (parsed, 2.0)))
    assert str(refusal.value) == f"weight of b: expected 1, got 2 ({why})"


def test_one_mask_for_all_is_kept():
    parsed = compose(*members(masked(5, 6), masked(5, 6)))
    assert traits_of(load(parsed, BACKBONE).block.directory).token_mask == (5, 6)


def test_what_a_gate_needs_is_known_of_the_whole():
    traits = traits_of(load(compose(*members(soft(1, 2), WHOLE["gate"])), BACKBONE).block.directory)
    assert traits.whole_prompt
    assert traits.extra_rows == 2
