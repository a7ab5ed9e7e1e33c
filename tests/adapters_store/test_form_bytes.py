"""What PEFT's methods and those of weft's own formats take on a device at the shape of Llama 3 8B, from shapes alone.

Each takes at most a tenth more than its form: two bytes a number, four an index, and four a number of the vectors that
are added to, or scale, what the backbone computes, for bfloat16 would round all of that.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import pytest

from tests.adapters_store.llama_8b import INNER, KV, LAYER_PATHS, LINEARS, VOCABULARY, WIDTH, Llama8B
from weft.adapters_store.compile import block_bytes
from weft.adapters_store.formats import parse_values
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.tensor_refs import TensorRef

P = "base_model.model."
Q, K, V, DOWN = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"
QV, ATTENTION = (Q, V), tuple(name for name in LINEARS if "attn" in name)
MLP = tuple(name for name in LINEARS if "mlp" in name)
ITEM = {"BF16": 2, "I32": 4, "I64": 8, "I8": 1}
BACKBONE = Llama8B()
Shapes = dict[str, tuple[int, ...]]


def sites(*names: str) -> Iterator[tuple[str, int, int]]:
    """Path, inputs and outputs of these linears in every layer, of all where none is named."""
    for layer in LAYER_PATHS:
        for name in names or LINEARS:
            yield f"{layer}.{name}", *LINEARS[name]


def peft(kind: str, names: tuple[str, ...] = (), **settings: Any) -> dict[str, Any]:
    """A config of PEFT for these linears."""
    return {"peft_type": kind, "task_type": "CAUSAL_LM", "target_modules": list(names or LINEARS), **settings}


def native(kind: str, **settings: Any) -> dict[str, Any]:
    """A config of weft's own."""
    return {"peft_type": kind, "format_version": 1, **settings}


def low_rank(rank: int, *names: str, dora: bool = False) -> Shapes:
    """LoRA's pairs."""
    made: Shapes = {}
    for path, wide, tall in sites(*names):
        made |= {f"{path}.lora_A.weight": (rank, wide), f"{path}.lora_B.weight": (tall, rank)}
        made |= {f"{path}.lora_magnitude_vector": (tall,)} if dora else {}
    return made


def parameters() -> Shapes:
    """Every parameter of the backbone."""
    made: Shapes = {f"{site.path}.weight": (site.out_features, site.in_features) for site in BACKBONE.info.sites}
    made |= {f"{norm.path}.weight": (WIDTH,) for norm in BACKBONE.info.norms}
    return {**made, "model.embed_tokens.weight": (VOCABULARY, WIDTH)}


def entries(density: float) -> Shapes:
    """So many entries of every parameter, an index of four bytes beside each."""
    counts = {name: max(1, int(prod(shape) * density)) for name, shape in parameters().items()}
    return {f"{name}.sparse_{role}": (n,) for name, n in counts.items() for role in ("indices", "values")}


def projections(names: tuple[str, ...]) -> Shapes:
    """What Fastfood needs of these linears' weights, in the light form."""
    made: Shapes = {"theta_d": (20_000,)}
    for path, wide, tall in sites(*names):
        padded = 1 << (wide + tall - 1).bit_length()
        made |= {f"proj.{path}.weight.{role}": (padded,) for role in ("B", "Pi", "G")}
        made |= {f"proj.{path}.weight.divisor": (1,)}
    return made


def prefixes(count: int) -> Shapes:
    """Keys and values of all layers, and a gate of its own for every prefix token."""
    made: Shapes = {"prompt_embeddings": (count, 2 * len(LAYER_PATHS) * KV)}
    for number in range(len(LAYER_PATHS)):
        made |= {f"layers.{number}.gate.weight": (count, WIDTH), f"layers.{number}.lambda": (1,)}
    return made


def far(share: float) -> Shapes:
    """Rows of the feed-forward matrices."""
    made: Shapes = {}
    for path, wide, tall in sites(*MLP):
        made |= {f"{path}.row_indices": (int(tall * share),), f"{path}.rows_delta": (int(tall * share), wide)}
    return made


NORMS: Shapes = {f"{norm.path}.norm_weight": (WIDTH,) for norm in BACKBONE.info.norms}
GAMMAS: Shapes = {f"{layer}.gamma_{part}": (WIDTH,) for layer in LAYER_PATHS for part in ("attn", "mlp")}
BESIDE: Shapes = {
    f"{layer}.mlp.{role}": shape
    for layer in LAYER_PATHS
    for role, shape in {"krona_A": (64, 64), "krona_B": (64, 64), "bias": (WIDTH,)}.items()
}
KRONA = {KV: ((64, 32), (64, 32)), WIDTH: ((64, 64), (64, 64))}
PRODUCTS: Shapes = {
    f"{path}.krona_{letter}": shape
    for path, _, tall in sites(*QV)
    for letter, shape in zip("AB", KRONA[tall], strict=True)
}
IA3: Shapes = {f"{path}.ia3_l": (tall, 1) if name != DOWN else (1, INNER)
               for name in (K, V, DOWN) for path, _, tall in sites(name)}  # fmt: skip
