"""Methods that peft does not train, as the demonstration trains them: parameters, hooks that apply them, and files.

Each is a few lines of plain torch over a frozen llama. What is written are weft's own formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

PREFIX = "base_model.model."

Fisher = Mapping[str, Tensor]


class Method(nn.Module, ABC):
    """A frozen model with a method's parameters on it; calls go to the model, hooks do the rest."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.own = nn.ParameterDict()
        # a parameter's name may hold no dot: the name it is saved under, by the name it has here
        self.names: dict[str, str] = {}

    def forward(self, **inputs: Any) -> Any:
        """What the model says with the method at work."""
        return self.model(**inputs)

    def add(self, name: str, value: Tensor) -> nn.Parameter:
        """A trained tensor, saved under this name."""
        key = name.replace(".", "/")
        parameter = nn.Parameter(value)
        self.own[key], self.names[key] = parameter, name
        return parameter

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The config beside what every file of the format says."""

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {f"{PREFIX}{self.names[key]}": value.detach().contiguous() for key, value in self.own.items()}

    def linears(self) -> list[tuple[str, nn.Linear]]:
        """Those of the decoder layers, by path."""
        named = self.model.model.named_modules()
        return [(f"model.{name}", module) for name, module in named if isinstance(module, nn.Linear)]

    def sublayers(self) -> list[tuple[str, nn.Module]]:
        """Attention and feed-forward part of every layer, under the names of our formats."""
        found: list[tuple[str, nn.Module]] = []
        for index, layer in enumerate(self.model.model.layers):
            found += [(f"model.layers.{index}.attention", layer.self_attn), (f"model.layers.{index}.mlp", layer.mlp)]
        return found


def on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let a function change a module's output, or the first of several."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    module.register_forward_hook(hook)


def on_linear(module: nn.Module, extra: Callable[[Tensor], Tensor]) -> None:
    """Add a function of a linear's input to its output."""
    module.register_forward_hook(lambda _, inputs, output: output + extra(inputs[0]))


