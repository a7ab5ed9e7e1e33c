"""Formats of weft's own that act behind sublayers and in front of the text: their blocks, place by place, in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.adapters_store.native_blocks import TOLERANCE, Compiled, compiled
from tests.support.methods import native_places, native_prefixes
from tests.support.methods.case import ALL
from tests.support.methods.native_files import Tensors, read
from tests.support.methods.native_places import SHAPES, bottleneck, krona_b, tapped
from weft.adapters_store.parts import TAPS
from weft.kernels.activation import activate
from weft.kernels.extras import Extra, Kind

CASES = {case.name: case for case in (*native_places.CASES, *native_prefixes.CASES)}
BEHIND = [name for name in CASES if name.startswith(("bottleneck", "krona"))]
TOKENS = 7


def mapped(x: Tensor, factors: tuple[Tensor | None, ...], terms: int) -> Tensor:
    """x through a matrix [out, in], or the sum of Kronecker products written out."""
    found = [None if factor is None else factor.double() for factor in factors]
    if not terms:
        assert found[0] is not None
        return x @ found[0].T
    whole = torch.zeros((), dtype=torch.float64)
    for w1, w2, right in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert w1 is not None
        assert w2 is not None
        whole = whole + torch.kron(w1, w2 if right is None else w2.T @ right)
    return x @ whole.T


def as_recorded(record: Extra, h: Tensor, x_res: Tensor, ln_x: Tensor) -> Tensor:
    """The formula of ``parts.Bottleneck`` from a record's pieces."""
    tap, act, down_terms, up_terms, epsilon = record.options
    norm_weight, norm_bias, gate, gate_bias, skip, down_bias, up_bias = record.tensors[:7]
    maps, split = record.tensors[7:], max(1, 3 * down_terms)
    x = tapped(TAPS[tap], h, x_res, ln_x).double()
    u = x
    if norm_weight is not None and norm_bias is not None:
        eps = float(torch.tensor(epsilon, dtype=torch.int32).view(torch.float32))
        u = F.layer_norm(x, x.shape[-1:], norm_weight[0].double(), norm_bias[0].double(), eps)
    out = mapped(u, maps[:split], down_terms) + (0 if down_bias is None else down_bias)
    if maps[split:]:
        out = mapped(activate(out, act), maps[split:], up_terms) + (0 if up_bias is None else up_bias)
    if skip is not None:
        out = out + skip * x
    if gate is not None:
        out = (
            torch.sigmoid(F.linear(x, gate.double(), None if gate_bias is None else gate_bias[0].double())).mean() * out
        )
    return h + out


def as_compiled(block: Compiled, place: int, h: Tensor, x_res: Tensor, ln_x: Tensor) -> Tensor:
    """What a block makes of h [tokens, d] at a hidden place."""
    record = block.of(Kind.BOTTLENECK, place)
    if record is not None:
        return as_recorded(record, h, x_res, ln_x)
    terms = block.terms.get(len(block.sites.info.sites) + place)
    if terms is None:
        return h
    assert terms.low_rank is not None
    a, b = (factor.double() for factor in terms.low_rank)
    x = tapped(TAPS[terms.tap], h, x_res, ln_x).double()
    inside = x @ a.T + (0 if terms.inner is None else terms.inner)
    return h + activate(inside, terms.act) @ b.T + (0 if terms.beta is None else terms.beta)


