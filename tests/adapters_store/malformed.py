"""Adapters that must be refused: what is broken, which field the refusal names, which words its message has.

``MALFORMED`` is for whoever registers adapters: the store's tests do it by hand, others through a socket. All are made
for the tiny llama, and none of them needs a dtype other than fp32 to be wrong.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.adapters_store.files import HIDDEN, KV, Q0, RANK, V1, Files, P, filled, ia3, krona, lokr, lora, noise
from tests.adapters_store.malformed_bytes import broken_config_bytes, broken_weights
from tests.adapters_store.malformed_peft import broken_variants

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REDOS = r"((\w|\w\w)+\.?)*Z"


@dataclass(frozen=True)
class Malformed:
    """Files whose refusal names ``field`` and has ``words`` in its message."""

    files: Files
    field: str
    words: str


def _settings() -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """Settings on top of a LORA that is right: id, settings, field, words."""
    yield "r_true", {"r": True}, "r", "expected an integer"
    yield "r_text", {"r": "8"}, "r", 'got "8"'
    yield "r_float", {"r": 4.0}, "r", "got 4.0"
    yield "r_negative", {"r": -1}, "r", "at least 1"
    yield "r_zero", {"r": 0}, "r", "at least 1"
    yield "r_huge", {"r": 2**31}, "r", "expected an integer"
    yield "r_missing", {"r": ...}, "r", "expected a value, got none"
    yield "r_not_of_the_tensors", {"r": 3}, f"{Q0}.lora_A.weight", "expected shape [3, 32], got [4, 32]"
    yield "alpha_negative", {"lora_alpha": -1}, "lora_alpha", "from 0"
    yield "alpha_huge", {"lora_alpha": 1e300}, "lora_alpha", "to 1e+09"
    yield "alpha_text", {"lora_alpha": "8"}, "lora_alpha", "expected a number"
    yield "alpha_missing", {"lora_alpha": ...}, "lora_alpha", "got none"
    yield "megatron", {"megatron_config": {"tp": 2}}, "megatron_config", "megatron"
    yield "megatron_core", {"megatron_core": "os.system"}, "megatron_core", "megatron"
    yield "merged_linears", {"enable_lora": [True, False]}, "enable_lora", "merged linears"
    yield "task_type", {"task_type": "SEQ_CLS"}, "task_type", "CAUSAL_LM"
    yield "unknown_key", {"secret_sauce": 1}, "secret_sauce", "settings of LORA"
    yield "unknown_key_null", {"secret_sauce": None}, "secret_sauce", "settings of LORA"
    yield "type_missing", {"peft_type": ...}, "peft_type", "one of LORA, "
    yield "type_unknown", {"peft_type": "LORAX"}, "peft_type", 'got "LORAX"'
    yield "type_lower_case", {"peft_type": "lora"}, "peft_type", "one of LORA"
    yield "type_number", {"peft_type": 7}, "peft_type", "got 7"
    yield "adapterhub", {"peft_type": ..., "version": "adapters.1.3.0", "config": {}}, "model_type", "a value"
    yield "base_name", {"base_model_name_or_path": 7}, "base_model_name_or_path", "expected text"
    yield "bias_kind", {"bias": "some"}, "bias", "one of none, all, lora_only"
    yield "bias_missing", {"bias": "lora_only", "use_rslora": 1}, "use_rslora", "true or false"
    yield "targets_null", {"target_modules": None}, "target_modules", "that PEFT writes"
    yield "targets_empty", {"target_modules": []}, "target_modules", "got none"
    yield "targets_number", {"target_modules": [1]}, "target_modules", "a list of names"
    yield "targets_unknown", {"target_modules": ["c_attn"]}, "target_modules", "q_proj"
    yield "targets_one_unknown", {"target_modules": ["q_proj", "v_proj", "zz"]}, "target_modules", "got zz"
    yield (
        "targets_container",
        {"target_modules": ["self_attn"]},
        "target_modules",
        "linear modules or the input embedding",
    )
    yield "targets_bad_regex", {"target_modules": "(("}, "target_modules", "regular expressions"
    yield "targets_no_match", {"target_modules": ".*nothing.*"}, "target_modules", "got .*nothing.*"
    yield "targets_redos", {"target_modules": REDOS}, "target_modules", "within 1 s"
    yield "targets_too_long", {"target_modules": "q" * 5000}, "target_modules", "1024 characters"
    yield "targets_excluded", {"exclude_modules": ["q_proj", "v_proj"]}, "target_modules", "got no match"
    yield "excluded_redos", {"exclude_modules": REDOS}, "exclude_modules", "within 1 s"
    yield "ranks_redos", {"rank_pattern": {REDOS: 2}}, "rank_pattern", "within 1 s"
    yield "ranks_zero", {"rank_pattern": {"q_proj": 0}}, "rank_pattern", "at least 1"
    yield "ranks_list", {"rank_pattern": [["q_proj", 2]]}, "rank_pattern", "an object"
    yield "ranks_other", {"rank_pattern": {"q_proj": 2}}, f"{Q0}.lora_A.weight", "r is 2 here"
    yield "ranks_bad_regex", {"rank_pattern": {"*": 2}}, "rank_pattern", "regular expressions"
    yield "alphas_bad", {"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern", "a number"
    yield "layers_pattern_alone", {"layers_pattern": "layers"}, "layers_pattern", "layers_to_transform"
    yield "layers_none", {"layers_to_transform": [7]}, "target_modules", "got no match"
    yield "layers_text", {"layers_to_transform": ["1"]}, "layers_to_transform", "an integer"
    yield (
        "layers_with_regex",
        {"layers_to_transform": [1], "target_modules": ".*q_proj"},
        "layers_to_transform",
        "expected null",
    )
    yield "layers_left_out", {"layers_to_transform": [1]}, f"{Q0}.lora_A.weight", "that the config targets"
    yield "lora_bias_missing", {"lora_bias": True}, f"{Q0}.lora_B.bias", "got none"


def _tensors() -> Iterator[tuple[str, Files, str, str]]:
    """Tensors: id, files, field, words."""
    a, b = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
    yield "b_missing", lora().with_tensor(b, None), b, "expected this tensor, got none"
    yield "a_missing", lora().with_tensor(a, None), a, "expected this tensor, got none"
    half = replace(lora(), tensors={n: t for n, t in lora().tensors.items() if ".layers.1." not in n})
    yield "layer_missing", half, f"{P}model.layers.1.self_attn.q_proj.lora_A.weight", "3 more are missing"
    yield "transposed", lora().with_tensor(a, noise((HIDDEN, RANK))), a, "expected shape [4, 32], got [32, 4]"
    swapped = lora().with_tensor(a, noise((HIDDEN, RANK))).with_tensor(b, noise((RANK, HIDDEN)))
    yield "swapped", swapped, a, "expected shape [4, 32]"
    yield "flat", lora().with_tensor(a, noise((RANK * HIDDEN,))), a, "got [128]"
    yield "three_axes", lora().with_tensor(a, noise((1, RANK, HIDDEN))), a, "got [1, 4, 32]"
    yield "other_width", lora().with_tensor(f"{V1}.lora_B.weight", noise((HIDDEN, RANK))), f"{V1}.lora_B.weight", "16"
    yield "rank_of_one_layer", lora().with_tensor(a, noise((5, HIDDEN))), a, "r is 4 here"
    extra = f"{P}model.layers.0.self_attn.k_proj.lora_A.weight"
    yield "not_targeted", lora().with_tensor(extra, noise((RANK, HIDDEN))), extra, "that the config targets"
    yield "unknown_module", lora().renamed(a, f"{P}h.0.lora_A.weight"), f"{P}h.0.lora_A.weight", "whose linear modules"
    yield "unknown_layer", lora().renamed(a, a.replace("0", "9")), a.replace("0", "9"), "a module of this backbone"
    norm = f"{P}model.norm.lora_A.weight"
    yield "norm", lora().with_tensor(norm, noise((RANK, HIDDEN))), norm, "that the config targets"
    yield "no_prefix", lora().renamed(a, a.removeprefix(P)), a.removeprefix(P), "begins with base_model.model."
    named = a.replace("lora_A", "lora_A.default")
    yield "adapter_name_inside", lora().renamed(a, named), named, "a name that ends in"
    for ending, shape, words in (
        ("lora_magnitude_vector", (HIDDEN,), "use_dora is false"),
        ("lora_embedding_A", (RANK, 101), "names no input embedding"),
        ("token_adapter.trainable_tokens_delta", (2, HIDDEN), "does not name its module"),
        ("lora_diag", (RANK,), "kasa_config is null"),
        ("lora_E", (RANK, 1), "AdaLoRA"),
    ):
        yield f"foreign_{ending}", lora().with_tensor(f"{Q0}.{ending}", noise(shape)), f"{Q0}.{ending}", words
    for word, value in (("nan", float("nan")), ("inf", float("inf")), ("minus_inf", float("-inf"))):
        yield f"value_{word}", lora().with_tensor(b, filled((HIDDEN, RANK), value)), b, "finite values"
    hot = lora().with_tensor(b, filled((HIDDEN, RANK), 3e38))
    yield "value_overflows_with_scale", hot, b, "overflow"
    stray = f"{Q0}.lora_B.bias"
    yield "bias_unasked", lora().with_tensor(stray, noise((HIDDEN,))), stray, "lora_bias is false"
    absolute = f"{Q0}.base_layer.bias"
    yield "base_bias_unasked", lora().with_tensor(absolute, noise((HIDDEN,))), absolute, "bias is none"
    only = lora().configured(bias="lora_only")
    yield "base_bias_of_none", only.with_tensor(absolute, noise((HIDDEN,))), absolute, "a module without one"
    norm_bias = f"{P}model.norm.bias"
    every = lora().configured(bias="all")
    yield "norm_bias", every.with_tensor(norm_bias, noise((HIDDEN,))), norm_bias, "a module without one"
    copy = f"{Q0}.base_layer.weight"
    yield "copy_changed", lora().with_tensor(copy, noise((HIDDEN, HIDDEN))), copy, "equal bit for bit"
    resized = f"{P}model.embed_tokens.weight"
    yield "vocabulary_resized", lora().with_tensor(resized, noise((128, HIDDEN))), resized, "resized vocabulary"


def _others() -> Iterator[tuple[str, Files, str, str]]:
    """The other methods: id, files, field, words."""
    w1, w2a, w2b = (f"{Q0}.{name}" for name in ("lokr_w1", "lokr_w2_a", "lokr_w2_b"))
    yield "lokr_no_w1", lokr().with_tensor(w1, None), w1, "got none"
    yield "lokr_half_w2", lokr().with_tensor(w2b, None), w2b, "got none"
    yield "lokr_both_w2", lokr().with_tensor(f"{Q0}.lokr_w2", noise((8, 8))), w2a, "got both"
    yield "lokr_rank", lokr().with_tensor(w2a, noise((8, 3))), w2a, "r is 2"
    yield "lokr_rank_right", lokr().with_tensor(w2b, noise((3, 8))), w2b, "r is 2"
    yield "lokr_sizes", lokr().with_tensor(w1, noise((4, 5))), w1, "factors of a [32, 32] matrix"
    yield "lokr_vector", lokr().with_tensor(w1, noise((16,))), w1, "a matrix"
    product = lokr().with_tensor(w1, None)
    product = product.with_tensor(f"{w1}_a", noise((4, 2))).with_tensor(f"{w1}_b", noise((2, 4)))
    yield "lokr_product_w1", product, f"{w1}_a", "decompose_both is false"
    yield "lokr_t2", lokr().with_tensor(f"{Q0}.lokr_t2", noise((2, 2))), f"{Q0}.lokr_t2", "convolutions"
    yield (
        "lokr_not_targeted",
        lokr().configured(target_modules=["k_proj"]),
        f"{P}model.layers.0.self_attn.k_proj.lokr_w1",
        "got none",
    )
    yield "lokr_lora_key", lokr().configured(use_dora=False), "use_dora", "settings of LOKR"
    k, down = f"{P}model.layers.0.self_attn.k_proj.ia3_l", f"{P}model.layers.0.mlp.down_proj.ia3_l"
    yield "ia3_flat", ia3().with_tensor(k, noise((KV,))), k, "expected shape [16, 1], got [16]"
    yield "ia3_side", ia3().with_tensor(k, noise((1, HIDDEN))), k, "does not name it"
    yield "ia3_other_side", ia3().with_tensor(down, noise((HIDDEN, 1))), down, "names it"
    yield "ia3_missing", ia3().with_tensor(k, None), k, "got none"
    yield "ia3_no_feedforward", ia3().configured(feedforward_modules=...), "feedforward_modules", "that PEFT writes"
    yield "ia3_feedforward_redos", ia3().configured(feedforward_modules=REDOS), "feedforward_modules", "within 1 s"
    yield "ia3_layers", ia3().configured(layers_to_transform=[1]), "layers_to_transform", "settings of IA3"
    yield "ia3_nan", ia3().with_tensor(k, filled((KV, 1), float("nan"))), k, "finite values"
    up = f"{P}model.layers.0.mlp.up_proj"
    yield "krona_fingerprint", krona().configured(base_fingerprint="0" * 64), "base_fingerprint", "this backbone's"
    yield "krona_no_scale", krona().configured(scale=...), "scale", "got none"
    yield "krona_version", krona().configured(format_version=2), "format_version", "expected 1, got 2"
    yield "krona_no_version", krona().configured(format_version=...), "format_version", "got none"
    yield "krona_dialect", krona().configured(dialect="paper"), "dialect", "settings of X_KRONA"
    yield "krona_no_b", krona().with_tensor(f"{up}.krona_B", None), f"{up}.krona_B", "got none"
    yield "krona_sizes", krona().with_tensor(f"{up}.krona_A", noise((12, 4))), f"{up}.krona_A", "[32, 48] matrix"
    yield "krona_terms", krona(2).with_tensor(f"{up}.krona_B", noise((3, 8, 4))), f"{up}.krona_B", "as many terms"
    yield "krona_flat", krona().with_tensor(f"{up}.krona_B", noise((32,))), f"{up}.krona_B", "a matrix"
    norm = f"{P}model.norm"
    moved = krona().renamed(f"{up}.krona_A", f"{norm}.krona_A").renamed(f"{up}.krona_B", f"{norm}.krona_B")
    yield "krona_norm", moved, f"{norm}.krona_A", "which weft does not adapt"


def _all() -> Iterator[tuple[str, Malformed]]:
    good = lora()
    for name, settings, place, words in _settings():
        yield f"setting_{name}", Malformed(good.configured(**settings), place, words)
    for name, files, place, words in (*_tensors(), *_others()):
        yield f"tensor_{name}", Malformed(files, place, words)
    for name, files, place, words in broken_variants():
        yield name, Malformed(files, place, words)
    for name, raw, place, words in broken_weights(good):
        yield f"bytes_{name}", Malformed(replace(good, weights_bytes=raw), place, words)
    for name, raw, place, words in broken_config_bytes(json.dumps(good.config)):
        yield f"json_{name}", Malformed(replace(good, config_bytes=raw), place, words)


MALFORMED: dict[str, Malformed] = dict(_all())
