"""Weft's own formats that act behind sublayers and in front of the text: bottlenecks, KronA^B, IPT."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from tests.support.backbones import build
from tests.support.methods.case import ALL, Case, Oracle, WholePass
from tests.support.methods.native_files import Draw, Tensors, drawing, prefixed, read, write
from tests.support.methods.native_hooks import Change, StepByStep, change_sublayer, layer_paths

RANK, TERMS, PROMPT = 6, 4, 5
# what the modules that attend are called
ATTENTIONS = {"llama": "self_attn", "gpt2": "attn", "gemma3": "self_attn"}


@dataclass(frozen=True)
class Shape:
    """What one bottleneck case consists of.

    phm, inner:  whether its maps are sums of Kronecker products, and the rank of these
    own_name:    the attention goes by its module's path
    """

    tap: str
    act: str
    after: tuple[str, ...] = ("attention", "mlp")
    phm: bool = False
    inner: int = 1
    norm: bool = False
    gate: bool = False
    biases: bool = True
    own_name: bool = False
    scale: float = 0.7


SHAPES: Mapping[str, Shape] = {
    "houlsby": Shape("h", "relu"),
    "pfeiffer": Shape("h+x_res", "swish", ("mlp",)),
    "parallel": Shape("x_res", "gelu_new", ("mlp",), scale=4.0),
    "normed": Shape("ln_x", "tanh", norm=True, own_name=True),
    "bare": Shape("ln_x", "gelu", biases=False, scale=1.0),
    "compacter": Shape("h", "gelu_new", phm=True),
    "gated": Shape("h+x_res", "sigmoid", gate=True),
    "gated_compacter": Shape("x_res", "leaky_relu", ("attention",), phm=True, inner=2, norm=True, gate=True),
}


def _map(shape: Shape, which: str, wide: int, tall: int, draw: Draw) -> Tensors:
    made: Tensors = {f"{which}.bias": draw(tall)} if shape.biases else {}
    if not shape.phm:
        return {**made, f"{which}.weight": draw(tall, wide)}
    return {
        **made,
        f"{which}.phm.rule": draw(TERMS, TERMS, TERMS),
        f"{which}.phm.left": draw(TERMS, wide // TERMS, shape.inner),
        f"{which}.phm.right": draw(TERMS, shape.inner, tall // TERMS),
    }


def _bottleneck(name: str, shape: Shape) -> Case:
    rank = 2 * TERMS if shape.phm else RANK

    def make(family: str, folder: Path, seed: int) -> Path:
        model, draw = build(family), drawing(seed)
        tensors: Tensors = {}
        width = model.config.hidden_size
        for layer in layer_paths(family, model):
            for after in shape.after:
                own = {**_map(shape, "down", width, rank, draw), **_map(shape, "up", rank, width, draw)}
                if shape.norm:
                    own |= {"norm_before.weight": draw(width, around=1.0), "norm_before.bias": draw(width)}
                if shape.gate:
                    own |= {"gate.weight": draw(1, width), "gate.bias": draw(1)}
                place = ATTENTIONS[family] if shape.own_name and after == "attention" else after
                tensors |= {f"{layer}.{place}.{role}": tensor for role, tensor in own.items()}
        settings = {"tap": shape.tap, "act": shape.act, "scale": shape.scale}
        if shape.gate:
            settings["gate_scope"] = "per_call"
        return write(folder, "X_BOTTLENECK", prefixed(tensors), **settings)

    def oracle(family: str, folder: Path) -> Oracle:
        model, (config, tensors) = build(family), read(folder)
        for layer in layer_paths(family, model):
            for after in shape.after:
                place = ATTENTIONS[family] if shape.own_name and after == "attention" else after
                own = {role: tensors[n] for n in tensors if (role := n.removeprefix(f"{layer}.{place}.")) != n}
                change_sublayer(family, model, layer, after, bottleneck(config, own))
        return StepByStep(model) if shape.gate else WholePass(model)

    return Case(f"bottleneck_{name}", make, oracle, ALL)


def tapped(tap: str, h: Tensor, x_res: Tensor, ln_x: Tensor) -> Tensor:
    """What an operator behind a sublayer reads."""
    return {"h": h, "h+x_res": h + x_res, "x_res": x_res, "ln_x": ln_x}[tap]


def bottleneck(config: Mapping[str, Any], own: Tensors) -> Change:
    """h' = h + gate · scale · (act(LN(tap) Wdᵀ + bd) Wuᵀ + bu) in fp64; a PHM map is x Σ kron(S_i, L_i R_i)."""
    weights = {role: tensor.double() for role, tensor in own.items()}
    act = nn.LeakyReLU() if config["act"] == "leaky_relu" else ACT2FN[config["act"]]

    def mapped(x: Tensor, which: str) -> Tensor:
        whole = weights.get(f"{which}.weight")
        if whole is None:
            rule, left, right = (weights[f"{which}.phm.{part}"] for part in ("rule", "left", "right"))
            whole = torch.stack([torch.kron(rule[i], left[i] @ right[i]) for i in range(len(rule))]).sum(dim=0).T
        return F.linear(x, whole, weights.get(f"{which}.bias"))

    def change(h: Tensor, x_res: Tensor, ln_x: Tensor) -> Tensor:
        """All [rows, tokens, d]; a gate is averaged over the tokens."""
        tap = tapped(config["tap"], h, x_res, ln_x).double()
        x = tap
        if "norm_before.weight" in weights:
            x = F.layer_norm(tap, tap.shape[-1:], weights["norm_before.weight"], weights["norm_before.bias"])
        out: Tensor = config["scale"] * mapped(act(mapped(x, "down")), "up")
        if "gate.weight" in weights:
            gate = torch.sigmoid(tap @ weights["gate.weight"].T + weights["gate.bias"])
            out = gate.mean(dim=1, keepdim=True) * out
        return (h.double() + out).float()

    return change


