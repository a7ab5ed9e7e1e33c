"""Formats of weft's own: each rule that a parameter's format has, and what is said when a file breaks it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters_store.native_blocks import compiled
from tests.support.methods.native_files import PREFIX, write
from weft.adapters_store.errors import AdapterInvalid

LLAMA_UP, LLAMA_NORM, LLAMA_LAYER = "model.layers.0.mlp.up_proj", "model.norm", "model.layers.0"
GPT2_FC, GPT2_NORM, GPT2_EMBED = "transformer.h.0.mlp.c_fc", "transformer.ln_f", "transformer.wte"
LLAMA_EMBED, UNSET = "model.embed_tokens", ...


@dataclass(frozen=True)
class Refused:
    """Files that must be refused: tensors by name without the prefix, the field that is named, words of the message."""

    peft_type: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    field: str
    words: str
    family: str = "llama"


def ones(*shape: int) -> Tensor:
    """Values that are right if the shape is."""
    return torch.ones(shape)


def index(*places: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """An integer tensor."""
    return torch.tensor(places, dtype=dtype)


def _common() -> Iterator[tuple[str, Refused]]:
    """Settings that every format has, and what no format has."""
    tensors = {f"{LLAMA_UP}.bias_delta": ones(48)}

    def case(field: str, words: str, **settings: Any) -> Refused:
        return Refused("X_BITFIT", tensors, settings, field, words)

    yield "version", case("format_version", "expected 1, got 2", format_version=2)
    yield "version_text", case("format_version", "an integer", format_version="1")
    yield "no_version", case("format_version", "got none", format_version=UNSET)
    yield "fingerprint", case("base_fingerprint", "expected this backbone's, bbbb", base_fingerprint="0" * 64)
    yield "base_name", case("base_model_name_or_path", "expected text", base_model_name_or_path=1)
    yield "targets", case("target_modules", "a list of names", target_modules=[1])
    yield "unknown_key", case("sauce", "settings of X_BITFIT", sauce=None)
    side = {"side.first_down": ones(8, 32)}
    said = {"reduction": 4, "layers": [0], "gate_temperature": 0.1}
    yield "side_network", Refused("X_LST", side, said, "peft_type", "a backbone that a side network can stand beside")
    stray = f"{LLAMA_UP}.lora_A.weight"
    yield (
        "other_tensor",
        Refused("X_BITFIT", {stray: ones(2, 32)}, {}, f"{PREFIX}{stray}", "a name that ends in bias_delta"),
    )
    integers = {f"{LLAMA_UP}.bias_delta": index(*range(48))}
    yield (
        "integers",
        Refused("X_BITFIT", integers, {}, f"{PREFIX}{LLAMA_UP}.bias_delta", "dtype F32 or F16 or BF16, got I32"),
    )
    nan = {f"{LLAMA_UP}.bias_delta": ones(48) * float("nan")}
    yield "nan", Refused("X_BITFIT", nan, {}, f"{PREFIX}{LLAMA_UP}.bias_delta", "finite values")


def _vectors() -> Iterator[tuple[str, Refused]]:
    """X_BITFIT and X_NORM."""

    def bitfit(name: str, tensor: Tensor, words: str, family: str = "llama", **settings: Any) -> Refused:
        return Refused("X_BITFIT", {name: tensor}, settings, f"{PREFIX}{name}", words, family)

    def norm(name: str, tensor: Tensor, words: str, family: str = "llama") -> Refused:
        return Refused("X_NORM", {name: tensor}, {}, f"{PREFIX}{name}", words, family)

    yield "mode", Refused("X_BITFIT", {f"{LLAMA_UP}.bias_delta": ones(48)}, {"mode": "both"}, "mode", "delta, value")
    yield (
        "mode_other",
        bitfit(f"{LLAMA_UP}.bias_delta", ones(48), "tensors named bias_value, got another", mode="value"),
    )
    both = {f"{GPT2_FC}.bias_delta": ones(128), f"{GPT2_FC}.bias_value": ones(128)}
    words = "one of bias_delta, bias_value, got several"
    yield "both_biases", Refused("X_BITFIT", both, {}, f"{PREFIX}{GPT2_FC}.bias_value", words, "gpt2")
    yield "bias_to_replace", bitfit(f"{LLAMA_UP}.bias_value", ones(48), "a bias of the backbone to replace")
    yield "bias_length", bitfit(f"{LLAMA_UP}.bias_delta", ones(32), "expected shape [48], got [32]")
    yield "norm_without_bias", bitfit(f"{LLAMA_NORM}.bias_delta", ones(32), "a norm that has a bias, got model.norm")
    yield "norm_without_bias_value", bitfit(f"{LLAMA_NORM}.bias_value", ones(32), "a norm that has a bias")
    yield "norm_bias_length", bitfit(f"{GPT2_NORM}.bias_delta", ones(31), "shape [32], got [31]", "gpt2")
    yield (
        "bias_of_layer",
        bitfit(f"{LLAMA_LAYER}.bias_delta", ones(32), "a linear module or a norm, got model.layers.0"),
    )
    yield "bias_nowhere", bitfit("model.layers.9.mlp.bias_delta", ones(32), "a module of this backbone")
    yield "norm_weight_length", norm(f"{LLAMA_NORM}.norm_weight", ones(16), "expected shape [32], got [16]")
    yield "norm_weight_matrix", norm(f"{LLAMA_NORM}.norm_weight", ones(1, 32), "got [1, 32]")
    yield "norm_bias", norm(f"{LLAMA_NORM}.norm_bias", ones(32), "a norm that has a bias")
    yield "norm_of_linear", norm(f"{LLAMA_UP}.norm_weight", ones(32), "expected a norm, got")
    settings = Refused(
        "X_NORM", {f"{LLAMA_NORM}.norm_weight": ones(32)}, {"mode": "value"}, "mode", "settings of X_NORM"
    )
    yield "norm_setting", settings


def _sparse() -> Iterator[tuple[str, Refused]]:
    """X_SPARSE."""
    at, values = f"{LLAMA_UP}.weight.sparse_indices", f"{LLAMA_UP}.weight.sparse_values"

    def case(
        words: str, changed: Mapping[str, Tensor | None], field: str, family: str = "llama", **said: Any
    ) -> Refused:
        whole = {at: index(3, 5), values: ones(2), **changed}
        tensors = {name: t for name, t in whole.items() if t is not None}
        return Refused("X_SPARSE", tensors, said, field if field in said else f"{PREFIX}{field}", words, family)

    def embedding(words: str, field: str, family: str = "llama", places: Tensor | None = None, **said: Any) -> Refused:
        path = LLAMA_EMBED if family == "llama" else GPT2_EMBED
        ids = index(0, 40) if places is None else places
        tensors = {f"{path}.weight.sparse_indices": ids, f"{path}.weight.sparse_values": ones(len(ids))}
        return Refused("X_SPARSE", tensors, said, field, words, family)

    yield "no_values", case("this tensor, got none (sparse_indices is there)", {values: None}, values)
    yield "no_indices", case("this tensor, got none (sparse_values is there)", {at: None}, at)
    yield "counts", case("expected shape [2], got [3]", {values: ones(3)}, values)
    yield "indices_matrix", case("one axis, got [1, 2]", {at: index(3, 5)[None]}, at)
    yield "indices_float", case("dtype I32 or I64, got F32", {at: ones(2)}, at)
    yield "values_integer", case("dtype F32 or F16 or BF16", {values: index(1, 1)}, values)
    yield "unsorted", case("ascending order, each once", {at: index(5, 3)}, at)
    yield "twice", case("ascending order, each once", {at: index(3, 3)}, at)
    yield "beyond", case("indices from 0 to 1535, got 1536", {at: index(3, 48 * 32)}, at)
    yield "negative", case("indices from 0 to 1535, got -1", {at: index(-1, 3)}, at)
    dense = {at: torch.arange(800), values: ones(800)}
    yield "dense", case("at most 50% of the 1536 entries", dense, at)
    whole = f"{LLAMA_UP}.weight.abs"
    yield "abs_beside", case("one of abs, sparse_indices, got several", {whole: ones(48, 32)}, at)
    yield (
        "abs_shape",
        case("expected shape [48, 32], got [32, 48]", {at: None, values: None, whole: ones(32, 48)}, whole),
    )
    bias = f"{LLAMA_UP}.bias.abs"
    yield "no_bias", case("which has no bias", {bias: ones(48)}, bias)
    layer = f"{LLAMA_LAYER}.weight.abs"
    yield (
        "no_parameter",
        case("a linear module, a norm or the input embedding, got model.layers.0.weight", {layer: ones(1)}, layer),
    )
    turned, gpt2_values = f"{GPT2_FC}.weight.sparse_indices", f"{GPT2_FC}.weight.sparse_values"
    gone: dict[str, Tensor | None] = {at: None, values: None, gpt2_values: ones(2)}
    yield "conv1d_beyond", case("indices from 0 to 4095, got 4096", {**gone, turned: index(3, 4096)}, turned, "gpt2")
    yield "conv1d_unsorted", case("ascending order", {**gone, turned: index(30, 3)}, turned, "gpt2")
    norm, norm_values = f"{GPT2_NORM}.bias.sparse_indices", f"{GPT2_NORM}.bias.sparse_values"
    spread: dict[str, Tensor | None] = {at: None, values: None, norm: index(3, 40), norm_values: ones(2)}
    yield "norm_beyond", case("indices from 0 to 31, got 40", spread, norm, "gpt2")
    count = "embedding_rows"
    yield "rows_list", embedding("an integer of at least 1", count, embedding_rows=[1, 2])
    yield "rows_zero", embedding("an integer of at least 1", count, embedding_rows=0)
    row = torch.arange(32)
    yield "rows_less", embedding("1, as many as sparse_indices touch", count, places=row, embedding_rows=2)
    yield "rows_fewer", embedding("2, as many as sparse_indices touch", count, places=row + 3, embedding_rows=1)
    yield "rows_many", embedding("expected 1 to 2, got 3", count, embedding_rows=3)
    yield "rows_wrong", embedding("2, as many as sparse_indices touch, got 1", count, embedding_rows=1)
    yield "rows_alone", case("it beside entries of the input embedding", {}, count, embedding_rows=1)
    far = f"{PREFIX}{LLAMA_EMBED}.weight.sparse_indices"
    yield "entries_beyond", embedding("indices from 0 to 3231", far, places=index(0, 3232))
    yield "entries_unsorted", embedding("in ascending order, each once", far, places=index(40, 0))
    yield "rows_beyond", embedding("indices from 0 to 3231", far, places=index(0, 3232), embedding_rows=2)
    yield "tied_unsaid", embedding("shared or independent, got none", "tied", "gpt2", embedding_rows=2)
    yield "tied_word", embedding("one of shared, independent", "tied", "gpt2", embedding_rows=2, tied="both")
    yield "tied_here", embedding("has a weight of its own", "tied", tied="shared", embedding_rows=2)
    head, delta = "lm_head.weight.sparse_indices", "lm_head.weight.sparse_values"
    twice: dict[str, Tensor | None] = {at: None, values: None, head: index(3, 5), delta: ones(2)}
    yield (
        "tied_head",
        Refused(
            "X_SPARSE",
            {n: t for n, t in twice.items() if t is not None},
            {"tied": "shared"},
            f"{PREFIX}{head}",
            "a change of transformer.wte",
            "gpt2",
        ),
    )


def _rows() -> Iterator[tuple[str, Refused]]:
    """X_ROWS and X_DENSE."""
    at, rows, bias = (f"{LLAMA_UP}.{role}" for role in ("row_indices", "rows_delta", "bias_rows_delta"))
    col, cols = f"{LLAMA_UP}.col_indices", f"{LLAMA_UP}.cols_delta"

    def case(words: str, changed: Mapping[str, Tensor | None], field: str, **settings: Any) -> Refused:
        whole = {at: index(5, 3), rows: ones(2, 32), bias: ones(2), **changed}
        tensors = {name: t for name, t in whole.items() if t is not None}
        return Refused(
            "X_ROWS", tensors, {"axis": "out", **settings}, f"{PREFIX}{field}" if "." in field else field, words
        )

    yield "no_axis", case("a value, got none", {}, "axis", axis=UNSET)
    yield "axis", case("expected out or in", {}, "axis", axis="rows")
    yield "axis_of_the_tensors", case("a name that ends in col_indices, cols_delta", {}, bias, axis="in")
    yield "no_rows", case("this tensor, got none", {rows: None}, rows)
    yield "bias_alone", case("this tensor, got none", {at: None, rows: None}, at)
    yield "rows_shape", case("expected shape [2, 32], got [2, 48]", {rows: ones(2, 48)}, rows)
    yield "rows_count", case("expected shape [2, 32], got [3, 32]", {rows: ones(3, 32)}, rows)
    yield "bias_count", case("expected shape [2], got [3]", {bias: ones(3)}, bias)
    yield "row_twice", case("indices that stand once each", {at: index(3, 3), bias: None}, at)
    yield "row_twice_with_bias", case("indices that stand once each", {at: index(3, 3)}, at)
    yield "row_beyond", case("indices from 0 to 47, got 48", {at: index(3, 48), bias: None}, at)
    yield "row_beyond_with_bias", case("indices from 0 to 47, got 48", {at: index(3, 48)}, at)
    yield "row_matrix", case("one axis", {at: index(3, 4)[None]}, at)
    yield "row_many", case("at most 48 indices, got 49", {at: torch.arange(49), rows: ones(49, 32), bias: None}, at)
    norm = f"{LLAMA_NORM}.row_indices"
    moved = {at: None, rows: None, bias: None, norm: index(3), f"{LLAMA_NORM}.rows_delta": ones(1, 32)}
    yield "rows_of_norm", case("a linear module", moved, norm)
    turned = {at: None, rows: None, bias: None, col: index(3, 4), cols: ones(2, 48)}
    yield "columns_shape", case("expected shape [48, 2], got [2, 48]", turned, cols, axis="in")
    far = {**turned, col: index(3, 32), cols: ones(48, 2)}
    yield "column_beyond", case("indices from 0 to 31, got 32", far, col, axis="in")
    delta = f"{LLAMA_UP}.weight.delta"

    def dense(name: str, tensor: Tensor, words: str, family: str = "llama", **settings: Any) -> Refused:
        return Refused("X_DENSE", {name: tensor}, settings, f"{PREFIX}{name}", words, family)

    yield "delta_shape", dense(delta, ones(32, 48), "expected shape [48, 32], got [32, 48]")
    yield "delta_conv1d", dense(f"{GPT2_FC}.weight.delta", ones(128, 32), "expected shape [32, 128]", "gpt2")
    yield "delta_bias", dense(f"{LLAMA_UP}.bias.delta", ones(48), "which has no bias")
    yield "delta_vocabulary", dense(f"{LLAMA_EMBED}.weight.delta", ones(99, 32), "expected shape [101, 32]")
    yield "delta_positions", dense("transformer.wpe.weight.delta", ones(256, 32), "or the input embedding", "gpt2")
    yield "origin", Refused("X_DENSE", {delta: ones(48, 32)}, {"origin": 3}, "origin", "expected text")


def _difffit() -> Iterator[tuple[str, Refused]]:
    """X_DIFFFIT."""
    gamma, rows, ids = f"{LLAMA_LAYER}.gamma_mlp", f"{LLAMA_EMBED}.embed_rows", f"{LLAMA_EMBED}.embed_ids"

    def case(words: str, tensors: dict[str, Tensor], field: str, **settings: Any) -> Refused:
        return Refused(
            "X_DIFFFIT", tensors, settings, field if field in ("tied", "sauce") else f"{PREFIX}{field}", words
        )

    yield "gamma_shape", case("expected shape [32] or [1], got [48]", {gamma: ones(48)}, gamma)
    inside = f"{LLAMA_LAYER}.mlp.gamma_mlp"
    yield "gamma_place", case("a decoder layer, got model.layers.0.mlp", {inside: ones(32)}, inside)
    yield "ids_alone", case("embed_rows beside it, got none", {ids: index(3)}, ids)
    yield "ids_matrix", case("one axis of at most 101 ids", {ids: index(3)[None], rows: ones(1, 32)}, ids)
    yield "ids_many", case("one axis of at most 101 ids", {ids: torch.arange(102), rows: ones(102, 32)}, ids)
    yield "rows_count", case("expected shape [2, 32], got [3, 32]", {ids: index(3, 4), rows: ones(3, 32)}, rows)
    yield "rows_all", case("expected shape [101, 32], got [3, 32]", {rows: ones(3, 32)}, rows)
    yield "ids_unsorted", case("ascending order", {ids: index(4, 3), rows: ones(2, 32)}, ids)
    yield "ids_beyond", case("indices from 0 to 100, got 101", {ids: index(4, 101), rows: ones(2, 32)}, ids)
    norm = f"{LLAMA_NORM}.embed_rows"
    yield "rows_of_norm", case("the input embedding, got model.norm", {norm: ones(2, 32)}, norm)
    layer = f"{LLAMA_LAYER}.embed_rows"
    yield "rows_of_layer", case("or the input embedding, got", {layer: ones(2, 32)}, layer)
    yield "setting", case("settings of X_DIFFFIT", {gamma: ones(32)}, "sauce", sauce=1)
    tied = {f"{GPT2_EMBED}.embed_rows": ones(2, 32), f"{GPT2_EMBED}.embed_ids": index(3, 4)}
    yield "tied_unsaid", Refused("X_DIFFFIT", tied, {}, "tied", "a weight that lm_head shares", "gpt2")
    far = {**tied, f"{GPT2_EMBED}.embed_ids": index(3, 101)}
    field = f"{PREFIX}{GPT2_EMBED}.embed_ids"
    yield "tied_beyond", Refused("X_DIFFFIT", far, {"tied": "shared"}, field, "indices from 0 to 100", "gpt2")


def _glora() -> Iterator[tuple[str, Refused]]:
    """X_GLORA."""
    xd, xu, d = f"{LLAMA_UP}.glora_A.Xd", f"{LLAMA_UP}.glora_A.Xu", f"{LLAMA_UP}.glora_D.X"

    def case(words: str, changed: Mapping[str, Tensor | None], field: str, **settings: Any) -> Refused:
        whole = {xd: ones(32, 2), xu: ones(2, 32), **changed}
        tensors = {name: t for name, t in whole.items() if t is not None}
        said = {"dialect": "product", **settings}
        return Refused("X_GLORA", tensors, said, f"{PREFIX}{field}" if "." in field else field, words)

    yield "dialect", case("the elementwise reading is PEFT's GLORA", {}, "dialect", dialect="hadamard")
    yield "dialect_unsaid", case("a value, got none", {}, "dialect", dialect=UNSET)
    yield "side", case("expected shape [48, 2], got [32, 2]", {}, xd, dialect="left_product")
    yield "ranks", case("expected shape [2, 32], got [3, 32]", {xu: ones(3, 32)}, xu)
    yield "half", case("this tensor, got none (glora_A.Xd is there)", {xu: None}, xu)
    yield "no_rank", case("expected shape [32, 1], got []", {xd: torch.ones(())}, xd)
    yield "no_bias", case("a linear that has a bias", {d: ones(48)}, d)
    c, e = f"{LLAMA_UP}.glora_C.X", f"{LLAMA_UP}.glora_E.X"
    yield "inputs", case("expected shape [32], got [48]", {c: ones(48)}, c)
    yield "outputs", case("expected shape [48], got [32]", {e: ones(32)}, e)
    norm = f"{LLAMA_NORM}.glora_E.X"
    yield "norm", case("a linear module", {norm: ones(32)}, norm)


CASES = {
    f"{group.__name__.strip('_')}-{name}": case
    for group in (_common, _vectors, _sparse, _rows, _difffit, _glora)
    for name, case in group()
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_breaks_a_rule_is_refused_by_name(name, tmp_path: Path):
    case = CASES[name]
    tensors = {f"{PREFIX}{path}": tensor for path, tensor in case.tensors.items()}
    folder = write(tmp_path, case.peft_type, tensors, **case.settings)
    with pytest.raises(AdapterInvalid) as refusal:
        compiled(case.family, folder)
    assert case.words in refusal.value.message
    assert refusal.value.field == case.field
