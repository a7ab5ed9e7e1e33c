"""Formats of weft's own that act behind sublayers, before the text or by projections: each rule, and its message."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters_store.native_blocks import compiled
from tests.support.backbones import build
from tests.support.catalogues import sites_of
from tests.support.methods.native_files import PREFIX, write
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.sites import CatalogueInfo, NormInfo

LAYER = "model.layers.0"
MLP, ATTENTION = f"{LAYER}.mlp", f"{LAYER}.attention"
INFO = sites_of(build("llama")).info
Changes = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Refused:
    """Files that must be refused: tensors by name in full, the field that is named, words of the message."""

    peft_type: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    field: str
    words: str
    info: CatalogueInfo | None = None


def ones(*shape: int) -> Tensor:
    """Values that are right if the shape is."""
    return torch.ones(shape)


def there(whole: Changes) -> dict[str, Tensor]:
    """Those that are not taken away, under the names that files have."""
    return {f"{PREFIX}{name}": tensor for name, tensor in whole.items() if tensor is not None}


def _bottleneck() -> Iterator[tuple[str, Refused]]:
    down, up = f"{MLP}.down.weight", f"{MLP}.up.weight"
    plain: Changes = {down: ones(4, 32), up: ones(32, 4)}
    said = {"tap": "h", "act": "relu", "scale": 1.0}
    rule, left, right = (f"{MLP}.down.phm.{part}" for part in ("rule", "left", "right"))
    phm: Changes = {down: None, rule: ones(4, 4, 4), left: ones(4, 8, 1), right: ones(4, 1, 1)}

    def tensors(words: str, changed: Changes, field: str, info: CatalogueInfo | None = None) -> Refused:
        return Refused("X_BOTTLENECK", there({**plain, **changed}), said, f"{PREFIX}{field}", words, info)

    def setting(words: str, field: str, value: Any, info: CatalogueInfo | None = None) -> Refused:
        return Refused("X_BOTTLENECK", there(plain), {**said, field: value}, field, words, info)

    yield "tap", setting("one of h, h+x_res, x_res, ln_x", "tap", "x")
    yield "no_tap", setting("a value, got none", "tap", ...)
    no_norm = tuple(replace(place, taps=("h", "h+x_res", "x_res")) for place in INFO.hidden)
    yield "tap_missing", setting(f"one of h, h+x_res, x_res at {MLP}", "tap", "ln_x", replace(INFO, hidden=no_norm))
    yield "act", setting("one of identity, linear, relu", "act", "mish")
    yield "no_act", setting("a value, got none", "act", ...)
    yield "scale", setting("a number", "scale", "learned")
    yield "gate_scope", setting("one of per_call", "gate_scope", "prefill_frozen")
    yield "unknown_key", setting("settings of X_BOTTLENECK", "reduction_factor", 16)
    yield "no_down", tensors("this tensor, got none", {down: None}, down)
    yield "no_up", tensors("this tensor, got none", {up: None}, up)
    yield "down_width", tensors("expected shape [4, 32], got [4, 48]", {down: ones(4, 48)}, down)
    yield "down_flat", tensors("a matrix, got [128]", {down: ones(128)}, down)
    yield "up_shape", tensors("expected shape [32, 4], got [32, 5]", {up: ones(32, 5)}, up)
    yield "down_bias", tensors("expected shape [4], got [32]", {f"{MLP}.down.bias": ones(32)}, f"{MLP}.down.bias")
    yield "up_bias", tensors("expected shape [32], got [4]", {f"{MLP}.up.bias": ones(4)}, f"{MLP}.up.bias")
    yield "both_maps", tensors("one of down.weight, down.phm.rule, got several", {**phm, down: ones(4, 32)}, rule)
    yield "part_of_phm", tensors("no such tensor, got one (down.weight is there)", {left: ones(4, 8, 1)}, left)
    yield (
        "phm_incomplete",
        tensors("(down.phm is there, and 1 more are missing)", {**phm, left: None, right: None}, left),
    )
    yield "phm_rule", tensors("expected shape [4, 4, 4], got [4, 4, 3]", {**phm, rule: ones(4, 4, 3)}, rule)
    yield (
        "phm_divides",
        tensors("a number of terms that divides the features, 32, got 5", {**phm, rule: ones(5, 5, 5)}, rule),
    )
    yield "phm_flat", tensors("a matrix for each term", {**phm, left: ones(4, 8)}, left)
    yield "phm_left", tensors("expected shape [4, 8, 1], got [4, 7, 1]", {**phm, left: ones(4, 7, 1)}, left)
    yield "phm_right", tensors("expected shape [4, 1, 1], got [4, 2, 1]", {**phm, right: ones(4, 2, 1)}, right)
    up_phm = {up: None, f"{MLP}.up.phm.rule": ones(3, 3, 3), f"{MLP}.up.phm.left": ones(3, 1, 1)}
    up_phm[f"{MLP}.up.phm.right"] = ones(3, 1, 1)
    yield "phm_up_divides", tensors("that divides the features, 4 to 32, got 3", up_phm, f"{MLP}.up.phm.rule")
    norm = f"{MLP}.norm_before.weight"
    yield "norm_alone", tensors("(norm_before.weight is there)", {norm: ones(32)}, f"{MLP}.norm_before.bias")
    both = {norm: ones(4), f"{MLP}.norm_before.bias": ones(32)}
    yield "norm_shape", tensors("expected shape [32], got [4]", both, norm)
    gate, bias = f"{MLP}.gate.weight", f"{MLP}.gate.bias"
    yield "gate_shape", tensors("expected shape [1, 32], got [2, 32]", {gate: ones(2, 32)}, gate)
    yield "gate_bias", tensors("expected shape [1], got [2]", {gate: ones(1, 32), bias: ones(2)}, bias)
    yield "gate_bias_alone", tensors("(gate.bias is there)", {bias: ones(1)}, gate)
    module = f"{LAYER}.mlp.up_proj"
    moved: Changes = {down: None, up: None, f"{module}.down.weight": ones(4, 32), f"{module}.up.weight": ones(32, 4)}
    words = f"the attention or the mlp of a decoder layer, got {module}"
    yield "no_place", tensors(words, moved, f"{module}.down.weight")
    yield "place_unknown", tensors("is not known", {}, down, replace(INFO, hidden=()))
    names: Changes = {f"{ATTENTION}.down.weight": ones(4, 32), f"{LAYER}.self_attn.up.weight": ones(32, 4)}
    yield "two_names", tensors(f"one name of {ATTENTION}, got another", names, f"{LAYER}.self_attn.up.weight")


def _krona_b() -> Iterator[tuple[str, Refused]]:
    a, b, skip = f"{MLP}.krona_A", f"{MLP}.krona_B", f"{MLP}.residual_scale"
    whole: Changes = {a: ones(4, 8), b: ones(8, 4)}
    said = {"tap": "ln_x", "scale": 1.0, "variant": "B"}

    def case(words: str, changed: Changes, field: str, **settings: Any) -> Refused:
        named = f"{PREFIX}{field}" if "." in field else field
        return Refused("X_KRONA_B", there({**whole, **changed}), {**said, **settings}, named, words)

    yield "tap", case("one of ln_x, x_res", {}, "tap", tap="h")
    yield "variant", case("one of B, B_res", {}, "variant", variant="C")
    yield "no_variant", case("a value, got none", {}, "variant", variant=...)
    yield "no_scale", case("a value, got none", {}, "scale", scale=...)
    yield "no_b", case("this tensor, got none", {b: None}, b)
    yield "sizes", case("factors of a [32, 32] matrix (in, out)", {b: ones(4, 8)}, a)
    yield "flat", case("a matrix, got [32]", {b: ones(32)}, b)
    yield "bias", case("expected shape [32], got [16]", {f"{MLP}.bias": ones(16)}, f"{MLP}.bias")
    yield "stray_residual", case("no such tensor, got one (variant is B)", {skip: ones()}, skip)
    yield "no_residual", case("this tensor, got none", {}, skip, variant="B_res")
    yield "residual_shape", case("one number, got [32]", {skip: ones(32)}, skip, variant="B_res")
    moved: Changes = {a: None, b: None, f"{ATTENTION}.krona_A": ones(4, 8), f"{ATTENTION}.krona_B": ones(8, 4)}
    yield "attention", case(f"the mlp of a decoder layer, got {ATTENTION}", moved, f"{ATTENTION}.krona_A")


def _prompts() -> Iterator[tuple[str, Refused]]:
    """X_IPT and X_APT."""
    rows = "prompt_embeddings"

    def ipt(words: str, tensors: Mapping[str, Tensor], field: str, **settings: Any) -> Refused:
        return Refused("X_IPT", tensors, {"decoded": True, **settings}, field, words)

    yield "decoded", ipt("runs no decoders of prompts", {rows: ones(2, 32)}, "decoded", decoded=False)
    yield "decoded_unsaid", ipt("expected true, got false", {rows: ones(2, 32)}, "decoded", decoded=...)
    yield "width", ipt("shape [rows, 32], got [2, 48]", {rows: ones(2, 48)}, rows)
    yield "other_tensor", ipt("only prompt_embeddings", {rows: ones(2, 32), "z": ones(5)}, "z")
    yield "integers", ipt("dtype F32", {rows: ones(2, 32).int()}, rows)
    no_embedding = Refused(
        "X_IPT", {rows: ones(2, 32)}, {"decoded": True}, rows, "knows", replace(INFO, embedding=None)
    )
    yield "no_embedding", no_embedding
    said = {"gate_input": "mean", "gate_scope": "per_call", "applies_to": "kv"}
    whole: Changes = {
        rows: ones(3, 64),
        **{f"layers.{i}.gate.weight": ones(3, 32) for i in range(2)},
        **{f"layers.{i}.lambda": ones() for i in range(2)},
    }

    def apt(words: str, changed: Changes, field: str, info: CatalogueInfo | None = None, **settings: Any) -> Refused:
        tensors = {name: t for name, t in {**whole, **changed}.items() if t is not None}
        return Refused("X_APT", tensors, {**said, **settings}, field, words, info)

    yield "gate_input", apt('got "per_query" (a gate is one of a call', {}, "gate_input", gate_input="per_query")
    yield "gate_scope", apt("a gate that stays", {}, "gate_scope", gate_scope="prefill_frozen")
    yield "applies_to", apt("a gate acts on keys and values", {}, "applies_to", applies_to="k")
    yield "no_applies_to", apt("a value, got none", {}, "applies_to", applies_to=...)
    yield "no_rows", apt("this tensor, got none", {rows: None}, rows)
    yield "rows_shape", apt("shape [p, 64], got [3, 128]", {rows: ones(3, 128)}, rows)
    yield "no_gate", apt("this tensor, got none", {"layers.1.gate.weight": None}, "layers.1.gate.weight")
    yield "no_lambda", apt("model.layers.1 is layer 1", {"layers.1.lambda": None}, "layers.1.lambda")
    yield (
        "gate_shape",
        apt("expected shape [3, 32], got [1, 32]", {"layers.0.gate.weight": ones(1, 32)}, "layers.0.gate.weight"),
    )
    yield "gate_bias", apt("expected shape [3], got [1]", {"layers.0.gate.bias": ones(1)}, "layers.0.gate.bias")
    yield "lambda_shape", apt("one number, got [3]", {"layers.0.lambda": ones(3)}, "layers.0.lambda")
    yield "layer", apt("a layer from 0 to 1, got 2", {"layers.2.lambda": ones()}, "layers.2.lambda")
    yield "name", apt("a tensor of X_APT", {"layers.01.lambda": ones()}, "layers.01.lambda")
    blind = replace(INFO, layers=tuple(replace(layer, features=0) for layer in INFO.layers))
    yield "no_input", apt("whose attention weft knows the input of", {}, "layers.0.gate.weight", blind)


def _said() -> Iterator[tuple[str, Refused]]:
    path = f"{LAYER}.self_attn.k_proj.weight"
    b, pi, g, divisor = (f"proj.{path}.{role}" for role in ("B", "Pi", "G", "divisor"))
    whole: Changes = {
        "theta_d": ones(10),
        b: ones(64).to(torch.int8),
        pi: torch.arange(64).int(),
        g: ones(64),
        divisor: ones(),
    }

    def case(words: str, changed: Changes, field: str, **settings: Any) -> Refused:
        tensors = {name: t for name, t in {**whole, **changed}.items() if t is not None}
        return Refused("X_SAID", tensors, {"variant": "light_rank1", **settings}, field, words)

    yield "variant", case("one of dense, light_rank1", {}, "variant", variant="light")
    yield "no_variant", case("a value, got none", {}, "variant", variant=...)
    yield "rng", case("store the projection", {}, "rng", rng={"seed": 3})
    yield "no_theta", case("this tensor, with one axis, got none", {"theta_d": None}, "theta_d")
    yield "theta_matrix", case("with one axis, got [2, 5]", {"theta_d": ones(2, 5)}, "theta_d")
    nothing = dict.fromkeys((b, pi, g, divisor))
    yield "no_projection", case("projections, got none", nothing, "proj.<parameter>.B")
    yield "no_signs", case("this tensor, got none", {b: None}, b)
    yield "signs_float", case("dtype I32 or I64", {b: ones(64)}, b)
    yield "signs_values", case("1 and -1, got others", {b: torch.zeros(64, dtype=torch.int8)}, b)
    yield "order_values", case("every number from 0 to 63 once", {pi: torch.zeros(64, dtype=torch.int32)}, pi)
    yield "length", case("expected shape [64], got [32]", {g: ones(32)}, g)
    yield "length_dense", case("expected shape [512], got [64]", {}, b, variant="dense")
    yield "divisor_shape", case("one number, got [2]", {divisor: ones(2)}, divisor)
    yield "divisor_zero", case("NaN or infinity from it", {divisor: torch.zeros(())}, g)
    yield "name", case("another tensor", {"proj.k_proj.Q": ones(64)}, "proj.k_proj.Q")
    other = f"proj.{LAYER}.weight"
    moved: Changes = {**nothing, **{f"{other}.{n.rpartition('.')[2]}": whole[n] for n in (b, pi, g, divisor)}}
    yield "no_parameter", case("or the input embedding, got", moved, f"{other}.G")
    yield "order_alone", case("it beside lambda, got it alone", {}, "order", order=[path])
    yield "order_unsaid", case("a list of parameters", {"lambda": ones(1)}, "order")
    yield "order_other", case("every projected parameter once", {"lambda": ones(1)}, "order", order=["x.weight"])
    yield "order_twice", case("got one twice", {"lambda": ones(2)}, "order", order=[path, path])
    yield "lambda_length", case("expected shape [1], got [2]", {"lambda": ones(2)}, "lambda", order=[path])


def _difffit() -> Iterator[tuple[str, Refused]]:
    """Backbones of which weft does not know what ends a sublayer."""
    gamma = f"{LAYER}.gamma_mlp"

    def case(words: str, **changes: Any) -> Refused:
        info = replace(INFO, **changes)
        return Refused("X_DIFFFIT", there({gamma: ones(32)}), {}, f"{PREFIX}{gamma}", words, info)

    third = (*INFO.norms, NormInfo(f"{LAYER}.post_mlp_layernorm", 32, False))
    yield "third_norm", case("weft does not know which module ends it", norms=third)
    inside = tuple(site for site in INFO.sites if "mlp" not in site.path)
    yield "no_linear", case("weft does not know which module ends it", sites=inside, groups=(1,) * len(inside))
    yield "unknown_place", case("adds to the residual stream is not known", hidden=())


CASES = {
    f"{group.__name__.strip('_')}-{name}": case
    for group in (_bottleneck, _krona_b, _prompts, _said, _difffit)
    for name, case in group()
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_breaks_a_rule_is_refused_by_name(name, tmp_path: Path):
    case = CASES[name]
    folder = write(tmp_path, case.peft_type, case.tensors, **case.settings)
    with pytest.raises(AdapterInvalid) as refusal:
        compiled("llama", folder) if case.info is None else read_adapter(folder, case.info)
    assert case.words in refusal.value.message
    assert refusal.value.field == case.field


def test_numbers_that_a_projection_does_not_use_are_reported(tmp_path):
    case = CASES["said-variant"]
    tensors = {**case.tensors, "theta_d": ones(100)}
    report = compiled("llama", write(tmp_path, "X_SAID", tensors, variant="light_rank1")).report
    assert report.notes == ("theta_d is longer than the projections of 1 parameters, which use its beginning",)
