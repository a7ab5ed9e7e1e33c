"""AdapterHub's methods as its papers and docs put them, by hooks on a plain model; written apart from weft's parsers.

The golden answers say whether it is right (``tests/server/engine/test_adapterhub.py``); it then answers for prompts
and adapters that nobody recorded. Llama, GPT-2, Gemma 3 and what is built like them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from tests.support.methods.case import GPT2, LLAMA, Oracle, WholePass
from tests.support.methods.native_hooks import Change, StepByStep, change_sublayer

ATTENTION = "hub_prefix"
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "leakyrelu": F.leaky_relu,
    "tanh": torch.tanh,
}
# module.kind.adapter.role
_NAME = re.compile(
    r"(?P<module>.+)\.(?P<kind>loras|adapters|prefix_gates|prefix_tunings|shared_parameters)\.task\.(?P<role>.+)"
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class _File:
    """An adapter's members by architecture, and its tensors by kind, module and role."""

    members: Mapping[str | None, dict[str, Any]]
    kinds: Mapping[str, Mapping[str, Tensors]]

    @classmethod
    def read(cls, folder: Path) -> "_File":
        config = json.loads((folder / "adapter_config.json").read_text())
        said = config["config"]
        if config["version"] == "adapters.1.0.1":
            said["alpha"] = said["r"]
        members = {member.get("architecture"): member for member in said.get("configs", [said])}
        kinds: dict[str, dict[str, Tensors]] = {}
        for name, tensor in load_file(folder / "adapter.safetensors").items():
            found = _NAME.fullmatch(name)
            assert found is not None, name
            kinds.setdefault(found["kind"], {}).setdefault(found["module"], {})[found["role"]] = tensor
        return cls(members, kinds)


def oracle(model: PreTrainedModel, folder: Path) -> Oracle:
    """What the adapter in this folder makes of the model, which it changes for good."""
    file = _File.read(folder)
    family = GPT2 if model.config.model_type == GPT2 else LLAMA
    (shared,) = file.kinds.get("shared_parameters", {"": {}}).values()
    for path, tensors in file.kinds.get("loras", {}).items():
        _change_linear(model.get_submodule(path), file.members["lora"], {**shared, **tensors})
    for (layer, after), change in bottlenecks(folder).items():
        change_sublayer(family, model, layer, after, change)
    if "prefix_tunings" in file.kinds:
        _add_prefixes(model, file)
    gated = any(member.get("use_gating", False) for member in file.members.values())
    return StepByStep(model) if gated else WholePass(model)


def bottlenecks(folder: Path) -> dict[tuple[str, str], Change]:
    """What the adapter in this folder does behind sublayers, by the path of the layer and which of the two it is."""
    file = _File.read(folder)
    (shared,) = file.kinds.get("shared_parameters", {"": {}}).values()
    found = {}
    for path, tensors in file.kinds.get("adapters", {}).items():
        layer, _, place = path.rpartition(".")
        after = "attention" if place == "attention_adapters" else "mlp"
        found[layer, after] = _bottleneck(file.members[None], {**shared, **tensors})
    return found


def _gate(x: Tensor, tensors: Tensors, name: str = "gate.") -> Tensor:
    """[rows, outputs]: the mean over the tokens that are there."""
    return torch.sigmoid(F.linear(x, tensors[f"{name}weight"], tensors[f"{name}bias"])).mean(dim=1)


