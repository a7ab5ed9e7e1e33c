"""Operators of several adapters at one linear, by the rules of composition, against the rules written out in fp64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.adapters_store.toy import LINEAR, TALL, WIDE, Backbone, File, compose, load
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.merge import Member
from weft.adapters_store.operators import (
    Bank,
    Bias,
    Columns,
    Dense,
    Kron,
    LowRank,
    ParsedAdapter,
    Rows,
    Scale,
    Shared,
    Sparse,
)
from weft.adapters_store.parts import Gate

BACKBONE = Backbone()
W, B = BACKBONE.weight.double(), BACKBONE.bias.double()
TOKENS = 5
X = torch.randn(TOKENS, WIDE, generator=torch.Generator().manual_seed(2))

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Toy:
    """An adapter at the linear, and what it makes of a linear that others may have adapted before it."""

    parsed: ParsedAdapter
    around: Callable[[Layer, float], Layer]


def base(x: Tensor) -> Tensor:
    return x @ W.T + B


def adds(parsed: ParsedAdapter, delta: Layer) -> Toy:
    return Toy(parsed, lambda inner, w: lambda x: inner(x) + w * delta(x))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def low_rank(seed: int) -> Toy:
    file, a, b = File(), draw(seed, 3, WIDE), draw(seed + 1, TALL, 3)
    parsed = file.adapter([LowRank(file.put(a), file.put(b), 1.5)])
    return adds(parsed, lambda x: 1.5 * x @ (b @ a).double().T)


def gated(seed: int) -> Toy:
    file, a, b, g = File(), draw(seed, 2, WIDE), draw(seed + 1, TALL, 2), draw(seed + 2, 1, WIDE)
    parsed = file.adapter([LowRank(file.put(a), file.put(b), 2.0, Gate(file.put(g)))])
    return adds(parsed, lambda x: 2 * torch.sigmoid(x @ g.double().T).mean(0) * (x @ (b @ a).double().T))


def kron(o1: int, i1: int) -> Callable[[int], Toy]:
    def made(seed: int) -> Toy:
        file, w1, w2 = File(), draw(seed, o1, i1), draw(seed + 1, TALL // o1, WIDE // i1)
        parsed = file.adapter([Kron(file.factor(w1), file.factor(w2), 0.5)])
        return adds(parsed, lambda x: 0.5 * x @ torch.kron(w1, w2).double().T)

    return made


def sparse(seed: int) -> Toy:
    file, values = File(), draw(seed, 40)
    index = torch.randperm(TALL * WIDE, generator=torch.Generator().manual_seed(seed))[:40].sort().values
    delta = torch.zeros(TALL * WIDE).index_copy(0, index, values).view(TALL, WIDE).double()
    return adds(file.adapter([Sparse(file.put(index.int()), file.put(values))]), lambda x: x @ delta.T)


def rows(seed: int) -> Toy:
    file, index, values = File(), torch.tensor([7, 2, 11]), draw(seed, 3, WIDE)
    delta = torch.zeros(TALL, WIDE).index_copy(0, index, values).double()
    return adds(file.adapter([Rows(file.put(index.int()), file.put(values))]), lambda x: x @ delta.T)


def columns(seed: int) -> Toy:
    file, index, values = File(), torch.tensor([4, 0, 9]), draw(seed, TALL, 3)
    delta = torch.zeros(TALL, WIDE).index_copy(1, index, values).double()
    return adds(file.adapter([Columns(file.put(index.int()), file.put(values))]), lambda x: x @ delta.T)


def dense(seed: int) -> Toy:
    file, delta = File(), draw(seed, TALL, WIDE)
    return adds(file.adapter([Dense(file.put(delta))]), lambda x: x @ delta.double().T)


def shared(seed: int) -> Toy:
    """Of one bank for all, larger than the linear."""
    file, a, b, inner, outer = File(), draw(1, 3, WIDE + 2), draw(2, TALL + 4, 3), draw(seed, 3), draw(seed + 1, TALL)
    parsed = file.adapter([Shared(Bank(file.put(a), file.put(b)), file.put(inner), file.put(outer))])
    delta = (outer[:, None] * b[:TALL] * inner @ a[:, :WIDE]).double()
    return adds(parsed, lambda x: x @ delta.T)


def bias(seed: int) -> Toy:
    file, v = File(), draw(seed, TALL)
    return adds(file.adapter([Bias(file.put(v), 3.0)]), lambda x: 3.0 * v.double())


def own_bias(seed: int) -> Toy:
    file, v = File(), draw(seed, TALL)
    return adds(file.adapter([Bias(file.put(v), absolute=True)]), lambda x: v.double() - B)


def scale_out(seed: int) -> Toy:
    file, v = File(), 1 + draw(seed, TALL, 1)
    parsed = file.adapter([Scale(file.put(v), of_input=False)])
    return Toy(parsed, lambda inner, w: lambda x: v.double().flatten() * inner(x))


def scale_in(seed: int) -> Toy:
    file, v = File(), 1 + draw(seed, 1, WIDE)
    parsed = file.adapter([Scale(file.put(v), of_input=True)])
    return Toy(parsed, lambda inner, w: lambda x: inner(x * v.double().flatten()))


def scale_and_pair(seed: int) -> Toy:
    """As methods that learn a weight's length are said: the running output less its bias, scaled with a pair in it."""
    file, c, a, b = File(), 1 + draw(seed, TALL), draw(seed + 1, 2, WIDE), draw(seed + 2, TALL, 2)
    pair = LowRank(file.put(a), file.put(c[:, None] * b))
    shift = Bias(file.put((1 - c) * BACKBONE.bias))
    parsed = file.adapter([Scale(file.put(c), of_input=False), pair, shift])

    def around(inner: Layer, w: float) -> Layer:
        return lambda x: c.double() * (inner(x) - B + x @ (b @ a).double().T) + B

    return Toy(parsed, around)


