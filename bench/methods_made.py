"""One random adapter of every kind of method on a backbone of any shape, as its own library or format saves it.

What peft can make, peft makes; the rest are weft's own formats, written from the catalogue's shapes. Sizes are those
that the methods' papers report as usual: rank 16, bottlenecks of a sixteenth, half a percent of the weights.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from weft.adapters_store.sites import CatalogueInfo, SideInfo, SiteInfo

SPREAD = 0.02
PREFIX = "base_model.model."
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = LINEARS[:4]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
RANK, VIRTUAL_TOKENS, DENSITY, ROWS_SHARE = 16, 16, 0.005, 0.06

# ends of names: tensors that are drawn once for all adapters of a method
SHARED = ("vera_A", "vera_B")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """A method as it is measured, and how to make an adapter of it on this backbone."""

    name: str
    words: str
    write: Callable[["Ground", Path], None]


@dataclass(frozen=True)
class Ground:
    """What adapters are made for: a fresh copy of the model, and its catalogue."""

    model: Callable[[], PreTrainedModel]
    info: CatalogueInfo

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """Seeded noise."""
        generator = torch.Generator().manual_seed(seed + sum(shape))
        return torch.randn(shape, generator=generator) * SPREAD

    @property
    def body(self) -> list[SiteInfo]:
        """All linears but the output head."""
        return [site for site in self.info.sites if site.kind != "lm_head"]


def by_peft(name: str, words: str, config: Callable[[], PeftConfig]) -> Made:
    """A method that peft makes."""

    def write(ground: Ground, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft comments on every model that it changes
            model = get_peft_model(ground.model(), config())
            with torch.no_grad():
                for number, parameter in enumerate(model.parameters()):
                    if parameter.requires_grad:
                        noise = ground.draw(*parameter.shape, seed=number)
                        parameter.add_(noise.to(parameter.dtype))
            model.save_pretrained(str(folder))

    return Made(name, words, write)


Said = Mapping[str, object] | Callable[[Ground], Mapping[str, object]]


def _said(settings: Said, ground: Ground) -> dict[str, object]:
    """Settings that may depend on the backbone."""
    return dict(settings(ground) if callable(settings) else settings)


def _named(key: str, ground: Ground) -> str:
    """A tensor's name in a file: one of a module has a prefix."""
    return f"{PREFIX}{key}" if key.partition(".")[0] in ground.info.modules else key


