"""Norms: which of a model's modules are one, proven on numbers, and the hook that gives rows their adapters' own.

A module counts as a norm if it computes ((x − mean) · rsqrt(var + eps)) · (offset + weight) + bias, with the mean taken
off or not, and sees every token of a pass. What computes anything else is no place for an override.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from weft.kernels.extras import Kind
from weft.kernels.norms import Norm, normed
from weft.server.backbone.recording import Call
from weft.server.backbone.step import active

# the largest number that can be an epsilon
EPSILON_MAX = 0.01
# in fp32, of the largest output
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class NormForm:
    """How a norm computes: see ``kernels.norms.Norm``."""

    centred: bool
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class NormPlace:
    """A norm that every token passes.

    token_dim:  where the tokens lie in its input: 0 of [tokens, d], 1 of [1, tokens, .., d], 2 of [1, heads, tokens, d]
    """

    path: str
    features: int
    form: NormForm
    token_dim: int


def find(calls: Sequence[Call], tokens: int) -> tuple[NormPlace, ...]:
    """The norms of a recorded pass over so many tokens, in the order in which they ran."""
    by_module: dict[nn.Module, list[Call]] = {}
    for call in calls:
        by_module.setdefault(call.module, []).append(call)
    found = []
    for module, its_calls in by_module.items():
        weight = getattr(module, "weight", None)
        dims = {_token_dim(call, tokens) for call in its_calls}
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or len(dims) > 1:
            continue
        dim = dims.pop()
        form = None if dim is None else form_of(module, its_calls[0].inputs[0])
        if dim is not None and form is not None:
            found.append(NormPlace(its_calls[0].path, weight.numel(), form, dim))
    return tuple(found)


def _token_dim(call: Call, tokens: int) -> int | None:
    """Where the tokens lie in the one tensor that the module was given; None if it does not hold them all."""
    if list(call.inputs) != [0]:
        return None
    shape = tuple(call.inputs[0].shape)
    if len(shape) == 2 and shape[0] == tokens:
        return 0
    if len(shape) in (3, 4) and shape[0] == 1:
        return next((dim for dim in range(1, len(shape) - 1) if shape[dim] == tokens), None)
    return None


def form_of(module: nn.Module, like: Tensor) -> NormForm | None:
    """Try the module in fp32 on random numbers, shaped like those it was given; None if it fits no form.

    Rows are of several sizes, one near the epsilon's, and lie off zero, so that every part of a form shows.
    """
    parameters = {name: parameter.float() for name, parameter in module.named_parameters()}
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or set(parameters) - {"weight", "bias"} or weight.shape != like.shape[-1:]:
        return None
    for eps in _epsilons(module):
        x = _trial(like, eps)
        with torch.inference_mode():
            got = functional_call(module, parameters, (x,))
            for centred, offset in product((False, True), (0.0, 1.0)):
                want = normed(x, Norm(weight, bias, eps, centred, offset)) * (offset + weight)
                want = want if bias is None else want + bias
                if _close(got, want):
                    return NormForm(centred, eps, offset)
    return None


def _epsilons(module: nn.Module) -> Iterator[float]:
    """Numbers among the module's attributes that can be an epsilon, whatever they are called."""
    yield from {value for value in vars(module).values() if isinstance(value, float) and 0 < value <= EPSILON_MAX}


def _trial(like: Tensor, eps: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape, generator=generator) + 0.5
    sizes = torch.tensor([1.0, eps**0.5, 30.0]).repeat(-(-like.numel() // 3))[: like[..., :1].numel()]
    return (x * sizes.view(*like.shape[:-1], 1)).to(like.device)


def _close(got: Any, want: Tensor) -> bool:
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return False
    return bool((got.float() - want).abs().max() <= TOLERANCE * want.abs().max())


class NormHook:
    """Puts the adapters' norm, number ``index``, in the place of a module's own."""

    def __init__(self, place: NormPlace, index: int):
        self._place, self._index = place, index

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hook."""
        module, form = model.get_submodule(self._place.path), self._place.form
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        self._norm = Norm(weight, bias if isinstance(bias, Tensor) else None, form.eps, form.centred, form.offset)
        yield module.register_forward_hook(self._override)

    def _override(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        step, token_dim = active(), self._place.token_dim
        if step.rows is None or step.kernels is None or not step.kernels.has(step.rows, Kind.NORM, self._index):
            return
        out = by_token(output, token_dim)
        whole = out.contiguous()
        step.kernels.override_norm(whole, by_token(args[0], token_dim), step.rows, self._index, self._norm)
        if whole is not out:
            out.copy_(whole)


def by_token(tensor: Tensor, token_dim: int) -> Tensor:
    """A view [tokens, groups, d]."""
    if token_dim == 0:
        return tensor[:, None]
    if token_dim == 2:
        return tensor[0].transpose(0, 1)
    return tensor[0] if tensor.dim() == 4 else tensor[0][:, None]