ADDING = {
    "low_rank": low_rank,
    "gated": gated,
    "kron": kron(4, 3),
    "kron_of_another_grid": kron(5, 4),
    "kron_of_few_numbers": kron(20, 1),
    "sparse": sparse,
    "rows": rows,
    "columns": columns,
    "dense": dense,
    "shared": shared,
    "bias": bias,
    "own_bias": own_bias,
}
SCALING = {"scale_out": scale_out, "scale_in": scale_in, "scale_and_pair": scale_and_pair}
TOYS = {**ADDING, **SCALING}


def composed(*chosen: tuple[Toy, float]) -> Tensor:
    members = [Member(f"m{i}", toy.parsed, weight) for i, (toy, weight) in enumerate(chosen)]
    return load(compose(*members), BACKBONE).linear(X, BACKBONE)


def written_out(*chosen: tuple[Toy, float]) -> Tensor:
    layer: Layer = base
    for toy, weight in chosen:
        layer = toy.around(layer, weight)
    return layer(X.double())


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / (1 + wanted.double().abs().max()))


@pytest.mark.parametrize("second", TOYS)
@pytest.mark.parametrize("first", TOYS)
def test_two_adapters_compute_what_the_second_makes_of_the_first(first, second):
    chosen = (TOYS[first](10), 1.0), (TOYS[second](20), 1.0)
    assert apart(composed(*chosen), written_out(*chosen)) <= 2e-6
    for one in chosen:
        assert apart(composed(*chosen), composed(one)) >= 2e-4, "an adapter that changes nothing proves nothing"


@pytest.mark.parametrize("kind", ADDING)
@pytest.mark.parametrize("weight", [0.5, -1.25])
def test_a_weight_multiplies_what_an_adapter_adds(kind, weight):
    toy = ADDING[kind](30)
    got = composed((toy, weight))
    assert apart(got, written_out((toy, weight))) <= 2e-6
    assert apart(got, base(X.double()) + weight * (composed((toy, 1.0)).double() - base(X.double()))) <= 4e-6
    assert apart(got, composed((toy, 1.0))) >= 2e-4


