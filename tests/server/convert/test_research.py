"""AdaMix and SparseAdapter: the engine computes what their authors' modules compute, run here in fp64 on hooks."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.server.convert.models import logits
from tests.support.backbones import build
from weft.server import cli
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import RequestId, Submit
from weft.server.engine.offline import OfflineEngine

PROMPT = [5, 17, 40, 3, 88, 9]
WIDTH, RANK, EXPERTS, LAYERS = 32, 4, 3, 2
Tensors = dict[str, Tensor]
Hook = Callable[[Tensor, Tensor], Tensor]


def random(seed: int = 2) -> Callable[..., Tensor]:
    """Seeded noise."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.3


def generated(family: str, folder: Path, tmp_path: Path) -> list[int]:
    """What the engine generates with this adapter."""
    config = EngineConfig(model=family, store=str(tmp_path / "store"), kv_bytes_max=1 << 20)
    offline = OfflineEngine(config, Backbone(build(family)))
    digest = offline.register("converted", folder)
    return offline.run([Submit(RequestId("r"), tuple(PROMPT), 8, adapter=digest)])[RequestId("r")]


def require_tokens(tokens: list[int], model: nn.Module, family: str) -> None:
    """They are the oracle's own choices, and those of the base are others."""
    found = logits(model, [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    lost = found.max(-1).values - found.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float(lost.max()) <= 1e-4 * float(found.abs().max())
    base = logits(build(family), [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    assert float((base - found).abs().max()) >= 1e-2 * float(found.abs().max())


def hooked(family: str, hooks: dict[str, Hook]) -> nn.Module:
    """The family's model in which the output of some modules is another one: hook(input, output)."""
    model = build(family)

    def on(change: Hook) -> Callable[[nn.Module, tuple[Tensor, ...], Any], Any]:
        def run(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            changed = change((inputs[0] if inputs else first).double(), first.double()).float()
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return run

    for path, change in hooks.items():
        model.get_submodule(path).register_forward_hook(on(change))
    return model


def gelu(x: Tensor) -> Tensor:
    """As AdaMix writes it, ``NLG/src/expert_soup.py:17``."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def soup(experts: Tensors, score: Tensor, name: str) -> Tensor:
    """``MixtureSoup.expert_soup``, ``NLG/src/expert_soup.py:40-52``."""
    weight = torch.softmax(score.double(), dim=-1)
    return sum((weight[i] * experts[f"{name}.{i}"].double() for i in range(len(weight))), torch.zeros(()))


def adamix(tensors: Tensors, module: str) -> Hook:
    """``ExpertSoup.forward``, ``NLG/src/expert_soup.py:96-102``."""

    def run(_: Tensor, h: Tensor) -> Tensor:
        result = h
        for side in "AB":
            mixture = f"{module}.ExpertSoup.MoA_{side}"
            score = tensors[f"{mixture}.expert_score_weight"]
            each = {
                f"{role}.{i}": tensors[f"{mixture}.deepspeed_experts.{i}.{role}"]
                for role in ("weight", "bias") for i in range(len(score))
            }  # fmt: skip
            result = nn.functional.linear(result, soup(each, score, "weight"), soup(each, score, "bias"))
            result = gelu(result) if side == "A" else result
        return result + h

    return run


def soups(shared_down: bool = False) -> Tensors:
    """A state dict of AdaMix's bottlenecks for the tiny GPT-2."""
    noise, made = random(), {}
    for layer in range(LAYERS):
        for side, (tall, wide) in {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}.items():
            mixture = f"transformer.h.{layer}.mlp.ExpertSoup.MoA_{side}"
            count = 1 if shared_down and side == "A" else EXPERTS
            made[f"{mixture}.expert_score_weight"] = noise(count) * 3
            for i in range(count):
                made[f"{mixture}.deepspeed_experts.{i}.weight"] = noise(tall, wide)
                made[f"{mixture}.deepspeed_experts.{i}.bias"] = noise(tall)
    return made


def convert(name: str, value: object, folder: Path, *words: str) -> int:
    """Save and convert."""
    torch.save(value, folder / "model.pt")
    return cli.main(["convert", name, str(folder / "model.pt"), str(folder / "out"), *words])


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared down"])
def test_a_mixture_of_bottlenecks_is_their_mean(shared, tmp_path, capsys):
    tensors = soups(shared)
    saved = {f"module.{name}".replace("module.transformer.h", "module.h"): t for name, t in tensors.items()}
    saved["h.0.ln_1.weight"] = torch.ones(WIDTH)
    assert convert("adamix", {"model_state_dict": saved, "step": torch.ones(1)}, tmp_path) == 0
    assert "note: 1 tensors of the backbone are left out" in capsys.readouterr().err
    hooks = {f"transformer.h.{i}.mlp": adamix(tensors, f"transformer.h.{i}.mlp") for i in range(LAYERS)}
    require_tokens(generated("gpt2", tmp_path / "out", tmp_path), hooked("gpt2", hooks), "gpt2")


def merged_lora(tensors: Tensors, module: str, scale: float) -> Hook:
    """``AdamixMergedLinear.forward``, ``NLG/loralib/layers.py:299-358``, with ``zero_pad`` of ``MergedLinear``."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        score = tensors[f"{module}.lora_expert_score_weight"]
        a, b = (soup(tensors, score, f"{module}.experts_lora_{side}") for side in "AB")
        after_a = nn.functional.linear(x, a)
        after_b = nn.functional.conv1d(after_a.transpose(-2, -1), b.unsqueeze(-1), groups=2).transpose(-2, -1)
        padded = torch.zeros_like(y).view(-1, 3, WIDTH)
        padded[:, [0, 2]] = after_b.reshape(-1, 2, WIDTH)
        return y + padded.reshape(y.shape) * scale

    return run


def loras() -> Tensors:
    """A state dict of AdaMix's LoRA for the tiny GPT-2."""
    noise, made = random(3), {}
    for layer in range(LAYERS):
        module = f"transformer.h.{layer}.attn.c_attn"
        made[f"{module}.lora_expert_score_weight"] = torch.zeros(EXPERTS)
        for i in range(EXPERTS):
            made[f"{module}.experts_lora_A.{i}"] = noise(2 * RANK, WIDTH)
            made[f"{module}.experts_lora_B.{i}"] = noise(2 * WIDTH, RANK)
    return made


def test_a_mixture_of_loras_is_the_product_of_their_means(tmp_path):
    tensors = loras()
    assert convert("adamix", tensors, tmp_path, "--alpha", "32") == 0
    hooks = {
        f"transformer.h.{i}.attn.c_attn": merged_lora(tensors, f"transformer.h.{i}.attn.c_attn", 32 / RANK)
        for i in range(LAYERS)
    }
    require_tokens(generated("gpt2", tmp_path / "out", tmp_path), hooked("gpt2", hooks), "gpt2")


def masked(norm: bool = False, learned: bool = False) -> Tensors:
    """A state dict of SparseAdapter's bottlenecks for the tiny Llama."""
    noise, made = random(4), {}
    for layer in range(LAYERS):
        for place, kind in (("self_attn", "attn"), ("mlp", "ffn")):
            name = f"model.layers.{layer}.{place}.ef_{kind}_adapter"
            for linear, mask, shape in (
                ("down_proj", "down_mask", (RANK, WIDTH)),
                ("up_proj", "up_mask", (WIDTH, RANK)),
            ):
                made[f"{name}.{linear}.weight"], made[f"{name}.{linear}.bias"] = noise(*shape), noise(shape[0])
                made[f"{name}.{mask}"] = (noise(*shape) > 0).float()
            if norm:
                made[f"{name}.adapter_layer_norm_before.weight"] = 1 + noise(WIDTH)
                made[f"{name}.adapter_layer_norm_before.bias"] = noise(WIDTH)
            if learned:
                made[f"{name}.scale"] = noise(1)
    return made


def sparse_adapter(tensors: Tensors, name: str, scale: float) -> Hook:
    """``Adapter_Layer.forward``, ``petl/petl_factory.py:493-519``."""
    own = {key.removeprefix(f"{name}."): t.double() for key, t in tensors.items() if key.startswith(f"{name}.")}

    def run(_: Tensor, h: Tensor) -> Tensor:
        x = h
        if "adapter_layer_norm_before.weight" in own:
            weight, bias = (own[f"adapter_layer_norm_before.{end}"] for end in ("weight", "bias"))
            x = nn.functional.layer_norm(x, (WIDTH,), weight, bias)
        down = x @ (own["down_proj.weight"] * own["down_mask"]).T + own["down_proj.bias"]
        up = down.relu() @ (own["up_proj.weight"] * own["up_mask"]).T + own["up_proj.bias"]
        return h + up * own.get("scale", torch.tensor(scale, dtype=torch.float64))

    return run


@pytest.mark.parametrize(("norm", "learned"), [(False, False), (True, True)], ids=["plain", "norm and learned scale"])
def test_masked_bottlenecks(norm, learned, tmp_path):
    tensors = masked(norm, learned)
    words = ["--norm", "in"] if norm else ["--scale", "1.5"]
    assert convert("sparse-adapter", tensors, tmp_path, *words) == 0
    hooks = {
        f"model.layers.{i}.{place}": sparse_adapter(tensors, f"model.layers.{i}.{place}.ef_{kind}_adapter", 1.5)
        for i in range(LAYERS) for place, kind in (("self_attn", "attn"), ("mlp", "ffn"))
    }  # fmt: skip
    require_tokens(generated("llama", tmp_path / "out", tmp_path), hooked("llama", hooks), "llama")


def masked_loras() -> Tensors:
    """A state dict of SparseAdapter's LoRA for the tiny Llama, of two ranks."""
    noise, made = random(5), {}
    for layer in range(LAYERS):
        for linear, tall, rank in (("q_proj", WIDTH, RANK), ("v_proj", WIDTH // 2, 2)):
            name = f"model.layers.{layer}.self_attn.{linear}"
            for side, shape in (("A", (rank, WIDTH)), ("B", (tall, rank))):
                made[f"{name}.ef_lora_{side}"] = noise(*shape)
                made[f"{name}.{side}_mask"] = (noise(*shape) > 0).float()
    return made


def test_masked_loras(tmp_path):
    tensors = masked_loras()
    assert convert("sparse-adapter", tensors, tmp_path, "--alpha", "6") == 0

    def lora(name: str) -> Hook:
        a, b = ((tensors[f"{name}.ef_lora_{side}"] * tensors[f"{name}.{side}_mask"]).double() for side in "AB")
        return lambda x, y: y + x @ a.T @ b.T * 6 / len(a)

    names = [name.removesuffix(".A_mask") for name in tensors if name.endswith(".A_mask")]
    oracle = hooked("llama", {name: lora(name) for name in names})
    require_tokens(generated("llama", tmp_path / "out", tmp_path), oracle, "llama")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["lora_alpha"], settings["r"], set(settings["rank_pattern"].values())) == (6, 4, {2})


M = "transformer.h.0.mlp.ExpertSoup.MoA_A"
E = "model.layers.0.mlp.ef_ffn_adapter"
Q = "model.layers.0.self_attn.q_proj"
C = "transformer.h.0.attn.c_attn"


def edited(tensors: Tensors, **changes: Tensor | None) -> Tensors:
    """Other tensors, none where it is None."""
    return {name: t for name, t in {**tensors, **changes}.items() if t is not None}


BAD: dict[str, tuple[str, object, str]] = {
    "nothing": ("adamix", {"a": torch.ones(2)}, "expected experts of bottlenecks, or experts of LoRA, got neither"),
    "both kinds": ("adamix", {**soups(), **loras()}, "expected experts of bottlenecks, or experts of LoRA, got both"),
    "no alpha": ("adamix", loras(), "alpha: expected the number that LoRA was trained with (--alpha), got none"),
    "an expert less": (
        "adamix",
        edited(soups(), **{f"{M}.deepspeed_experts.1.weight": None}),
        "down.weight: expected experts 0 to 1, got [0, 2]",
    ),
    "experts apart": (
        "adamix",
        edited(soups(), **{f"{M}.deepspeed_experts.1.weight": torch.ones(2, 2)}),
        "down.weight: expected experts of one shape, got several",
    ),
    "scores": (
        "adamix",
        edited(soups(), **{f"{M}.expert_score_weight": torch.ones(2)}),
        "down.weight: expected a score for each of 3 experts, got [2]",
    ),
    "one map": (
        "adamix",
        {name: t for name, t in soups().items() if "MoA_B" not in name},
        "MoA_B: expected the weights of its experts, got none",
    ),
    "no layer": (
        "adamix",
        {f"{M.replace('.h.0', '')}.deepspeed_experts.0.weight": torch.ones(2, 2)},
        "expected a module of a numbered layer, got another",
    ),
    "no masks": ("sparse-adapter", {"a": torch.ones(2)}, "expected masked bottlenecks, or masked LoRA, got neither"),
    "two kinds": ("sparse-adapter", {**masked(), **masked_loras()}, "masked bottlenecks, or masked LoRA, got both"),
    "no alpha there": ("sparse-adapter", masked_loras(), "alpha: expected the number that LoRA was trained with"),
    "a mask less": (
        "sparse-adapter",
        edited(masked(), **{f"{E}.up_mask": None}),
        f"{E}.up_mask: expected this tensor, got none (masks and weights come in pairs)",
    ),
    "a mask's shape": (
        "sparse-adapter",
        edited(masked(), **{f"{E}.up_mask": torch.ones(3)}),
        f"{E}.up_mask: expected shape [32, 4], got [3]",
    ),
    "a norm": ("sparse-adapter", masked(norm=True), "adapter_layer_norm_before: expected no layer norm, or --norm in"),
    "a stranger": (
        "sparse-adapter",
        edited(masked(), **{f"{E}.gate.weight": torch.ones(3)}),
        f"{E}.gate.weight: expected tensors of a masked bottleneck, got another",
    ),
    "a pickle's own": ("adamix", [1], "expected tensors by name, got a list"),
}


@pytest.mark.parametrize("kind", BAD)
def test_other_files_are_refused(kind, tmp_path, capsys):
    name, value, wanted = BAD[kind]
    assert convert(name, value, tmp_path) == 1
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        ({f"{C}.experts_lora_B.{i}": None for i in range(EXPERTS)}, "experts_lora_B: expected the matrices of its exp"),
        (
            {f"{C}.experts_lora_B.{i}": torch.ones(9, RANK) for i in range(EXPERTS)},
            "expected A [2r, in] and B [2·out/3",
        ),
    ],
)
def test_loras_of_other_shapes_are_refused(edit, wanted, tmp_path, capsys):
    assert convert("adamix", edited(loras(), **edit), tmp_path, "--alpha", "4") == 1
    assert wanted in capsys.readouterr().err
