"""Checkpoints of AdaMix and SparseAdapter as their authors save them, converted; judged by what their code computes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support.backbones import build
from tests.support.methods.case import ALL, GPT2, Case, Oracle, WholePass
from tests.support.methods.native_files import Draw, Tensors, drawing, linears
from tests.support.methods.native_hooks import Change, change_sublayer, layer_paths
from weft.server.convert.adamix import convert_adamix
from weft.server.convert.sparse_adapter import convert_sparse_adapter

RANK, EXPERTS, ALPHA, SCALE = 4, 3, 6.0, 1.5
KEPT = 0.4

Content = Callable[[str, PreTrainedModel, Draw], Tensors]
Edit = Callable[[str, PreTrainedModel, Tensors], None]


def _case(
    name: str, content: Content, convert: Callable[[Path, Path], Any], edit: Edit, families: tuple[str, ...] = ALL
) -> Case:
    """The checkpoint is kept beside the folder, for the oracle to read."""

    def make(family: str, folder: Path, seed: int) -> Path:
        torch.save(content(family, build(family), drawing(seed)), folder.with_suffix(".pt"))
        convert(folder.with_suffix(".pt"), folder)
        return folder

    def oracle(family: str, folder: Path) -> Oracle:
        model = build(family)
        with torch.no_grad():
            edit(family, model, torch.load(folder.with_suffix(".pt")))
        return WholePass(model)

    return Case(name, make, oracle, families)


def _soups(family: str, model: PreTrainedModel, draw: Draw) -> Tensors:
    made, width = {}, model.config.hidden_size
    for layer in layer_paths(family, model):
        for side, (tall, wide) in {"A": (RANK, width), "B": (width, RANK)}.items():
            soup = f"{layer}.mlp.ExpertSoup.MoA_{side}"
            made[f"{soup}.expert_score_weight"] = draw(EXPERTS, scale=1.0)
            for i in range(EXPERTS):
                made[f"{soup}.deepspeed_experts.{i}.weight"] = draw(tall, wide)
                made[f"{soup}.deepspeed_experts.{i}.bias"] = draw(tall)
    return made


def _mean(tensors: Tensors, scores: str, name: Callable[[int], str]) -> Tensor:
    """The experts' mean, weighted by softmax(scores)."""
    weights = torch.softmax(tensors[scores].double(), dim=0)
    return torch.stack([weights[i] * tensors[name(i)].double() for i in range(EXPERTS)]).sum(dim=0)


def _add_soups(family: str, model: PreTrainedModel, tensors: Tensors) -> None:
    for layer in layer_paths(family, model):
        maps = []
        for side in "AB":
            soup = f"{layer}.mlp.ExpertSoup.MoA_{side}"
            scores = f"{soup}.expert_score_weight"
            maps += [
                _mean(tensors, scores, f"{soup}.deepspeed_experts.{{}}.{role}".format) for role in ("weight", "bias")
            ]
        change_sublayer(family, model, layer, "mlp", _between(maps, partial(nn.functional.gelu, approximate="tanh")))


def _between(maps: list[Tensor], act: Callable[[Tensor], Tensor], scale: float = 1.0) -> Change:
    """h + scale · (act(h Wdᵀ + bd) Wuᵀ + bu) in fp64."""
    down, down_bias, up, up_bias = maps

    def change(h: Tensor, x_res: Tensor, ln_x: Tensor) -> Tensor:
        wide = h.double()
        return (wide + scale * (act(wide @ down.T + down_bias) @ up.T + up_bias)).float()

    return change


def _expert_loras(family: str, model: PreTrainedModel, draw: Draw) -> Tensors:
    """Of q and v in a fused q, k, v: A [2r, in], B [2·out/3, r]."""
    made = {}
    for linear in linears(model):
        if linear.path.endswith("c_attn"):
            tall, wide = linear.weight.shape
            made[f"{linear.path}.lora_expert_score_weight"] = draw(EXPERTS, scale=1.0)
            for i in range(EXPERTS):
                made[f"{linear.path}.experts_lora_A.{i}"] = draw(2 * RANK, wide)
                made[f"{linear.path}.experts_lora_B.{i}"] = draw(2 * tall // 3, RANK)
    return made


def _add_expert_loras(family: str, model: PreTrainedModel, tensors: Tensors) -> None:
    for linear in linears(model):
        scores = f"{linear.path}.lora_expert_score_weight"
        if scores in tensors:
            a, b = (_mean(tensors, scores, f"{linear.path}.experts_lora_{side}.{{}}".format) for side in "AB")
            third = linear.weight.shape[0] // 3
            for k, start in enumerate((0, 2 * third)):
                part = b[k * third : (k + 1) * third] @ a[k * RANK : (k + 1) * RANK]
                linear.weight[start : start + third] += (ALPHA / RANK * part).float()


def _masked(draw: Draw, *shape: int) -> tuple[Tensor, Tensor]:
    return draw(*shape), (draw(*shape, scale=1.0) < KEPT).float()


def _masked_bottlenecks(family: str, model: PreTrainedModel, draw: Draw) -> Tensors:
    made, width = {}, model.config.hidden_size
    for layer in layer_paths(family, model):
        name = f"{layer}.mlp.ef_ffn_adapter"
        made[f"{name}.down_proj.weight"], made[f"{name}.down_mask"] = _masked(draw, RANK, width)
        made[f"{name}.up_proj.weight"], made[f"{name}.up_mask"] = _masked(draw, width, RANK)
        made |= {f"{name}.down_proj.bias": draw(RANK), f"{name}.up_proj.bias": draw(width)}
    return made


def _add_masked_bottlenecks(family: str, model: PreTrainedModel, tensors: Tensors) -> None:
    for layer in layer_paths(family, model):
        own = {n.removeprefix(f"{layer}.mlp.ef_ffn_adapter."): t.double() for n, t in tensors.items() if layer in n}
        maps = [
            t
            for side in ("down", "up")
            for t in (own[f"{side}_proj.weight"] * own[f"{side}_mask"], own[f"{side}_proj.bias"])
        ]
        change_sublayer(family, model, layer, "mlp", _between(maps, torch.relu, SCALE))


def _masked_loras(family: str, model: PreTrainedModel, draw: Draw) -> Tensors:
    made = {}
    for linear in linears(model):
        tall, wide = linear.weight.shape
        made[f"{linear.path}.ef_lora_A"], made[f"{linear.path}.A_mask"] = _masked(draw, RANK, wide)
        made[f"{linear.path}.ef_lora_B"], made[f"{linear.path}.B_mask"] = _masked(draw, tall, RANK)
    return made


def _add_masked_loras(family: str, model: PreTrainedModel, tensors: Tensors) -> None:
    for linear in linears(model):
        a, b = (
            tensors[f"{linear.path}.ef_lora_{s}"].double() * tensors[f"{linear.path}.{s}_mask"].double() for s in "AB"
        )
        linear.weight.add_((ALPHA / RANK * b @ a).float())


CASES = (
    _case("adamix", _soups, convert_adamix, _add_soups),
    _case("adamix_lora", _expert_loras, partial(convert_adamix, alpha=ALPHA), _add_expert_loras, families=(GPT2,)),
    _case("sparse_adapter", _masked_bottlenecks, partial(convert_sparse_adapter, scale=SCALE), _add_masked_bottlenecks),
    _case("sparse_adapter_lora", _masked_loras, partial(convert_sparse_adapter, alpha=ALPHA), _add_masked_loras),
)
