"""Which networks can stand beside a backbone: its class at smaller widths, proven when it is loaded."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.backbones import ALL_FAMILIES, COMMON, build
from weft.server.backbone import side
from weft.server.backbone.model import Backbone
from weft.server.backbone.step import PagedKV


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_layers_of_every_family_stand_at_a_smaller_width(family):
    backbone = Backbone(build(family))
    assert [info.reduction for info in backbone.info.sides][:2] == [2, 4]
    for info in backbone.info.sides:
        assert info.features * info.reduction == 32
        # as many parameters as a layer of the backbone has, and of its norm
        layer = backbone.model.get_submodule(backbone.info.layers[0].path)
        assert [name for name, _ in info.block] == [name for name, _ in layer.named_parameters()]
        assert info.norm[0] == ("weight", (info.features,))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rows_run_as_one_network_in_every_family_without_experts(family):
    found = side.Networks(*_parts(Backbone(build(family))))
    # the norms of heads stand where the family has them: before or behind the turn to heads
    assert found.heads_first is {"gemma3": True, "mixtral": None}.get(family, False)


def _parts(backbone: Backbone) -> tuple[Any, Any, Any]:
    return backbone.model, backbone.places, backbone.kv_shapes


def test_a_family_whose_rows_do_not_come_out_alike_runs_them_one_by_one(monkeypatch):
    monkeypatch.setattr(side, "give_rows_weights", lambda *_, **__: None)
    model = Backbone(build("llama"))
    assert model.info.sides
    assert side.Networks(*_parts(model)).heads_first is None


def test_a_width_that_does_not_divide_has_no_network():
    # rope turns pairs, and a head of two is one
    model = LlamaForCausalLM(LlamaConfig(**COMMON, num_hidden_layers=1, head_dim=2))
    assert Backbone(model).info.sides == ()


def test_layers_of_several_kinds_have_none():
    model = build("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48, bias=True)
    assert Backbone(model).info.sides == ()


def fails(*_: object) -> None:
    raise KeyError("a width that is not written in it")


@pytest.mark.parametrize("how", ["raises", "computes something else"])
def test_a_class_that_does_not_work_at_another_width_has_none(how, monkeypatch):
    if how == "raises":
        monkeypatch.setattr(side, "reduced", fails)
    else:
        # keys and values of all layers in one place: text in pieces reads what the last layer left
        narrowed = PagedKV.narrowed
        monkeypatch.setattr(PagedKV, "narrowed", lambda kv, layers, r: narrowed(kv, [0] * len(layers), r))
    assert Backbone(build("llama")).info.sides == ()


def test_narrowed_pages_are_the_same_memory():
    kv = PagedKV([(2, 8, 8), (2, 8, 8)], 6, torch.float32, torch.device("cpu"))
    narrow = kv.narrowed([1], 4)
    assert [tuple(t.shape) for t in (*narrow.keys, *narrow.values)] == [(2, 24, 2)] * 2
    for wide, tight in ((kv.keys[1], narrow.keys[0]), (kv.values[1], narrow.values[0])):
        tight[:, 4 * 3 + 1] = 7.0
        assert torch.equal(wide[:, 3, 2:4], torch.full((2, 2), 7.0))
    assert len(kv.keys) == 2
