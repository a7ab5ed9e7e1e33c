"""Tensors and settings of weft's own formats for a backbone of any shape, drawn from the catalogue's sizes."""

from collections.abc import Callable

import torch

from weft.adapters_store.sites import SideInfo
from weft.bench.made import PREFIX, Ground, Tensors

RANK, VIRTUAL_TOKENS, DENSITY, ROWS_SHARE = 16, 16, 0.005, 0.06
CAUSAL = "CAUSAL_LM"


def bias(ground: Ground) -> Tensors:
    """A delta of every bias."""
    return {f"{site.path}.bias_delta": ground.draw(site.out_features) for site in ground.body}


def norms(ground: Ground) -> Tensors:
    """Weights in the place of those of all norms."""
    return {f"{norm.path}.norm_weight": 1 + ground.draw(norm.features) for norm in ground.info.norms}


def sparse(ground: Ground) -> Tensors:
    """A share of the entries of every weight."""
    tensors: Tensors = {}
    for number, site in enumerate(ground.body):
        size = site.in_features * site.out_features
        count = int(size * DENSITY)
        index = torch.randperm(size, generator=torch.Generator().manual_seed(number))[:count].sort().values
        tensors[f"{site.path}.weight.sparse_indices"] = index.int()
        tensors[f"{site.path}.weight.sparse_values"] = ground.draw(count, seed=number)
    return tensors


