"""Places beyond linears: what is found in each family, in which form, and that nothing is claimed without proof."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from tests.server.backbone.families import EXPECTED, LAYER_NORM, attention_of, embedding_of, layers_of, norms_of
from tests.support.backbones import ALL_FAMILIES, COMMON, VOCABULARY, build
from weft.adapters_store.sites import EmbeddingInfo, LayerInfo
from weft.server.backbone import norms
from weft.server.backbone.model import Backbone
from weft.server.backbone.places import probe_tokens
from weft.server.backbone.recording import Call, record


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def loaded(request) -> tuple[str, Backbone]:
    return request.param, Backbone(build(request.param))


def count(backbone: Backbone) -> int:
    """How many decoder layers there are."""
    return int(backbone.model.config.num_hidden_layers)


def test_norms_are_found_with_their_form_in_the_order_in_which_they_run(loaded):
    family, backbone = loaded
    _, form, eps, _, _ = EXPECTED[family]
    assert [norm.path for norm in backbone.info.norms] == norms_of(family, count(backbone))
    for place, info in zip(backbone.places.norms, backbone.info.norms, strict=True):
        module = backbone.model.get_submodule(info.path)
        assert (place.form.centred, place.form.offset) == form
        assert place.form.eps == pytest.approx(eps)
        assert info.features == module.weight.numel()
        assert info.has_bias == (form == LAYER_NORM)


def test_sublayers_end_where_the_residual_stream_is_joined(loaded):
    family, backbone = loaded
    *_, (attention, mlp), taps = EXPECTED[family]
    layers = layers_of(family, count(backbone))
    assert [(place.layer, place.after) for place in backbone.info.hidden] == [
        (i, after) for i in range(len(layers)) for after in ("attention", "mlp")
    ]
    assert [p.path for p in backbone.places.hidden] == [f"{x}.{end}" for x in layers for end in (attention, mlp)]
    assert {place.taps for place in backbone.info.hidden} == {taps}
    assert {place.features for place in backbone.info.hidden} == {32}


def test_hidden_places_stand_behind_the_sites_in_the_geometry(loaded):
    _, backbone = loaded
    geometry, info = backbone.geometry, backbone.info
    assert geometry.hidden == len(info.hidden)
    assert len(geometry.sites) == len(info.sites) + len(info.hidden)
    assert geometry.groups == (*info.groups, *[1] * len(info.hidden))
    for place, shape in zip(info.hidden, geometry.sites[len(info.sites) :], strict=True):
        assert (shape.in_features, shape.out_features) == (place.features, place.features)


def test_layers_say_who_attends_and_how_wide_keys_and_values_are(loaded):
    family, backbone = loaded
    config = backbone.model.config
    size = getattr(config, "head_dim", None) or 32 // 4
    heads = getattr(config, "num_key_value_heads", 4)
    assert list(backbone.info.layers) == [
        LayerInfo(path, attention_of(family, path), heads, size, size, 32)
        for path in layers_of(family, count(backbone))
    ]


def test_the_embedding_says_its_head_and_its_scale(loaded):
    family, backbone = loaded
    tied = "lm_head" if family in ("gpt2", "opt", "gemma2", "gemma3") else ""
    # what the module multiplies by, in its own dtype
    scale = torch.tensor(32.0).sqrt().item() if family in ("gemma2", "gemma3") else 1.0
    assert backbone.info.embedding == EmbeddingInfo(embedding_of(family), VOCABULARY, 32, tied, scale)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_the_same_places_are_found_in_bfloat16(family):
    whole, half = Backbone(build(family)), Backbone(build(family).bfloat16())
    assert half.places.norms == whole.places.norms
    assert half.places.hidden == whole.places.hidden
    assert half.info.layers == whole.info.layers
    assert whole.info.embedding is not None
    assert half.info.embedding is not None
    assert half.info.embedding.scale == torch.tensor(whole.info.embedding.scale).bfloat16().item()


def random(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights that are all different."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.eval()
    return model


def _neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON, num_hidden_layers=2, use_parallel_residual=True))


def _granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**COMMON, num_hidden_layers=2, residual_multiplier=0.5))


def _post_norm_opt() -> PreTrainedModel:
    tiny: dict[str, Any] = {k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")}
    return OPTForCausalLM(
        OPTConfig(**tiny, num_hidden_layers=2, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)
    )


@pytest.mark.parametrize("make", [_neox, _granite, _post_norm_opt])
def test_layers_that_do_not_add_up_have_no_hidden_places(make):
    """Both sublayers at once, a sublayer times a number, and a norm behind the sum: all else is found."""
    backbone = Backbone(random(make()))
    assert backbone.info.hidden == ()
    assert backbone.geometry.hidden == 0
    assert len(backbone.info.norms) >= 4
    assert [layer.features for layer in backbone.info.layers] == [32, 32]
    assert backbone.info.embedding is not None


def test_sublayers_that_give_zero_prove_nothing():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    found = Backbone(model).info.hidden
    assert [(place.layer, place.after) for place in found] == [(0, "attention"), (0, "mlp")]


class Doubled(nn.LayerNorm):
    """Twice a layer norm: almost a norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class OtherEpsilon(nn.LayerNorm):
    """Says one epsilon and computes with another."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, 1e-3)


class Scaled(nn.LayerNorm):
    """Has a parameter that an override would forget."""

    def __init__(self, width: int):
        super().__init__(width)
        self.more = nn.Parameter(torch.ones(width))


def form(module: nn.Module) -> norms.NormForm | None:
    """What a module with random weights is taken for."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    return norms.form_of(module, torch.zeros(1, 5, 12))


def test_a_form_is_claimed_only_for_what_computes_it():
    assert form(nn.LayerNorm(12, eps=1e-4)) == norms.NormForm(True, 1e-4, 0.0)
    assert form(nn.LayerNorm(12, bias=False)) == norms.NormForm(True, 1e-5, 0.0)
    assert form(nn.RMSNorm(12, eps=1e-6)) == norms.NormForm(False, 1e-6, 0.0)
    for other in (Doubled(12), OtherEpsilon(12), Scaled(12), nn.LayerNorm(12, elementwise_affine=False)):
        assert form(other) is None


class Pooled(nn.Module):
    """A norm that every token passes, and one that sees the last token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.last = nn.LayerNorm(12), nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.all(x)[:, -1:])
        return y


def test_a_norm_that_does_not_see_every_token_is_no_place():
    model = Pooled()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    found = norms.find(record(model, lambda: model(torch.randn(1, 5, 12))), 5)
    assert [norm.path for norm in found] == ["all"]


def test_a_recording_tells_who_called_whom_and_is_not_changed_afterwards():
    model = nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True))
    x = torch.tensor([[-1.0, 2.0]])
    outer, first, second = record(model, lambda: model(x))
    assert (outer.path, first.path, second.path) == ("", "0", "1")
    assert first.within(outer)
    assert not first.within(second)
    assert isinstance(outer, Call)
    assert torch.equal(outer.inputs[0], torch.tensor([[-1.0, 2.0]]))
    assert first.output is not None
    assert torch.equal(first.output, torch.tensor([[0.0, 2.0]]))


def test_no_count_of_heads_is_taken_for_the_tokens():
    assert [probe_tokens(heads) for heads in ((), (5, 1), (7, 5))] == [5, 7, 3]