def _krona_b(variant: str, tap: str, bias: bool) -> Case:
    def make(family: str, folder: Path, seed: int) -> Path:
        model, draw, tensors = build(family), drawing(seed), {}
        width = model.config.hidden_size
        for layer in layer_paths(family, model):
            tensors[f"{layer}.mlp.krona_A"] = draw(4, 2)
            tensors[f"{layer}.mlp.krona_B"] = draw(width // 4, width // 2)
            if bias:
                tensors[f"{layer}.mlp.bias"] = draw(width)
            if variant == "B_res":
                tensors[f"{layer}.mlp.residual_scale"] = draw(around=0.6)
        return write(folder, "X_KRONA_B", prefixed(tensors), scale=1.5, tap=tap, variant=variant)

    def oracle(family: str, folder: Path) -> Oracle:
        model, (_, tensors) = build(family), read(folder)
        for layer in layer_paths(family, model):
            own = {n.removeprefix(f"{layer}.mlp."): t.double() for n, t in tensors.items() if n.startswith(f"{layer}.")}
            change_sublayer(family, model, layer, "mlp", krona_b(1.5, tap, own))
        return WholePass(model)

    return Case(f"krona_{variant.lower()}", make, oracle, ALL)


def krona_b(scale: float, tap: str, own: Tensors) -> Change:
    """h' = h + scale · x (A ⊗ B) + bias + s_res · x."""

    def change(h: Tensor, x_res: Tensor, ln_x: Tensor) -> Tensor:
        x = tapped(tap, h, x_res, ln_x).double()
        out = scale * x @ torch.kron(own["krona_A"], own["krona_B"])
        out = out + own.get("bias", 0.0) + own.get("residual_scale", 0.0) * x
        return (h.double() + out).float()

    return change


def _prompted(model: PreTrainedModel, rows: Tensor) -> Callable[..., Any]:
    """A call of the model with rows in front of the text's embeddings."""

    def call(input_ids: Tensor, use_cache: bool) -> Any:
        text = model.get_input_embeddings()(input_ids)
        return model(inputs_embeds=torch.cat([rows[None], text], dim=1), use_cache=use_cache)

    return call


def _ipt() -> Case:
    def make(family: str, folder: Path, seed: int) -> Path:
        width = build(family).config.hidden_size
        rows = drawing(seed)(PROMPT, width, scale=1.0)
        return write(folder, "X_IPT", {"prompt_embeddings": rows}, decoded=True)

    def oracle(family: str, folder: Path) -> Oracle:
        _, tensors = read(folder)
        return WholePass(_prompted(build(family), tensors["prompt_embeddings"]), extra=PROMPT)  # type: ignore[arg-type]

    return Case("ipt", make, oracle, ALL)


CASES: Sequence[Case] = (
    *(_bottleneck(name, shape) for name, shape in SHAPES.items()),
    _krona_b("B", "x_res", bias=True),
    _krona_b("B_res", "ln_x", bias=False),
    _ipt(),
)
