"""The hooks: they hand to the kernels what a plain model has there, and what those change reaches the logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.server.backbone.families import (
    EXPECTED,
    attention_of,
    between_of,
    embedding_of,
    layers_of,
    norms_of,
)
from tests.server.backbone.spy import Spy, changed_embedding, changed_hidden, new_weight
from tests.support.backbones import ALL_FAMILIES, VOCABULARY, build
from weft.kernels.dispatch import Kernels
from weft.kernels.norms import Norm
from weft.server.backbone.model import Backbone
from weft.server.backbone.step import PagedKV, PrefillSpan, Step

LENGTHS = (4, 13)
TOUCHED = ("norms", "hidden", "embedding")


class Loaded:
    """A family's backbone, and a plain model of it for each question."""

    def __init__(self, family: str):
        self.family = family
        self.backbone = Backbone(build(family))
        self.layers = layers_of(family, int(self.backbone.model.config.num_hidden_layers))
        generator = torch.Generator().manual_seed(1)
        self.prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS]

    def step(self, spy: Spy | None, adapted: bool = True) -> Step:
        """Both prompts side by side, with the spy for kernels."""
        slots = torch.arange(1, 1 + sum(LENGTHS))
        spans, start = [], 0
        for length in LENGTHS:
            spans.append(PrefillSpan(start, start + length, slots[start : start + length]))
            start += length
        kv = PagedKV(self.backbone.kv_shapes, 1 + sum(LENGTHS), torch.float32, torch.device("cpu"))
        kernels: Any = spy
        rows: Any = spy.rows if spy is not None and adapted else None
        return Step(kv, slots, (), tuple(spans), kernels=kernels, rows=rows)

    def logits(self, step: Step) -> Tensor:
        """[tokens, vocabulary] of the whole batch."""
        ids = torch.cat(self.prompts)
        positions = torch.cat([torch.arange(n) for n in LENGTHS])
        return self.backbone.forward(ids, positions, torch.arange(len(ids)), step)

    def plainly(self, prepare: Callable[[nn.Module], None]) -> Tensor:
        """The same by transformers alone, one prompt after the other, on a model that was prepared."""
        model: Any = build(self.family)
        prepare(model)
        with torch.inference_mode():
            return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in self.prompts])


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def loaded(request) -> Loaded:
    return Loaded(request.param)


def prepare_norms(family: str, layers: list[str], model: nn.Module) -> None:
    """Give every norm its new weight."""
    for place, path in enumerate(norms_of(family, len(layers))):
        norm: Any = model.get_submodule(path)
        weight, bias = new_weight(place, norm.weight.numel())
        with torch.no_grad():
            norm.weight.copy_(weight)
            if getattr(norm, "bias", None) is not None:
                norm.bias.copy_(bias)


def prepare_hidden(family: str, layers: list[str], model: nn.Module) -> None:
    """Change what sublayers give, from inputs that are worked out anew: x0, and x0 + h for the second."""
    for layer in layers:
        _prepare_layer(model, layer, EXPECTED[family][3], between_of(family))


def _prepare_layer(model: nn.Module, layer: str, ends: tuple[str, str], between: tuple[str, str]) -> None:
    state: dict[str, Tensor] = {}

    def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
        state["x"] = args[0]

    def normed(_: nn.Module, __: Any, output: Tensor) -> None:
        state["ln"] = output

    def end(_: nn.Module, __: Any, output: Any) -> Any:
        h = output if isinstance(output, Tensor) else output[0]
        x = state["x"].reshape(h.shape)
        changed = changed_hidden(h, x, state["ln"].reshape(h.shape) if "ln" in state else None)
        state["x"] = x + changed
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    model.get_submodule(layer).register_forward_pre_hook(begin)
    for name in between:
        if name:
            model.get_submodule(f"{layer}.{name}").register_forward_hook(normed)
    for name in ends:
        model.get_submodule(f"{layer}.{name}").register_forward_hook(end)


def prepare_embedding(family: str, layers: list[str], model: nn.Module) -> None:
    """Change what the embedding gives."""
    module = model.get_submodule(embedding_of(family))
    module.register_forward_hook(lambda _, args, output: changed_embedding(output, args[0]))


PREPARE = {"norms": prepare_norms, "hidden": prepare_hidden, "embedding": prepare_embedding}