def _change_linear(linear: nn.Module, config: dict[str, Any], tensors: Tensors) -> None:
    fused = _is_fused(linear)
    parts = [i for i, letter in enumerate("qkv") if letter in config["attn_matrices"]] if fused else [0]
    alpha, rank, width = config["alpha"], config["r"], _outputs(linear) // (3 if fused else 1)

    def act(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = inputs[0]
        if config["composition_mode"] == "scale":
            scale = torch.ones(_outputs(linear))
            for i, part in enumerate(parts):
                scale[part * width : (part + 1) * width] = tensors["lora_B"][i * width : (i + 1) * width, 0]
            scaled: Tensor = y * scale * alpha
            return scaled
        added = torch.zeros_like(y)
        for i, part in enumerate(parts):
            a, b = _pair(tensors, slice(i * rank, (i + 1) * rank), slice(i * width, (i + 1) * width))
            factor = _gate(x, tensors)[:, i, None, None] if config["use_gating"] else alpha / rank
            added[..., part * width : (part + 1) * width] = x @ a.T @ b.T * factor
        if not config["use_dora"]:
            return y + added
        weight = module.weight
        assert isinstance(weight, Tensor)
        turned: Tensor = tensors["m.weight"][:, 0] / torch.linalg.vector_norm(weight + b @ a, dim=1) * (y + added)
        return turned

    linear.register_forward_hook(act)


def _is_fused(linear: nn.Module) -> bool:
    """GPT-2's queries, keys and values."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return type(linear).__name__ == "Conv1D" and weight.shape[1] == 3 * weight.shape[0]


def _outputs(linear: nn.Module) -> int:
    return int(linear.nf) if type(linear).__name__ == "Conv1D" else int(linear.out_features)  # type: ignore[arg-type]


def _pair(tensors: Tensors, ranks: slice, outputs: slice) -> tuple[Tensor, Tensor]:
    if "vera_D" in tensors:
        return tensors["vera_D"] @ tensors["lora_A"], tensors["vera_B"] @ tensors["lora_B"]
    return tensors["lora_A"][ranks], tensors["lora_B"][outputs]


def _bottleneck(config: dict[str, Any], tensors: Tensors) -> Change:
    act, number = ACTIVATIONS[config["non_linearity"]], int(config["ln_before"])
    scaling = tensors["scaling"] if "scaling" in tensors else torch.tensor(config["scaling"])

    def change(h: Tensor, x_res: Tensor, _: Tensor) -> Tensor:
        tap = x_res if config["is_parallel"] else h + x_res if config["original_ln_before"] else h
        u = tap
        if config["ln_before"]:
            u = F.layer_norm(u, u.shape[-1:], _norm(tensors, "weight"), _norm(tensors, "bias"))
        down = _map(u, tensors, f"adapter_down.{number}", "down")
        out = _map(act(down), tensors, "adapter_up", "up") * scaling
        return h + (out * _gate(tap, tensors)[:, :, None] if config["use_gating"] else out)

    return change


def _norm(tensors: Tensors, part: str) -> Tensor:
    name = f"adapter_norm_before.{part}"
    return tensors[name] if name in tensors else tensors[f"adapter_down.0.{part}"]


def _map(x: Tensor, tensors: Tensors, place: str, which: str) -> Tensor:
    if f"{place}.weight" in tensors:
        return F.linear(x, tensors[f"{place}.weight"], tensors[f"{place}.bias"])
    rules = _product(tensors, f"{place}.phm_rule", "phm_rule")
    weights = _product(tensors, f"{place}.W", f"W_{which}")
    whole = torch.stack([torch.kron(rule.contiguous(), w.contiguous()) for rule, w in zip(rules, weights, strict=True)])
    y = x @ whole.sum(dim=0)
    return y + tensors[f"{place}.b"] if f"{place}.b" in tensors else y


def _product(tensors: Tensors, *names: str) -> Tensor:
    """A stack of matrices by the first of these names that there is, whole or as two factors."""
    for name in names:
        if name in tensors:
            return tensors[name]
        if f"{name}_left" in tensors:
            return tensors[f"{name}_left"] @ tensors[f"{name}_right"]
    raise AssertionError(names)


def _add_prefixes(model: PreTrainedModel, file: _File) -> None:
    config = file.members["prefix_tuning"]
    (tensors,) = file.kinds["prefix_tunings"].values()
    attentions = [m for name, m in model.named_modules() if name.endswith((".self_attn", ".attn"))]
    kept = [m for i, m in enumerate(attentions) if i not in config["leave_out"]]
    if config["flat"]:
        rows = tensors["self_prefix.control_trans"].view(config["prefix_length"], -1)
    else:
        rows, part = tensors["self_prefix.wte.weight"], "self_prefix.control_trans"
        rows = torch.tanh(F.linear(rows, tensors[f"{part}.0.weight"], tensors[f"{part}.0.bias"]))
        rows = F.linear(rows, tensors[f"{part}.2.weight"], tensors[f"{part}.2.bias"])
    gates = list(file.kinds.get("prefix_gates", {}).values())
    for i, attention in enumerate(kept):
        keys, values = rows.chunk(2 * len(kept), dim=1)[2 * i : 2 * i + 2]
        attention.hub = _Prefix(keys, values, gates[i] if gates else None)
        attention.register_forward_pre_hook(_keep_input, with_kwargs=True)
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    model.set_attn_implementation(ATTENTION)


@dataclass
class _Prefix:
    """Keys and values [p, heads · size], and what the attention last saw."""

    keys: Tensor
    values: Tensor
    gate: Tensors | None
    x: Tensor | None = None

    def ready(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, p, size]."""
        rows, heads, _, size = like.shape
        shaped = [t.view(-1, heads, size).transpose(0, 1).expand(rows, -1, -1, -1) for t in (self.keys, self.values)]
        if self.gate is not None:
            assert self.x is not None
            gate = _gate(self.x, self.gate, "")
            shaped = [t * gate[:, i, None, None, None] for t, i in zip(shaped, (0, -1), strict=True)]
        return shaped[0], shaped[1]


def _keep_input(attention: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
    attention.hub.x = inputs[0] if inputs else named["hidden_states"]  # type: ignore[union-attr]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """softmax(q [P; K]ᵀ) [P; V]: every query sees the whole prefix, and of the text what the mask lets it."""
    prefix = getattr(module, "hub", None)
    if prefix is not None:
        keys, values = prefix.ready(key)
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        mask = F.pad(mask, (keys.shape[2], 0))
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling) + mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None