def union(name: str, words: str, *members: tuple[Said, Callable[[Ground], Tensors]]) -> Made:
    """A method that is several in weft's own formats, or in peft's."""

    def tensors(ground: Ground) -> Tensors:
        found: Tensors = {}
        for number, (_, of) in enumerate(members):
            found |= {f"member.{number}.{_named(key, ground)}": tensor for key, tensor in of(ground).items()}
        return found

    def write(ground: Ground, folder: Path) -> None:
        folder.mkdir(parents=True)
        config = {"peft_type": "X_UNION", "format_version": 1, "members": [_said(said, ground) for said, _ in members]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file({k: t.contiguous() for k, t in tensors(ground).items()}, folder / "adapter_model.safetensors")

    return Made(name, words, write)


def native(name: str, words: str, settings: Said, tensors: Callable[[Ground], Tensors]) -> Made:
    """A method in weft's own format."""

    def write(ground: Ground, folder: Path) -> None:
        folder.mkdir(parents=True)
        config = {"format_version": 1, **_said(settings, ground)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        found = {_named(key, ground): t.contiguous() for key, t in tensors(ground).items()}
        save_file(found, folder / "adapter_model.safetensors")

    return Made(name, words, write)


def variant(source: Path, target: Path, number: int) -> Path:
    """Another adapter of the same shape: its floats a little larger, but for those that all of its method share."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "adapter_model.safetensors")
    own = {k for k, t in tensors.items() if t.is_floating_point() and not k.endswith(SHARED)}
    changed = {k: t * (1 + number / 256) if k in own else t for k, t in tensors.items()}
    save_file({k: t.to(tensors[k].dtype) for k, t in changed.items()}, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return target


def _bias(ground: Ground) -> Tensors:
    return {f"{site.path}.bias_delta": ground.draw(site.out_features) for site in ground.body}


def _norms(ground: Ground) -> Tensors:
    return {f"{norm.path}.norm_weight": 1 + ground.draw(norm.features) for norm in ground.info.norms}


def _sparse(ground: Ground) -> Tensors:
    tensors: Tensors = {}
    for number, site in enumerate(ground.body):
        size = site.in_features * site.out_features
        count = int(size * DENSITY)
        index = torch.randperm(size, generator=torch.Generator().manual_seed(number))[:count].sort().values
        tensors[f"{site.path}.weight.sparse_indices"] = index.int()
        tensors[f"{site.path}.weight.sparse_values"] = ground.draw(count, seed=number)
    return tensors


def _rows(ground: Ground) -> Tensors:
    tensors: Tensors = {}
    for site in ground.body:
        if ".mlp." in site.path:
            count = int(site.out_features * ROWS_SHARE)
            tensors[f"{site.path}.row_indices"] = torch.arange(count, dtype=torch.int32) * (site.out_features // count)
            tensors[f"{site.path}.rows_delta"] = ground.draw(count, site.in_features)
    return tensors


def _dense(ground: Ground) -> Tensors:
    return {f"{site.path}.weight.delta": ground.draw(site.out_features, site.in_features) for site in ground.body}


def _scales(ground: Ground) -> Tensors:
    gammas = {
        f"{layer.path}.{name}": 1 + ground.draw(layer.features)
        for layer in ground.info.layers
        for name in ("gamma_attn", "gamma_mlp")
    }
    return {**gammas, **_bias(ground), **_norms(ground)}


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


def _kron_beside(ground: Ground) -> Tensors:
    found: Tensors = {}
    for place, width in _places(ground, ("mlp",)):
        small = next(n for n in range(int(width**0.5), 0, -1) if width % n == 0)
        found[f"{place}.krona_A"] = ground.draw(small, small)
        found[f"{place}.krona_B"] = ground.draw(width // small, width // small)
    return found


def _gated_prefix(ground: Ground) -> Tensors:
    layers = ground.info.layers
    width = sum(layer.kv_heads * (layer.key_size + layer.value_size) for layer in layers)
    gates = {f"layers.{i}.gate.weight": ground.draw(VIRTUAL_TOKENS, each.features) for i, each in enumerate(layers)}
    lambdas = {f"layers.{i}.lambda": torch.ones(1) for i in range(len(layers))}
    return {"prompt_embeddings": ground.draw(VIRTUAL_TOKENS, width), **gates, **lambdas}


def _soft(ground: Ground) -> Tensors:
    assert ground.info.embedding is not None
    return {"prompt_embeddings": ground.draw(VIRTUAL_TOKENS, ground.info.embedding.features)}


def _light(ground: Ground) -> Tensors:
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


def _side(ground: Ground) -> Tensors:
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


def _side_settings(ground: Ground) -> dict[str, object]:
    layers = list(range(len(ground.info.layers)))
    return {"peft_type": "X_LST", "reduction": _side_of(ground).reduction, "gate_temperature": 0.1, "layers": layers}


def _prefix_settings(ground: Ground) -> dict[str, object]:
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


def _prefix(ground: Ground) -> Tensors:
    return {"prompt_embeddings": _gated_prefix(ground)["prompt_embeddings"]}


def _side_of(ground: Ground) -> SideInfo:
    """The narrowest network, but not below an eighth."""
    return max((side for side in ground.info.sides if side.reduction <= 8), key=lambda side: side.reduction)


CAUSAL = "CAUSAL_LM"
GATED = {"gate_input": "mean", "gate_scope": "per_call", "applies_to": "kv"}
HOUSE = {"tap": "h", "act": "silu", "scale": 1.0}

MADE: tuple[Made, ...] = (
    by_peft("LoRA", "r 16, all linears", lambda: peft.LoraConfig(r=RANK, target_modules=LINEARS, task_type=CAUSAL)),
    by_peft("DoRA", "r 16, all linears", lambda: peft.LoraConfig(r=RANK, target_modules=LINEARS, use_dora=True)),
    by_peft(
        "AdaLoRA", "r 16, all linears", lambda: peft.AdaLoraConfig(init_r=RANK, target_modules=LINEARS, total_step=9)
    ),
    by_peft("KronA", "full factors, all linears", lambda: peft.LoKrConfig(r=4096, alpha=4096, target_modules=LINEARS)),
    by_peft("LoKr", "r 8, all linears", lambda: peft.LoKrConfig(r=8, target_modules=LINEARS)),
    by_peft("LoHa", "r 4, all linears", lambda: peft.LoHaConfig(r=4, target_modules=LINEARS)),
    by_peft(
        "(IA)³",
        "keys, values, down",
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    by_peft("VeRA", "r 64, all linears", lambda: peft.VeraConfig(r=64, target_modules=LINEARS)),
    by_peft("HRA", "r 8, attention", lambda: peft.HRAConfig(r=8, target_modules=ATTENTION)),
    by_peft("DeLoRA", "r 16, all linears", lambda: peft.DeloraConfig(r=RANK, target_modules=LINEARS)),
    by_peft("MiSS", "r 16, all linears", lambda: peft.MissConfig(r=RANK, target_modules=LINEARS)),
    by_peft("SHiRA", "r 8, all linears", lambda: peft.ShiraConfig(r=8, target_modules=LINEARS)),
    by_peft("BEFT", "values", lambda: peft.BeftConfig(target_modules=["v_proj"])),
    by_peft("LN tuning", "all norms", lambda: peft.LNTuningConfig(target_modules=NORMS, task_type=CAUSAL)),
    by_peft("Prompt tuning", "16 tokens", lambda: peft.PromptTuningConfig(num_virtual_tokens=16, task_type=CAUSAL)),
    by_peft("Prefix tuning", "16 tokens", lambda: peft.PrefixTuningConfig(num_virtual_tokens=16, task_type=CAUSAL)),
    native("IPT", "16 tokens", {"peft_type": "X_IPT", "decoded": True}, _soft),
    native("BitFit", "all linears", {"peft_type": "X_BITFIT"}, _bias),
    native("DiffFit", "scales, biases, norms", {"peft_type": "X_DIFFFIT"}, _scales),
    native("FishMask", "0.5 % of the weights", {"peft_type": "X_SPARSE"}, _sparse),
    native("FAR", "6 % of the MLP's rows", {"peft_type": "X_ROWS", "axis": "out"}, _rows),
    native("Full fine-tuning", "all linears, dense", {"peft_type": "X_DENSE"}, _dense),
    native("Houlsby", "1/16, both places", {"peft_type": "X_BOTTLENECK", **HOUSE}, bottleneck("attention", "mlp")),
    native("Pfeiffer", "1/16, MLP", {"peft_type": "X_BOTTLENECK", **HOUSE, "tap": "h+x_res"}, bottleneck("mlp")),
    native(
        "Parallel",
        "1/4, beside the MLP",
        {"peft_type": "X_BOTTLENECK", **HOUSE, "tap": "x_res", "scale": 4.0},
        bottleneck("mlp", reduction=4),
    ),
    native("Compacter", "4 terms, both places", {"peft_type": "X_BOTTLENECK", **HOUSE}, compacter("attention", "mlp")),
    native("Compacter++", "4 terms, MLP", {"peft_type": "X_BOTTLENECK", **HOUSE}, compacter("mlp")),
    native(
        "KronA^B",
        "beside the MLP",
        {"peft_type": "X_KRONA_B", "scale": 1.0, "tap": "ln_x", "variant": "B"},
        _kron_beside,
    ),
    native("Intrinsic SAID", "light, 1024 numbers", {"peft_type": "X_SAID", "variant": "light_rank1"}, _light),
    union(
        "MAM",
        "16 tokens, 1/4 beside the MLP",
        (_prefix_settings, _prefix),
        ({"peft_type": "X_BOTTLENECK", "format_version": 1, **HOUSE, "tap": "x_res"}, bottleneck("mlp", reduction=4)),
    ),
    native("Ladder-side", "1/8, all layers", _side_settings, _side),
    native(
        "Adaptive prefix",
        "16 tokens, gated",
        {"peft_type": "X_APT", **GATED},
        _gated_prefix,
    ),
)