def _plus(bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: y + bias


def _times(scale: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: y * scale


def _bottleneck(down: Tensor, bend: Tensor, up: Tensor, shift: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h: h + F.linear(F.relu(F.linear(h, down, bend)), up, shift)


def _between(down: Callable[[], Tensor], up: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h: h + F.gelu(h @ down(), approximate="tanh") @ up()


class Houlsby(Method):
    """A bottleneck behind attention and feed-forward part: h + relu(h downᵀ + b) upᵀ + c."""

    WIDTH = 16

    def __init__(self, model: LlamaForCausalLM, _: Fisher) -> None:
        super().__init__(model)
        size = model.config.hidden_size
        for place, module in self.sublayers():
            down = self.add(f"{place}.down.weight", torch.randn(self.WIDTH, size) * size**-0.5)
            bend = self.add(f"{place}.down.bias", torch.zeros(self.WIDTH))
            up = self.add(f"{place}.up.weight", torch.zeros(size, self.WIDTH))
            shift = self.add(f"{place}.up.bias", torch.zeros(size))
            on_output(module, _bottleneck(down, bend, up, shift))

    def settings(self) -> dict[str, Any]:
        return {"peft_type": "X_BOTTLENECK", "tap": "h", "act": "relu", "scale": 1.0}


class Compacter(Method):
    """Houlsby's places, both maps sums of Kronecker products of a shared rule with factors of rank one."""

    WIDTH, TERMS = 32, 4

    def __init__(self, model: LlamaForCausalLM, _: Fisher) -> None:
        super().__init__(model)
        size = model.config.hidden_size
        for place, module in self.sublayers():
            down = self._map(f"{place}.down", size, self.WIDTH, 1.0)
            up = self._map(f"{place}.up", self.WIDTH, size, 0.1)
            on_output(module, _between(down, up))

    def _map(self, name: str, wide: int, tall: int, size: float) -> Callable[[], Tensor]:
        n = self.TERMS
        rule = self.add(f"{name}.phm.rule", torch.randn(n, n, n) * 0.5)
        left = self.add(f"{name}.phm.left", torch.randn(n, wide // n, 1) * (wide / n) ** -0.5)
        right = self.add(f"{name}.phm.right", torch.randn(n, 1, tall // n) * size)
        return lambda: torch.stack([torch.kron(s, m) for s, m in zip(rule, left @ right, strict=True)]).sum(0)

    def settings(self) -> dict[str, Any]:
        return {"peft_type": "X_BOTTLENECK", "tap": "h", "act": "gelu_tanh", "scale": 1.0}


class BitFit(Method):
    """A bias at every linear."""

    def __init__(self, model: LlamaForCausalLM, _: Fisher) -> None:
        super().__init__(model)
        for path, module in self.linears():
            bias = self.add(f"{path}.bias_delta", torch.zeros(module.out_features))
            on_output(module, _plus(bias))

    def settings(self) -> dict[str, Any]:
        return {"peft_type": "X_BITFIT"}


class DiffFit(Method):
    """A scale on what every sublayer adds, and biases."""

    def __init__(self, model: LlamaForCausalLM, _: Fisher) -> None:
        super().__init__(model)
        for path, module in self.linears():
            bias = self.add(f"{path}.bias_delta", torch.zeros(module.out_features))
            on_output(module, _plus(bias))
        for place, sublayer in self.sublayers():
            layer, after = place.rsplit(".", 1)
            name = {"attention": "gamma_attn", "mlp": "gamma_mlp"}[after]
            scale = self.add(f"{layer}.{name}", torch.ones(model.config.hidden_size))
            on_output(sublayer, _times(scale))

    def settings(self) -> dict[str, Any]:
        return {"peft_type": "X_DIFFFIT"}


class FishMask(Method):
    """The weights that matter most for the task, by their squared gradients, each with a change of its own."""

    SHARE = 0.04

    def __init__(self, model: LlamaForCausalLM, fisher: Fisher) -> None:
        super().__init__(model)
        self._index: dict[str, Tensor] = {}
        for path, module in self.linears():
            scores = fisher[f"{path}.weight"].flatten()
            index = scores.topk(int(self.SHARE * scores.numel())).indices.sort().values
            self._index[f"{PREFIX}{path}.weight.sparse_indices"] = index.int()
            values = self.add(f"{path}.weight.sparse_values", torch.zeros(len(index)))
            on_linear(module, _sparse(module, index, values))

    def settings(self) -> dict[str, Any]:
        return {"peft_type": "X_SPARSE", "density": self.SHARE}

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self._index


def _sparse(module: nn.Linear, index: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    zeros = torch.zeros(module.weight.numel())
    return lambda x: F.linear(x, zeros.index_put((index,), values).view_as(module.weight))


class Far(Method):
    """The outputs of the feed-forward parts that matter most, each with new weights."""

    SHARE = 0.12

    def __init__(self, model: LlamaForCausalLM, fisher: Fisher) -> None:
        super().__init__(model)
        self._index: dict[str, Tensor] = {}
        for path, module in self.linears():
            if ".mlp." not in path:
                continue
            scores = fisher[f"{path}.weight"].sum(dim=1)
            index = scores.topk(max(1, int(self.SHARE * len(scores)))).indices.sort().values
            self._index[f"{PREFIX}{path}.row_indices"] = index.int()
            rows = self.add(f"{path}.rows_delta", torch.zeros(len(index), module.in_features))
            on_linear(module, _rows(module, index, rows))

    def settings(self) -> dict[str, Any]:
        return {"peft_type": "X_ROWS", "axis": "out"}

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self._index


def _rows(module: nn.Linear, index: Tensor, rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros(*x.shape[:-1], module.out_features).index_copy(-1, index, F.linear(x, rows))