def rows(ground: Ground) -> Tensors:
    """A share of the rows of the MLP's weights."""
    tensors: Tensors = {}
    for site in ground.body:
        if ".mlp." in site.path:
            count = int(site.out_features * ROWS_SHARE)
            tensors[f"{site.path}.row_indices"] = torch.arange(count, dtype=torch.int32) * (site.out_features // count)
            tensors[f"{site.path}.rows_delta"] = ground.draw(count, site.in_features)
    return tensors


def dense(*names: str) -> Callable[[Ground], Tensors]:
    """Whole weights, of the linears with these names."""

    def tensors(ground: Ground) -> Tensors:
        sites = ground.ending(*names)
        return {f"{site.path}.weight.delta": ground.draw(site.out_features, site.in_features) for site in sites}

    return tensors


def low_rank(ground: Ground) -> Tensors:
    """As PEFT names them."""
    tensors: Tensors = {}
    for number, site in enumerate(ground.body):
        tensors[f"{site.path}.lora_A.weight"] = ground.draw(RANK, site.in_features, seed=number)
        tensors[f"{site.path}.lora_B.weight"] = ground.draw(site.out_features, RANK, seed=number)
    return tensors


def pooled(ground: Ground) -> Tensors:
    """QA-LoRA's, as PEFT names them: A reads the sums of groups of inputs."""
    group, tensors = pool(ground), low_rank(ground)
    for number, site in enumerate(ground.body):
        tensors[f"{site.path}.lora_A.weight"] = ground.draw(RANK, site.in_features // group, seed=number)
    return {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}


def pool(ground: Ground) -> int:
    """Inputs in a group."""
    return ground.divisor(32)


def products(ground: Ground) -> Tensors:
    """GLoRA's: W A + B beside the weight, W C + E beside the bias."""
    found: Tensors = {}
    for number, site in enumerate(ground.body):
        wide, tall = site.in_features, site.out_features
        for letter, (rows, columns) in {"A": (wide, wide), "B": (tall, wide)}.items():
            found[f"{site.path}.glora_{letter}.Xd"] = ground.draw(rows, RANK, seed=number)
            found[f"{site.path}.glora_{letter}.Xu"] = ground.draw(RANK, columns, seed=number)
        found[f"{site.path}.glora_C.X"] = ground.draw(wide, seed=number)
        found[f"{site.path}.glora_E.X"] = ground.draw(tall, seed=number)
    return found


def scales(ground: Ground) -> Tensors:
    """DiffFit's: factors of sublayers, biases and norms."""
    gammas = {
        f"{layer.path}.{name}": 1 + ground.draw(layer.features)
        for layer in ground.info.layers
        for name in ("gamma_attn", "gamma_mlp")
    }
    return {**gammas, **bias(ground), **norms(ground)}


def _places(ground: Ground, after: tuple[str, ...]) -> list[tuple[str, int]]:
    layers = ground.info.layers
    return [(f"{layers[h.layer].path}.{h.after}", h.features) for h in ground.info.hidden if h.after in after]


def bottleneck(*after: str, reduction: int = 16) -> Callable[[Ground], Tensors]:
    """Dense maps down to a fraction of the width and up again."""

    def tensors(ground: Ground) -> Tensors:
        found: Tensors = {}
        for place, width in _places(ground, after):
            rank = width // reduction
            found |= {
                f"{place}.down.weight": ground.draw(rank, width),
                f"{place}.down.bias": ground.draw(rank),
                f"{place}.up.weight": ground.draw(width, rank),
                f"{place}.up.bias": ground.draw(width),
            }
        return found

    return tensors


def compacter(*after: str, terms: int = 4) -> Callable[[Ground], Tensors]:
    """Maps that are sums of Kronecker products with factors of rank one."""

    def tensors(ground: Ground) -> Tensors:
        found: Tensors = {}
        for place, width in _places(ground, after):
            rank = max(terms, width // 32 // terms * terms)
            for name, wide, tall in (("down", width, rank), ("up", rank, width)):
                found |= {
                    f"{place}.{name}.phm.rule": ground.draw(terms, terms, terms),
                    f"{place}.{name}.phm.left": ground.draw(terms, wide // terms, 1),
                    f"{place}.{name}.phm.right": ground.draw(terms, 1, tall // terms),
                    f"{place}.{name}.bias": ground.draw(tall),
                }
        return found

    return tensors


def kron_beside(ground: Ground) -> Tensors:
    """One Kronecker product beside every MLP, as near to square as the width allows."""
    found: Tensors = {}
    for place, width in _places(ground, ("mlp",)):
        small = next(n for n in range(int(width**0.5), 0, -1) if width % n == 0)
        found[f"{place}.krona_A"] = ground.draw(small, small)
        found[f"{place}.krona_B"] = ground.draw(width // small, width // small)
    return found


def kron_beside_scaled(ground: Ground) -> Tensors:
    """With a share of the input itself beside the product."""
    scales = {f"{place}.residual_scale": ground.draw() for place, _ in _places(ground, ("mlp",))}
    return {**kron_beside(ground), **scales}


def gated_prefix(ground: Ground) -> Tensors:
    """Keys and values in front of the text in every layer, and the gates of each."""
    layers = ground.info.layers
    width = sum(layer.kv_heads * (layer.key_size + layer.value_size) for layer in layers)
    gates = {f"layers.{i}.gate.weight": ground.draw(VIRTUAL_TOKENS, each.features) for i, each in enumerate(layers)}
    lambdas = {f"layers.{i}.lambda": torch.ones(1) for i in range(len(layers))}
    return {"prompt_embeddings": ground.draw(VIRTUAL_TOKENS, width), **gates, **lambdas}


def soft(ground: Ground) -> Tensors:
    """Embeddings in front of the text."""
    assert ground.info.embedding is not None
    return {"prompt_embeddings": ground.draw(VIRTUAL_TOKENS, ground.info.embedding.features)}


def light(ground: Ground) -> Tensors:
    """Intrinsic SAID's: numbers for all weights, and the Fastfood projection of each."""
    found: Tensors = {"theta_d": ground.draw(1024)}
    for number, site in enumerate(ground.body):
        size = 1 << (site.in_features + site.out_features - 1).bit_length()
        generator = torch.Generator().manual_seed(number)
        name = f"proj.{site.path}.weight"
        found[f"{name}.B"] = (torch.randint(2, (size,), generator=generator) * 2 - 1).to(torch.int8)
        found[f"{name}.Pi"] = torch.randperm(size, generator=generator).int()
        found[f"{name}.G"] = torch.randn(size, generator=generator)
        found[f"{name}.divisor"] = torch.tensor([size**0.5])
    return found


def side(ground: Ground) -> Tensors:
    """A narrow network beside the backbone."""
    layers, side = ground.info.layers, _side_of(ground)
    width, narrow = layers[0].features, side.features
    found = {
        "side.first_down.weight": ground.draw(narrow, width),
        "side.first_down.bias": ground.draw(narrow),
        "side.up.weight": ground.draw(width, narrow),
        "side.up.bias": ground.draw(width),
        **{f"side.final_norm.{name}": 1 + ground.draw(*shape) for name, shape in side.norm},
    }
    for i in range(len(layers)):
        found |= {
            f"side.down.{i}.weight": ground.draw(narrow, width),
            f"side.down.{i}.bias": ground.draw(narrow),
            f"side.gate_alpha.{i}": torch.zeros(1),
            **{f"side.block.{i}.{name}": 1.0 * ("norm" in name) + ground.draw(*shape) for name, shape in side.block},
        }
    return found


def side_settings(ground: Ground) -> dict[str, object]:
    """Its config."""
    layers = list(range(len(ground.info.layers)))
    return {"peft_type": "X_LST", "reduction": _side_of(ground).reduction, "gate_temperature": 0.1, "layers": layers}


def prefix_settings(ground: Ground) -> dict[str, object]:
    """Prefix tuning's config, as PEFT has it."""
    layers = ground.info.layers
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": CAUSAL,
        "num_virtual_tokens": VIRTUAL_TOKENS,
        "num_transformer_submodules": 1,
        "num_layers": len(layers),
        "num_attention_heads": layers[0].kv_heads,
        "token_dim": layers[0].kv_heads * layers[0].key_size,
    }


def prefix(ground: Ground) -> Tensors:
    """Keys and values in front of the text in every layer."""
    return {"prompt_embeddings": gated_prefix(ground)["prompt_embeddings"]}


def _side_of(ground: Ground) -> SideInfo:
    """The narrowest network, but not below an eighth."""
    return max((side for side in ground.info.sides if side.reduction <= 8), key=lambda side: side.reduction)
