"""t-few's ``finish.pt``: blocks of what is made of it compute what its own modules compute."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.adapters_store.native_blocks import TOLERANCE, compare, compiled
from tests.server.convert.models import save
from tests.support.backbones import build
from weft.server import cli

WIDTH, INNER, KV = 32, 48, 16
Tensors = dict[str, Tensor]


def noise(*shape: int, around: float = 0.0) -> Tensor:
    """Seeded by the shape."""
    return around + 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_layer(make: Callable[[str], Tensors]) -> Tensors:
    """The tensors of both layers of the tiny llama."""
    return {name: t for layer in range(2) for name, t in make(f"model.layers.{layer}").items()}


def scales(layer: str) -> Tensors:
    """``multi_lora_b`` on keys, values and up; ``multi_lora_a`` on down, where that is trained."""
    shapes = {"self_attn.k_proj": KV, "self_attn.v_proj": KV, "mlp.up_proj": INNER}
    made = {f"{layer}.{name}.multi_lora_b": noise(size, 1, around=1.0) for name, size in shapes.items()}
    return {**made, f"{layer}.mlp.down_proj.multi_lora_a": noise(1, INNER, around=1.0)}


def pairs(layer: str) -> Tensors:
    """Two ranks."""
    made: Tensors = {}
    for name, tall, rank in (("q_proj", WIDTH, 4), ("v_proj", KV, 2)):
        made |= {f"{layer}.self_attn.{name}.lora_a": noise(rank, WIDTH)}
        made |= {f"{layer}.self_attn.{name}.lora_b": noise(tall, rank)}
    return made


def biases(layer: str) -> Tensors:
    """Biases of linears and weights of norms, as ``configs/bitfit.json`` has them trained."""
    shapes = {"self_attn.q_proj": WIDTH, "self_attn.k_proj": KV, "mlp.up_proj": INNER}
    made = {f"{layer}.{name}.bias": noise(size) for name, size in shapes.items()}
    return {**made, f"{layer}.input_layernorm.weight": noise(WIDTH, around=1.0)}


def of_gpt2() -> Tensors:
    """A model whose linears and norms have biases already."""
    layer = "transformer.h.0"
    return {
        f"{layer}.attn.c_attn.bias": noise(3 * WIDTH),
        f"{layer}.ln_1.weight": noise(WIDTH, around=1.0),
        f"{layer}.ln_1.bias": noise(WIDTH),
    }


class Scaled(nn.Module):
    """``LoRALinear.forward`` with lora_rank 0 and lora_scaling_rank 1, ``src/models/lora.py``."""

    def __init__(self, linear: nn.Linear, role: str, vector: Tensor) -> None:
        super().__init__()
        self.linear, self.role, self.vector = linear, role, vector.flatten()

    def forward(self, x: Tensor) -> Tensor:
        if self.role == "multi_lora_a":
            x = x * self.vector
        y: Tensor = nn.functional.linear(x, self.linear.weight, self.linear.bias)
        return y * self.vector if self.role == "multi_lora_b" else y


def trained(family: str, tensors: Tensors) -> PreTrainedModel:
    """The model as t-few has it with these parameters loaded."""
    model = build(family)
    with torch.no_grad():
        for name, tensor in tensors.items():
            path, _, role = name.rpartition(".")
            module = model.get_submodule(path)
            if role.startswith("multi"):
                assert isinstance(module, nn.Linear)
                model.set_submodule(path, Scaled(module, role, tensor))
                continue
            weight = module.weight
            assert isinstance(weight, Tensor)
            if role == "lora_b":
                a = tensors[f"{path}.lora_a"]
                weight.add_(tensor @ a / len(a))
            elif role == "bias":
                module.bias = nn.Parameter(tensor.clone())
            elif role == "weight":
                weight.copy_(tensor)
    return model


def convert(tensors: object, folder: Path, *words: str) -> int:
    """Save and convert."""
    torch.save(tensors, folder / "finish.pt")
    return cli.main(["convert", "t-few", str(folder / "finish.pt"), str(folder / "out"), *words])


FILES: dict[str, tuple[str, Callable[[], Tensors]]] = {
    "ia3": ("llama", lambda: by_layer(scales)),
    "lora": ("llama", lambda: by_layer(pairs)),
    "bitfit": ("llama", lambda: by_layer(biases)),
    "biased": ("gpt2", of_gpt2),
    "lora and norms": (
        "llama",
        lambda: by_layer(lambda at: {**pairs(at), f"{at}.input_layernorm.weight": noise(WIDTH)}),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_made_computes_the_same(kind, tmp_path):
    family, make = FILES[kind]
    tensors = make()
    # the name of the base model may be missing
    saved = {name.removeprefix("model."): t for name, t in tensors.items()}
    assert convert(saved, tmp_path, "--base", str(save(build(family), tmp_path / "base"))) == 0
    found = compare(compiled(family, tmp_path / "out"), trained(family, tensors))
    assert found.error <= TOLERANCE
    assert found.change >= 100 * TOLERANCE
    assert found.changed == {name.rpartition(".")[0] for name in tensors}


Q = "model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[object, str]] = {
    "a stranger": ({f"{Q}.adapter": noise(2)}, f"{Q}.adapter: expected a name that ends in bias, lora_a"),
    "half a pair": ({f"{Q}.lora_a": noise(2, WIDTH)}, f"{Q}.lora_b: expected this tensor, got none"),
    "a product": ({f"{Q}.multi_lora_b": noise(WIDTH, 2)}, "expected a vector: lora_scaling_rank 1, got shape [32, 2]"),
    "both vectors": (
        {f"{Q}.multi_lora_a": noise(1, WIDTH), f"{Q}.multi_lora_b": noise(WIDTH, 1)},
        "expected multi_lora_a or multi_lora_b at a linear, got both",
    ),
    "scaled and added": (
        {f"{Q}.multi_lora_b": noise(WIDTH, 1), f"{Q}.lora_a": noise(2, WIDTH), f"{Q}.lora_b": noise(WIDTH, 2)},
        "expected (IA)³ or LoRA at a linear, got both",
    ),
    "no base": ({f"{Q}.bias": noise(WIDTH)}, "base: expected the folder of the backbone (--base), got none"),
    "whole weights": ({f"{Q}.weight": noise(WIDTH, WIDTH)}, f"{Q}.weight: expected a norm's weight"),
}


@pytest.mark.parametrize("kind", BAD)
def test_other_files_are_refused(kind, tmp_path, capsys):
    tensors, words = BAD[kind]
    assert convert(tensors, tmp_path) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
