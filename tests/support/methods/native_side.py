"""Weft's own X_LST: a plain model, and beside it a plain narrow one whose layers are called one by one, in fp64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
)

from tests.support.backbones import COMMON, build
from tests.support.methods.case import ALL, GEMMA, GPT2, LLAMA, Case, Oracle
from tests.support.methods.native_files import Tensors, drawing, read, write
from tests.support.methods.native_hooks import layer_paths

TEMPERATURE = 0.5
WIDTH, WINDOW = 32, 8
# the list of layers, and the norm behind it
PATHS = {LLAMA: ("layers", "norm"), GPT2: ("h", "ln_f"), GEMMA: ("layers", "norm")}


def narrow_model(family: str, reduction: int, layers: Sequence[int]) -> PreTrainedModel:
    """What ``tests.support.backbones`` builds, at a smaller width and of these layers, written out."""
    r, count = reduction, len(layers)
    own: dict[str, Any] = {**COMMON, "hidden_size": WIDTH // r, "intermediate_size": 48 // r}
    own |= {"num_hidden_layers": count, "attn_implementation": "eager"}
    kinds = ["full_attention" if layer == 1 else "sliding_attention" for layer in layers]
    model: PreTrainedModel
    if family == LLAMA:
        model = LlamaModel(LlamaConfig(**own, head_dim=8 // r))
    elif family == GPT2:
        config = GPT2Config(vocab_size=101, n_embd=WIDTH // r, n_layer=count, n_head=4, n_positions=256)
        config._attn_implementation = "eager"
        model = GPT2Model(config)
    else:
        model = Gemma3TextModel(Gemma3TextConfig(**own, head_dim=16 // r, sliding_window=WINDOW, layer_types=kinds))
    model.eval()
    return model


def make(layers_of: Callable[[int], list[int]], reduction: int) -> Callable[[str, Path, int], Path]:
    """Writes the files; ``layers_of``: how many layers there are → those that are read."""

    def write_files(family: str, folder: Path, seed: int) -> Path:
        draw, narrow = drawing(seed), WIDTH // reduction
        layers = layers_of(len(layer_paths(family, build(family))))
        model, (listed, norm) = narrow_model(family, reduction, layers), PATHS[family]
        tensors: Tensors = {
            "first_down.weight": draw(narrow, WIDTH),
            "first_down.bias": draw(narrow),
            "up.weight": draw(WIDTH, narrow, scale=2.0),
            "up.bias": draw(WIDTH),
        }
        for name, parameter in model.get_submodule(norm).named_parameters():
            tensors[f"final_norm.{name}"] = draw(*parameter.shape, around=1.0)
        for index, layer in enumerate(layers):
            tensors |= {f"down.{layer}.weight": draw(narrow, WIDTH), f"down.{layer}.bias": draw(narrow)}
            tensors[f"gate_alpha.{layer}"] = draw(*([1] * (index % 2)))
            for name, parameter in model.get_submodule(f"{listed}.{index}").named_parameters():
                around = 1.0 if name.endswith("weight") and ("norm" in name or "ln_" in name) else 0.0
                tensors[f"block.{layer}.{name}"] = draw(*parameter.shape, around=around)
        named = {f"side.{name}": tensor for name, tensor in tensors.items()}
        said = {"reduction": reduction, "layers": layers, "gate_temperature": TEMPERATURE}
        return write(folder, "X_LST", named, **said, residual_after=False, merge_last=False)

    return write_files


@dataclass(frozen=True)
class BesidePass:
    """Both models over a whole text."""

    family: str
    model: PreTrainedModel
    narrow: PreTrainedModel
    layers: list[int]
    tensors: Tensors

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Those that precede each of the tokens."""
        entered, left = self._seen([*prompt, *tokens])
        t = self.tensors
        listed, norm = (self.narrow.get_submodule(path) for path in PATHS[self.family])
        assert isinstance(listed, nn.ModuleList)
        z = F.linear(entered, t["first_down.weight"], t["first_down.bias"])
        for index, (block, layer) in enumerate(zip(listed, self.layers, strict=True)):
            gate = torch.sigmoid(t[f"gate_alpha.{layer}"].reshape(()) / TEMPERATURE)
            read_off = F.linear(left[layer], t[f"down.{layer}.weight"], t[f"down.{layer}.bias"])
            z = self._through(index, block, gate * z + (1 - gate) * read_off)
        hidden = F.linear(norm(z), t["up.weight"], t["up.bias"]) * WIDTH**-0.5
        head = self.model.get_output_embeddings()
        start = len(prompt) - 1
        found: Tensor = head(hidden)[0, start : start + len(tokens)]
        return found.float()

    def _seen(self, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
        """What the first layer of the plain model is given, and what each makes, [1, tokens, d]."""
        entered: list[Tensor] = []
        left: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            entered.append(args[0])

        def after(_: nn.Module, args: Any, output: Any) -> None:
            left.append(output[0] if isinstance(output, tuple) else output)

        layers = [self.model.get_submodule(path) for path in layer_paths(self.family, self.model)]
        hooks = [layers[0].register_forward_pre_hook(before)]
        hooks += [layer.register_forward_hook(after) for layer in layers]
        self.model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return entered[0], left

    def _through(self, index: int, block: nn.Module, z: Tensor) -> Tensor:
        """One narrow layer, told by hand where tokens stand and what they must not see."""
        count = z.shape[1]
        at = torch.arange(count)
        distance = at[:, None] - at[None]
        hidden = distance < 0
        kind = self.narrow.config.layer_types[index] if self.family == GEMMA else None
        if kind == "sliding_attention":
            hidden = hidden | (distance >= WINDOW)
        mask = torch.zeros(1, 1, count, count, dtype=z.dtype).masked_fill(hidden, float("-inf"))
        if self.family == GPT2:
            made = block(z, attention_mask=mask)
        else:
            rope = self.narrow.get_submodule("rotary_emb")
            turned = rope(z, at[None]) if self.family == LLAMA else rope(z, at[None], kind)
            made = block(z, position_embeddings=turned, attention_mask=mask)
        found: Tensor = made[0] if isinstance(made, tuple) else made
        return found


def oracle(family: str, folder: Path) -> Oracle:
    """Reads the files back into the narrow model."""
    config, named = read(folder)
    tensors = {name.removeprefix("side."): tensor.double() for name, tensor in named.items()}
    layers: list[int] = config["layers"]
    narrow, (listed, norm) = narrow_model(family, config["reduction"], layers).double(), PATHS[family]
    with torch.no_grad():
        for name, parameter in narrow.get_submodule(norm).named_parameters():
            parameter.copy_(tensors[f"final_norm.{name}"])
        for index, layer in enumerate(layers):
            for name, parameter in narrow.get_submodule(f"{listed}.{index}").named_parameters():
                parameter.copy_(tensors[f"block.{layer}.{name}"])
    model = build(family).double()
    for parameter in (*model.parameters(), *narrow.parameters()):
        parameter.requires_grad_(False)
    return BesidePass(family, model, narrow, layers, tensors)


def _all(count: int) -> list[int]:
    return list(range(count))


def _last(count: int) -> list[int]:
    return [count - 1]


CASES: Sequence[Case] = (
    Case("lst", make(_all, 2), oracle, ALL),
    Case("lst_last_layer", make(_last, 4), oracle, ALL),
)