LOKR: Shapes = {
    f"{path}.lokr_{role}": shape
    for path, _, tall in sites(*QV)
    for role, shape in {"w1": (KRONA[tall][0][1], 64), "w2_a": (KRONA[tall][1][1], 8), "w2_b": (8, 64)}.items()
}
GLORA: Shapes = {
    f"{path}.glora_{letter}.{end}": shape
    for path, wide, tall in sites(*QV)
    for letter, side in (("A", wide), ("B", tall))
    for end, shape in (("Xd", (side, 4)), ("Xu", (4, wide)))
}

# config, tensors, MB of the form
FORMS: Mapping[str, tuple[dict[str, Any], Shapes, float]] = {
    "LoRA r8 of q, v": (peft("LORA", QV, r=8, lora_alpha=8), low_rank(8, *QV), 6.8),
    "LoRA r8": (peft("LORA", r=8, lora_alpha=8), low_rank(8), 41.9),
    "QLoRA r64": (peft("LORA", r=64, lora_alpha=8), low_rank(64), 335.5),
    "DoRA r8 of q, v": (peft("LORA", QV, r=8, lora_alpha=8, use_dora=True), low_rank(8, *QV, dora=True), 7.1),
    # the low-rank factor multiplied out
    "LoKr r8 of q, v": (peft("LOKR", QV, r=8, alpha=8), LOKR, 0.79),
    # vectors, four bytes each
    "(IA)³": (peft("IA3", (K, V, DOWN), feedforward_modules=[DOWN]), IA3, 2 * 1.05),
    "prompt tuning": (
        {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 100, "token_dim": WIDTH},
        {"prompt_embeddings": (100, WIDTH)},
        0.82,
    ),
    "GLoRA, products": (native("X_GLORA", dialect="product"), GLORA, 6.8),
    "KronA of q, v": (native("X_KRONA", scale=1.0), PRODUCTS, 0.79),
    "KronA^B": (native("X_KRONA_B", scale=1.0, tap="ln_x", variant="B"), BESIDE, 0.79),
    "BitFit": (native("X_BITFIT"), {f"{path}.bias_delta": (tall,) for path, _, tall in sites()}, 2 * 2.75),
    "LN tuning": (native("X_NORM"), NORMS, 2 * 0.53),
    "DiffFit": (native("X_DIFFFIT"), NORMS | GAMMAS, 2 * 1.06),
    "DiffFit with embedding": (
        native("X_DIFFFIT"), NORMS | GAMMAS | {"model.embed_tokens.embed_rows": (VOCABULARY, WIDTH)}, 1051 + 2 * 1.06
    ),
    "DiffPruning of 0.5 %": (native("X_SPARSE"), entries(0.005), 241),
    # whose norms are overridden whole
    "FishMask of 0.02 %": (native("X_SPARSE"), entries(0.0002), 9.6 + 2 * 0.53),
    "FAR of 6 %": (native("X_ROWS", axis="out"), far(0.06), 676),
    "GaLore": (native("X_DENSE"), {f"{name}.delta": shape for name, shape in parameters().items()}, 16060),
    "attention tuning": (
        native("X_DENSE"), {f"{path}.weight.delta": (tall, wide) for path, wide, tall in sites(*ATTENTION)}, 2684
    ),
    "SAID, light": (native("X_SAID", variant="light_rank1"), projections(tuple(LINEARS)), 5.2),
    "adaptive prefix, 30 tokens": (
        native("X_APT", gate_input="mean", gate_scope="per_call", applies_to="kv"), prefixes(30), 11.8
    ),
    "IPT": (native("X_IPT", decoded=True), {"prompt_embeddings": (100, WIDTH)}, 0.82),
}  # fmt: skip
UNPREFIXED = ("X_SAID", "X_APT", "X_IPT", "PROMPT_TUNING")


def header(shapes: Shapes, prefix: str) -> Header:
    """Tensors of these shapes, and no byte of them."""
    found: dict[str, TensorRef] = {}
    for name, shape in shapes.items():
        dtype = "I32" if name.endswith(("indices", ".Pi")) else "I8" if name.endswith(".B") else "BF16"
        found[prefix + name] = TensorRef(prefix + name, shape, dtype, 0, ITEM[dtype] * prod(shape))
    return Header(found, 0)


@pytest.mark.parametrize("name", FORMS)
def test_a_method_takes_little_more_than_its_form(name):
    config, shapes, megabytes = FORMS[name]
    prefix = "" if config["peft_type"] in UNPREFIXED else P
    parsed = parse_values(dict(config), header(shapes, prefix), BACKBONE.info)
    assert megabytes * 0.99 <= block_bytes(parsed, BACKBONE.geometry, BACKBONE) / 1e6 <= megabytes * 1.1
