"""Record one forward pass: which modules ran, in which order, on what and to what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Call:
    """One call of a module. Times count starts and ends of calls; tensors are copies.

    inputs:  by position or name; arguments that are no tensors are left out
    output:  of several, the first; None if that is no tensor
    """

    path: str
    module: nn.Module
    started: int
    finished: int = 0
    inputs: Mapping[int | str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None

    def within(self, other: "Call") -> bool:
        """Whether the other call made this one."""
        return other.started < self.started and self.finished < other.finished


def record(model: nn.Module, forward: Callable[[], Any]) -> list[Call]:
    """Run ``forward`` and return all calls of the model's modules in the order in which they began."""
    names = {module: name for name, module in model.named_modules()}
    calls: list[Call] = []
    open_calls: list[Call] = []
    time = iter(range(1 << 30))

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        inputs = {at: value.clone() for at, value in given if isinstance(value, Tensor)}
        call = Call(names[module], module, next(time), inputs=inputs)
        calls.append(call)
        open_calls.append(call)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = open_calls.pop()
        assert call.module is module
        first = first_of(output)
        call.finished, call.output = next(time), None if first is None else first.clone()

    hooks = [module.register_forward_pre_hook(begin, with_kwargs=True) for module in names]
    hooks += [module.register_forward_hook(end) for module in names]
    try:
        with torch.inference_mode():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def first_of(output: Any) -> Tensor | None:
    """The tensor that a module returns, or the first of several; None if that is no tensor."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def rows_of(tensor: Tensor | None, tokens: int, features: int | None = None) -> Tensor | None:
    """[tokens, features] of a tensor that holds one row per token, in order, of any width or this one; else None."""
    if tensor is None or not tensor.is_floating_point() or tensor.dim() not in (2, 3):
        return None
    wide = tensor.shape[-1] if features is None else features
    fits = tensor.shape in ((tokens, wide), (1, tokens, wide))
    return tensor.reshape(tokens, wide) if fits else None


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are tensors, equal bit for bit."""
    return a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