names = st.sampled_from(sorted(TOYS))
weights = st.floats(-2, 2, width=32)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(names, st.integers(0, 1000), weights), min_size=1, max_size=5))
def test_any_list_computes_what_its_members_compute_one_after_the_other(said):
    chosen = [(TOYS[kind](seed), 1.0 if kind in SCALING else weight) for kind, seed, weight in said]
    assert apart(composed(*chosen), written_out(*chosen)) <= 1e-5


@settings(deadline=None, max_examples=40)
@given(st.permutations(sorted(ADDING)), st.lists(weights, min_size=len(ADDING), max_size=len(ADDING)))
def test_what_only_adds_up_may_stand_in_any_order(order, drawn):
    weight = dict(zip(sorted(ADDING), drawn, strict=True))
    there, back = ([(ADDING[kind](40), weight[kind]) for kind in kinds] for kinds in (order, sorted(ADDING)))
    assert apart(composed(*there), composed(*back)) <= 1e-5


def test_the_order_shows_where_something_scales():
    lora, scale = (low_rank(1), 1.0), (scale_out(5), 1.0)
    assert apart(composed(lora, scale), composed(scale, lora)) >= 1e-2
    inner = (scale_in(5), 1.0)
    assert apart(composed(lora, inner), composed(inner, lora)) >= 1e-2


def test_an_adapter_may_stand_in_a_list_twice():
    toy = low_rank(1)
    assert apart(composed((toy, 1.0), (toy, 0.5)), composed((toy, 1.5))) <= 2e-6


@pytest.mark.parametrize(
    ("kind", "what"), [("scale_out", "output"), ("scale_in", "input"), ("scale_and_pair", "output")]
)
def test_scales_have_no_weight(kind, what):
    with pytest.raises(AdapterInvalid) as refusal:
        composed((TOYS[kind](1), 0.5))
    assert str(refusal.value) == f"weight of m0: expected 1, got 0.5 (it scales the {what} of {LINEAR})"


def replaced(kind: str) -> Toy:
    file, delta = File(), draw(3, TALL, WIDE)
    if kind == "dense":
        return adds(file.adapter([Dense(file.put(delta), replaces=True)]), lambda x: x @ delta.double().T)
    index = file.put(torch.arange(TALL).int())
    return adds(file.adapter([Rows(index, file.put(delta), replaces=True)]), lambda x: x @ delta.double().T)


@pytest.mark.parametrize("kind", ["dense", "rows"])
def test_a_weight_is_replaced_once(kind):
    toy = replaced(kind), 1.0
    others = (low_rank(1), 0.5), (dense(2), 2.0)
    assert apart(composed(toy, *others), written_out(toy, *others)) <= 2e-6
    with pytest.raises(AdapterInvalid) as refusal:
        composed(toy, *others, toy)
    wanted = f"m3: expected one replacement of the weight of {LINEAR}, got another beside that of m0"
    assert str(refusal.value) == f"{wanted} (one would undo the other)"
    with pytest.raises(
        AdapterInvalid, match=r"weight of m0: expected 1, got 2 \(it replaces the weight of layer.linear\)"
    ):
        composed((toy[0], 2.0))


def test_notes_name_their_adapter_and_nothing_is_lost():
    file = File()
    own = file.put(BACKBONE.weight)
    said = low_rank(1).parsed
    first = ParsedAdapter("TOY", "toy", {}, ((own, f"{LINEAR}.weight"),), ("told",), memoryview(bytes(file.data)))
    merged = compose(Member("m0", first), Member("m1", said))
    assert merged.notes == ("m0: told",)
    assert [path for _, path in merged.copies] == [f"{LINEAR}.weight"]
    load(merged, BACKBONE)