def farther(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("touched", [("norms",), ("hidden",), ("embedding",), TOUCHED], ids="-".join)
def test_what_changes_at_a_place_is_what_a_plain_model_would_have_changed(loaded, touched):
    def prepare(model: nn.Module) -> None:
        for name in touched:
            PREPARE[name](loaded.family, loaded.layers, model)

    base = loaded.plainly(lambda _: None)
    want = loaded.plainly(prepare)
    got = loaded.logits(loaded.step(Spy(frozenset(touched))))
    assert farther(want, base) > 0.05
    assert farther(got, want) < 2e-5


def test_a_step_whose_adapters_have_nothing_there_keeps_every_bit(loaded):
    spy = Spy()
    base = loaded.logits(loaded.step(None))
    assert torch.equal(loaded.logits(loaded.step(spy)), base)
    assert spy.asked == {"has", "touches_hidden"}


def test_a_step_of_base_rows_asks_nothing(loaded):
    spy = Spy(frozenset(TOUCHED))
    loaded.logits(loaded.step(spy, adapted=False))
    assert not spy.asked


def test_hooks_stand_only_while_a_step_needs_them(loaded):
    """Steps of other adapters and of base rows pay nothing, whatever ran before."""

    def hooks() -> int:
        modules = loaded.backbone.model.modules()
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    base = loaded.logits(loaded.step(None))
    bare = hooks()
    loaded.logits(loaded.step(Spy(frozenset(TOUCHED))))
    assert hooks() > bare
    loaded.logits(loaded.step(Spy(frozenset({"embedding"}))))
    assert hooks() == bare + 1
    assert torch.equal(loaded.logits(loaded.step(None)), base)
    assert hooks() == bare


def test_places_act_in_their_order_and_a_norm_before_what_reads_it(loaded):
    spy = Spy(frozenset(TOUCHED))
    loaded.logits(loaded.step(spy))
    norms, hidden = ([place for kind, place in spy.order if kind == which] for which in ("norm", "hidden"))
    assert norms == list(range(len(loaded.backbone.info.norms)))
    assert hidden == list(range(len(loaded.backbone.info.hidden)))
    ends = {place.path: i for i, place in enumerate(loaded.backbone.places.hidden)}
    for index, norm in enumerate(loaded.backbone.places.norms):
        if norm.path in ends:
            at = spy.order.index(("norm", index))
            assert spy.order[at + 1] == ("hidden", ends[norm.path])


def test_attention_inputs_are_kept_for_prefixes_with_a_gate_alone(loaded):
    seen: dict[int, list[Tensor]] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(int(module.layer_idx), []).append(args[0] if args else kwargs["hidden_states"])

    def prepare(model: nn.Module) -> None:
        for layer in loaded.layers:
            attention = model.get_submodule(attention_of(loaded.family, layer))
            attention.register_forward_pre_hook(note, with_kwargs=True)

    loaded.plainly(prepare)
    step = loaded.step(Spy(prefixes={0: False, 1: True}))
    loaded.logits(step)
    assert set(step.attention_inputs) == {1}
    want = torch.cat([x[0] for x in seen[1]])
    assert step.attention_inputs[1].shape == want.shape
    assert torch.allclose(step.attention_inputs[1], want, rtol=1e-4, atol=1e-4)


def test_soft_prompts_are_handed_on_without_any_row_of_the_embedding(loaded):
    spy = Spy()
    soft: Any = ("a span",)
    loaded.logits(replace(loaded.step(spy), soft=soft))
    assert spy.softs == [soft]


@pytest.mark.parametrize(("family", "holder"), [("llama", "self_attn.o_proj"), ("phi3", "mlp.down_proj")])
def test_what_others_hold_is_not_changed_under_them(family, holder):
    """The module that ends a sublayer may return the very tensor that one inside it made."""
    loaded = Loaded(family)
    held: list[tuple[Tensor, Tensor]] = []
    for layer in loaded.layers:
        module = loaded.backbone.model.get_submodule(f"{layer}.{holder}")
        module.register_forward_hook(lambda _, __, output: held.append((output, output.clone())))
    spy = Spy(frozenset({"hidden"}))
    loaded.logits(loaded.step(spy))
    assert len(held) == len(loaded.layers)
    assert all(torch.equal(now, then) for now, then in held)


def test_the_spy_speaks_as_the_kernels_do():
    """What it stands in for has the same methods and the same words for what they take."""
    import inspect

    for name in ("has", "carried", "touches_hidden", "override_norm", "hidden", "embed", "touches", "input_scaled"):
        mine, theirs = (list(inspect.signature(getattr(each, name)).parameters) for each in (Spy, Kernels))
        assert mine == theirs, name
    assert set(Norm.__dataclass_fields__) == {"weight", "bias", "eps", "centred", "offset"}
