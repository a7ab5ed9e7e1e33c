"""What only AdapterHub has, in the files that its ``adapters`` saves, written by hand."""

from collections.abc import Callable

from weft.bench.made import Ground, Made, Tensors, written
from weft.bench.made_tensors import RANK, VIRTUAL_TOKENS

NAME = "made"
_Tensors = Callable[[Ground], Tensors]


def _config(ground: Ground, config: dict[str, object]) -> dict[str, object]:
    width = ground.info.layers[0].features
    family = {"model_type": ground.info.family, "hidden_size": width}
    return {"name": NAME, "version": "adapters.1.3.0", **family, "config": config}


def _hub(name: str, words: str, config: dict[str, object], *tensors: _Tensors) -> Made:
    def drawn(ground: Ground) -> Tensors:
        return {key: tensor for of in tensors for key, tensor in of(ground).items()}

    return written(name, words, lambda ground: _config(ground, config), drawn)


def _gate(ground: Ground, path: str, width: int) -> Tensors:
    return {f"{path}.weight": ground.draw(1, width), f"{path}.bias": ground.draw(1)}


def _gated_low_rank(ground: Ground) -> Tensors:
    found: Tensors = {}
    for number, site in enumerate(ground.ending("q_proj", "v_proj")):
        path, wide = f"{site.path}.loras.{NAME}", site.in_features
        found[f"{path}.lora_A"] = ground.draw(RANK, wide, seed=number)
        found[f"{path}.lora_B"] = ground.draw(site.out_features, RANK, seed=number)
        found |= _gate(ground, f"{path}.gate", wide)
    return found


def _bottleneck(reduction: int, scaled: bool, gated: bool) -> _Tensors:
    def tensors(ground: Ground) -> Tensors:
        found: Tensors = {}
        for layer in ground.info.layers:
            path, width = f"{layer.path}.output_adapters.adapters.{NAME}", layer.features
            narrow = width // reduction
            found[f"{path}.adapter_down.0.weight"] = ground.draw(narrow, width)
            found[f"{path}.adapter_down.0.bias"] = ground.draw(narrow)
            found[f"{path}.adapter_up.weight"] = ground.draw(width, narrow)
            found[f"{path}.adapter_up.bias"] = ground.draw(width)
            if scaled:
                found[f"{path}.scaling"] = 1 + ground.draw(width)
            if gated:
                found |= _gate(ground, f"{path}.gate", width)
        return found

    return tensors


def _gated_prefix(ground: Ground) -> Tensors:
    layers = ground.info.layers
    size = sum(VIRTUAL_TOKENS * layer.kv_heads * (layer.key_size + layer.value_size) for layer in layers)
    base = layers[0].path.partition(".")[0]
    found = {f"{base}.prefix_tuning.prefix_tunings.{NAME}.self_prefix.control_trans": ground.draw(size)}
    for layer in layers:
        found |= _gate(ground, f"{layer.attention}.prefix_tuning.prefix_gates.{NAME}", layer.features)
    return found


def _scaled_bank(ground: Ground) -> Tensors:
    sites = ground.ending("q_proj")
    wide, tall, base = sites[0].in_features, sites[0].out_features, sites[0].path.partition(".")[0]
    found = {
        f"{base}.shared_parameters.{NAME}.lora_A": ground.draw(64, wide),
        f"{base}.shared_parameters.{NAME}.lora_B": ground.draw(tall, 64),
    }
    for number, site in enumerate(sites):
        path = f"{site.path}.loras.{NAME}"
        found[f"{path}.vera_D"] = ground.draw(64, seed=number).diag()
        found[f"{path}.vera_B"] = ground.draw(tall, seed=number).diag()
        found[f"{path}.m.weight"] = 1 + ground.draw(tall, 1, seed=number)
    return found


_PREFIX = {"architecture": "prefix_tuning", "prefix_length": VIRTUAL_TOKENS, "flat": True, "bottleneck_size": 512}
_LORA = {"architecture": "lora", "r": RANK, "alpha": RANK, "attn_matrices": ["q", "v"], "selfattn_lora": True}
_OUTPUT = {"mh_adapter": False, "output_adapter": True}
_AFTER = {"original_ln_before": True, "original_ln_after": True, "residual_before_ln": True}
_SEQUENTIAL = {**_OUTPUT, **_AFTER, "non_linearity": "relu", "reduction_factor": 16, "scaling": 1.0}
_PLUS = {
    **_OUTPUT,
    "original_ln_before": True,
    "original_ln_after": False,
    "residual_before_ln": False,
    "non_linearity": "gelu",
    "reduction_factor": 16,
    "scaling": "channel",
}
_GATES = {"use_gating": True}

MADE: tuple[Made, ...] = (
    _hub("AdapterPlus", "1/16, a scale per channel, MLP", _PLUS, _bottleneck(16, scaled=True, gated=False)),
    _hub("Gated LoRA", "r 16, queries and values", {**_LORA, **_GATES}, _gated_low_rank),
    _hub(
        "DVoRA",
        "r 64, queries",
        {**_LORA, "r": 64, "attn_matrices": ["q"], "use_dora": True, "vera_d": 0.1, "vera_b": 0.0},
        _scaled_bank,
    ),
    _hub(
        "UniPELT",
        "16 tokens, 1/16 at the MLP, r 16 at queries and values, all gated",
        {
            "architecture": "union",
            "configs": [{**_PREFIX, **_GATES}, {**_SEQUENTIAL, **_GATES}, {**_LORA, **_GATES}],
        },
        _gated_prefix,
        _bottleneck(16, scaled=False, gated=True),
        _gated_low_rank,
    ),
)