def own_tensors(tensors: Tensors, layer: str, after: str, attention: str) -> Tensors:
    """Those of one place, whichever of its names it has."""
    names = (f"{layer}.{after}.", *([f"{attention}."] if after == "attention" else []))
    return {n.removeprefix(name): t for name in names for n, t in tensors.items() if n.startswith(name)}


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", BEHIND)
def test_what_lies_behind_a_sublayer_computes_the_papers_formula(name, family, tmp_path):
    folder = CASES[name].make(family, tmp_path, 3)
    config, tensors = read(folder)
    block, changes = compiled(family, folder), 0
    random = torch.Generator().manual_seed(1)
    for index, place in enumerate(block.sites.info.hidden):
        layer = block.sites.info.layers[place.layer]
        own = own_tensors(tensors, layer.path, place.after, layer.attention)
        h, x_res, ln_x = torch.randn(3, TOKENS, place.features, generator=random)
        got = as_compiled(block, index, h, x_res, ln_x)
        if not own:
            assert torch.equal(got, h)
            continue
        if config["peft_type"] == "X_KRONA_B":
            change = krona_b(config["scale"], config["tap"], {role: t.double() for role, t in own.items()})
        else:
            change = bottleneck(config, own)
        wanted = change(h[None], x_res[None], ln_x[None])[0]
        size = 1 + float(wanted.abs().max())
        assert float((got - wanted).abs().max()) <= TOLERANCE * size
        assert float((h - wanted).abs().max()) >= 100 * TOLERANCE * size
        changes += 1
    shape = SHAPES.get(name.removeprefix("bottleneck_"))
    assert changes == len(block.sites.info.layers) * (1 if shape is None else len(shape.after))


def test_two_matrices_and_a_function_take_no_record(tmp_path):
    block = compiled("llama", CASES["bottleneck_houlsby"].make("llama", tmp_path, 0))
    assert block.records == ()
    assert block.report.sites[0].operators == ("bottleneck r=6 relu of h",)


def test_a_map_of_kronecker_products_is_not_written_out(tmp_path):
    shapes = []
    for name in ("bottleneck_compacter", "bottleneck_gated_compacter"):
        record = compiled("llama", CASES[name].make("llama", tmp_path / name, 0)).of(Kind.BOTTLENECK, 0)
        assert record is not None
        shapes.append([None if tensor is None else tuple(tensor.shape) for tensor in record.tensors[7:]])
    # factors of rank 1 stay two; of rank 2 their product is no larger
    assert shapes[0] == [(4, 4), (1, 2), (1, 8)] * 4 + [(4, 4), (1, 8), (1, 2)] * 4
    assert shapes[1] == [(4, 4), (2, 8), None] * 4 + [(4, 4), (8, 2), None] * 4


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", ["apt_4", "apt_2"])
def test_a_prefix_of_a_layer_is_its_own_times_its_number(name, family, tmp_path):
    folder = CASES[name].make(family, tmp_path, 5)
    _, tensors = read(folder)
    block, count = compiled(family, folder), int(name[-1])
    table = tensors["prompt_embeddings"]
    for number, layer in enumerate(block.sites.info.layers):
        record = block.of(Kind.PREFIX, number)
        assert record is not None
        assert record.options == (count, 1, 1, 0)
        seen = table.view(count, 2 * len(block.sites.info.layers), layer.kv_heads, layer.key_size)
        for at in (0, 1):
            wanted = tensors[f"layers.{number}.lambda"] * seen[:, 2 * number + at].transpose(0, 1).reshape(
                -1, seen.shape[-1]
            )
            torch.testing.assert_close(record.tensors[at], wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(record.tensors[2], tensors[f"layers.{number}.gate.weight"], rtol=0, atol=0)
        bias = tensors.get(f"layers.{number}.gate.bias")
        got = record.tensors[3]
        assert bias is None if got is None else bias is not None and torch.equal(got[0], bias)
    traits = block.report.traits
    assert (traits.position_offset, traits.whole_prompt, traits.cacheable) == (count, True, False)


def test_decoded_rows_stand_in_front_of_the_text(tmp_path):
    folder = CASES["ipt"].make("gpt2", tmp_path, 5)
    block = compiled("gpt2", folder)
    record = block.of(Kind.SOFT)
    assert record is not None
    (rows,) = record.tensors
    assert rows is not None
    assert torch.equal(rows, read(folder)[1]["prompt_embeddings"])
    assert block.report.traits.extra_rows == 5
