"""The backbone: which sites it finds, what it refuses, and that nothing is held twice."""

import io
import sys
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from tests.support.backbones import COMMON, FAMILIES, VOCABULARY, build
from weft.server.backbone import model, sites
from weft.server.backbone.errors import BackboneNotFound, UnsupportedBackbone
from weft.server.backbone.linears import LinearGroup
from weft.server.backbone.load import choose_dtype, load_model
from weft.server.backbone.model import Backbone
from weft.server.backbone.packed import pack
from weft.server.backbone.selftest import difference

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt2"])
def test_sites_that_share_an_input_are_groups(family):
    backbone = Backbone(build(family))
    paths = [site.path for site in backbone.info.sites]
    assert backbone.info.groups[:4] == (3, 1, 2, 1)
    assert [p.removeprefix("model.layers.0.") for p in paths[:7]] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert paths[-1] == "lm_head"
    assert sum(backbone.info.groups) == len(paths)


def test_conv1d_sites_are_named_with_their_true_widths():
    backbone = Backbone(build("gpt2"))
    first = backbone.info.sites[0]
    assert (first.path, first.in_features, first.out_features, first.kind, first.has_bias) == (
        "transformer.h.0.attn.c_attn", 32, 96, "conv1d", True,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_joining_weights_holds_nothing_twice_and_keeps_every_parameter(family):
    plain, backbone = build(family), Backbone(build(family))
    want = dict(plain.named_parameters(remove_duplicate=False))
    assert backbone.parameter_bytes == sum(p.numel() * p.element_size() for p in plain.parameters())
    for path, parameter in want.items():
        found = backbone.parameter(path)
        assert found is not None
        assert torch.equal(found, parameter), path


def test_the_digest_is_of_the_weights():
    assert Backbone(build("llama")).info.digest == Backbone(build("llama")).info.digest
    changed = build("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert Backbone(changed).info.digest != Backbone(build("llama")).info.digest


@pytest.mark.parametrize(
    "model",
    [
        lambda: BloomForCausalLM(BloomConfig(**TINY, n_layer=2, n_head=4)),
        lambda: FalconForCausalLM(FalconConfig(**TINY, num_hidden_layers=2)),
    ],
    ids=["bloom", "falcon"],
)
def test_families_that_ignore_the_attention_interface_are_refused_by_name(model):
    with pytest.raises(UnsupportedBackbone, match=r"ignores .* attention interface: expected .* 2 layers, got 0"):
        Backbone(model().eval())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_neighbours_would_change_is_refused(kind):
    more = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **(more if kind == "longrope" else {})}
    model = LlamaForCausalLM(LlamaConfig(**COMMON, num_hidden_layers=1, rope_parameters=rope))
    with pytest.raises(UnsupportedBackbone, match=f"uses {kind} rope, whose frequencies depend on the other requests"):
        Backbone(model.eval())


def test_a_window_that_only_the_mask_knows_is_refused():
    config = LlamaConfig(**COMMON, num_hidden_layers=2)
    config.sliding_window = 8
    with pytest.raises(UnsupportedBackbone, match=r"sliding window of 8 that layers \[0, 1\] do not tell"):
        Backbone(LlamaForCausalLM(config).eval())


def test_attention_in_chunks_is_refused():
    config = LlamaConfig(**COMMON, num_hidden_layers=1)
    config.attention_chunk_size = 8
    with pytest.raises(UnsupportedBackbone, match="attends in chunks"):
        Backbone(LlamaForCausalLM(config).eval())


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(UnsupportedBackbone, match="encoder-decoder"):
        Backbone(T5ForConditionalGeneration(config).eval())


def test_a_model_that_computes_something_else_in_pages_is_refused(monkeypatch):
    """The control of the load-time proof: an attention that forgets the scale must not pass."""
    import weft.server.backbone.attention as attention

    right = attention.paged_attention
    wrong = lambda *a, **k: right(*a, **{**k, "scaling": 1.0})  # noqa: E731
    monkeypatch.setattr(attention, "paged_attention", wrong)
    with pytest.raises(UnsupportedBackbone, match="computes something else in a paged batch: logits differ by"):
        Backbone(build("llama"))


def test_groups_that_cannot_be_joined_are_run_one_by_one(monkeypatch):
    calls = []

    def first_fails(*args):
        calls.append(1)
        return "not the same" if len(calls) == 1 else difference(*args)

    monkeypatch.setattr("weft.server.backbone.model.difference", first_fails)
    backbone = Backbone(build("llama"))
    assert set(backbone.info.groups) == {1}


def test_repeated_and_unrelated_calls_do_not_form_groups():
    x, y = torch.zeros(1), torch.zeros(1)
    calls = [("a.q", x), ("a.k", x), ("b.v", x), ("a.o", y), ("a.q", y), ("a.z", y)]
    assert sites._runs(calls) == [("a.q", "a.k"), ("b.v",), ("a.o",), ("a.z",)]


def test_a_folder_loads_and_a_missing_one_says_what_was_expected(tmp_path):
    build("llama").save_pretrained(tmp_path / "good")
    loaded = load_model(str(tmp_path / "good"), torch.float32, torch.device("cpu"))
    assert isinstance(loaded, LlamaForCausalLM)
    with pytest.raises(BackboneNotFound, match=r"expected a folder with config.json and \*.safetensors"):
        load_model(str(tmp_path / "none"), torch.float32, torch.device("cpu"))


def test_pickled_weights_are_not_read(tmp_path):
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneNotFound):
        load_model(str(tmp_path), torch.float32, torch.device("cpu"))


def test_dtypes_by_name_are_what_they_say():
    assert choose_dtype("float16", torch.device("cpu")) is torch.float16


def test_a_processor_that_cannot_pack_bfloat16_multiplies_it_as_it_is(monkeypatch):
    """Processors without the instructions refuse packed bfloat16 with an error."""
    supported = lambda: False  # noqa: E731
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", supported)
    assert pack(torch.randn(8, 16).bfloat16()) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_how_far_loading_is_and_a_log_does_not(terminal, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    transformers_logging.enable_progress_bar()
    with pytest.raises(BackboneNotFound):
        load_model(str(tmp_path / "none"), torch.float32, torch.device("cpu"))
    assert transformers_logging.is_progress_bar_enabled() is terminal


def test_linears_that_cannot_be_joined_are_noted(monkeypatch, caplog):
    answers = iter(["logits differ", None])
    monkeypatch.setattr(model, "difference", lambda *_: next(answers))
    backbone = Backbone(build("llama"))
    assert set(backbone.info.groups) == {1}
    assert "run one by one: joined, logits differ" in backbone.notes[0]
    assert backbone.notes[0] in caplog.text


def test_linears_that_are_not_packed_are_counted_and_noted(monkeypatch, caplog):
    right, calls = LinearGroup.pack, []

    def every_other(group):
        calls.append(group)
        return len(calls) % 2 == 0 and right(group)

    whole = Backbone(build("llama"))
    assert whole.notes == ()
    count = len(whole.groups)
    assert whole.linears == f"onednn ({count} of {count} groups)"
    monkeypatch.setattr(LinearGroup, "pack", every_other)
    half = Backbone(build("llama"))
    assert half.linears == f"onednn ({count // 2} of {count} groups)"
    assert half.notes == (f"oneDNN multiplies {count // 2} of {count} groups of linears, torch the others",)
    assert half.notes[0] in caplog.text
    monkeypatch.setattr(LinearGroup, "pack", lambda group: False)
    assert Backbone(build("llama")).linears == "torch"
