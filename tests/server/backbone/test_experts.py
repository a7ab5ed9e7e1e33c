"""Which modules hold experts that adapters can act inside, found by watching, proven on numbers; and what they do."""

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.backbones import ALL_FAMILIES, build
from tests.support.methods.peft_experts import transposed
from weft.server.backbone import experts
from weft.server.backbone.experts import ExpertsPlace
from weft.server.backbone.model import Backbone
from weft.server.backbone.recording import record

COUNT, WIDTH, INNER = 4, 32, 48
PATHS = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_only_families_with_experts_have_places(family):
    found = Backbone(build(family)).info.experts
    if family != "mixtral":
        assert found == ()
        return
    assert [place.path for place in found] == PATHS
    for place in found:
        assert place.experts == COUNT
        assert place.parameters == (("gate_up_proj", (2 * INNER, WIDTH)), ("down_proj", (WIDTH, INNER)))


def places_of(model: Any, tokens: int = 5) -> list[ExpertsPlace]:
    ids = torch.arange(3, 3 + tokens)
    return list(experts.find(record(model, lambda: model(input_ids=ids[None], use_cache=False)), tokens))


def test_transposed_parameters_are_told_apart():
    found = places_of(transposed())
    assert [place.transposed for place in found] == [True, True]
    assert found[0].info == places_of(build("mixtral"))[0].info


@pytest.mark.parametrize("what", ["gate", "output", "one expert", "bias"])
def test_what_computes_something_else_is_no_place(what):
    model = build("mixtral")
    module: Any = model.get_submodule(PATHS[0])
    plain = module.forward

    def bent(self: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        made: Tensor = plain(x, chosen, weights)
        return made + (chosen == 3).any(dim=1, keepdim=True) if what == "one expert" else 1.01 * made

    if what == "gate":
        # what is asked for the gate does not do what is done
        module._apply_gate = MethodType(lambda self, wide: wide.chunk(2, dim=-1)[1], module)
        model.set_experts_implementation("eager")
    elif what == "bias":
        module.gate_up_proj_bias = nn.Parameter(torch.zeros(COUNT, 2 * INNER))
    else:
        module.forward = MethodType(bent, module)
    assert [place.path for place in places_of(model)] == PATHS[1:]


@pytest.mark.parametrize("turned", [False, True])
def test_pairs_act_as_their_products_in_the_weights(turned):
    model = transposed() if turned else build("mixtral")
    module: Any = model.get_submodule(PATHS[0])
    shapes = ((2 * INNER, WIDTH), (WIDTH, INNER))
    place = ExpertsPlace(PATHS[0], COUNT, shapes, turned)
    random = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * 0.3

    ranked = zip(shapes, (3, 2), strict=True)
    pairs = {i: (noise(COUNT * r, wide), noise(COUNT * r, tall)) for i, ((tall, wide), r) in enumerate(ranked)}
    x, weights = noise(7, WIDTH), torch.rand(7, 2, generator=random)
    chosen = torch.stack([torch.randperm(COUNT, generator=random)[:2] for _ in range(7)])
    want = torch.zeros(7, WIDTH, dtype=torch.float64)
    for row in range(7):
        for at in range(2):
            expert = int(chosen[row, at])
            full = []
            for i, (a, b) in pairs.items():
                r = a.shape[0] // COUNT
                own = slice(expert * r, (expert + 1) * r)
                full.append(place.weight(module, i, expert).double() + b[own].double().T @ a[own].double())
            gate, up = (full[0] @ x[row].double()).chunk(2)
            want[row] += weights[row, at].double() * (full[1] @ (nn.functional.silu(gate) * up))
    with torch.inference_mode():
        got = place.compute(module, x, chosen, weights, pairs)
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()
        bare = place.compute(module, x, chosen, weights, {})
    assert (bare - want).abs().max() >= 1e-2 * want.abs().max(), "it proves nothing"
