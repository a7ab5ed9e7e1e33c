"""Experts whose weights lie in two parameters of one module: which modules hold such, and a row's adapter inside them.

A module counts if it is called with what its tokens are, which experts each takes and how much of each, and computes
(act(x gate_upᵀ)) downᵀ of every expert, weighted and summed. That is proven on numbers that reach all experts, so that
what is computed again for the rows of an adapter is what the module would compute with other weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weft.adapters_store.sites import ExpertsInfo
from weft.kernels.batch import Segment
from weft.kernels.extras import Kind
from weft.kernels.parts import Carried, product
from weft.server.backbone.recording import Call
from weft.server.backbone.selftest import difference
from weft.server.backbone.step import active

# the parameters, in the order in which modules declare and apply them
PARAMETERS = ("gate_up_proj", "down_proj")

# by number of the parameter: factors [experts · r, in] and [experts · r, out]
Pairs = Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class ExpertsPlace:
    """A module of experts.

    transposed:  whether a parameter is [experts, in, out] instead of [experts, out, in]
    """

    path: str
    experts: int
    shapes: tuple[tuple[int, int], tuple[int, int]]
    transposed: bool

    @property
    def info(self) -> ExpertsInfo:
        """As a catalogue tells of it."""
        return ExpertsInfo(self.path, self.experts, tuple(zip(PARAMETERS, self.shapes, strict=True)))

    def weight(self, module: nn.Module, parameter: int, expert: int) -> Tensor:
        """[out, in] of one expert, a view."""
        found: Tensor = getattr(module, PARAMETERS[parameter])[expert]
        return found.T if self.transposed else found

    def compute(self, module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor, pairs: Pairs) -> Tensor:
        """What the module makes of x [rows, d], in fp32, with low-rank pairs added to its experts' weights.

        chosen, weights:  [rows, k], each row's experts and how much of each
        """
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted(set(chosen.flatten().tolist())):
            row, at = torch.where(chosen == expert)
            wide = self._linear(module, x[row], 0, expert, pairs)
            made = self._linear(module, _gated(module, wide), 1, expert, pairs)
            # an expert stands once among those of a row, so no sum depends on an order
            out.index_add_(0, row, made.float() * weights[row, at, None].float())
        return out

    def _linear(self, module: nn.Module, x: Tensor, parameter: int, expert: int, pairs: Pairs) -> Tensor:
        y = product(x, self.weight(module, parameter, expert))
        if parameter in pairs:
            a, b = (factor.view(self.experts, -1, factor.shape[1])[expert] for factor in pairs[parameter])
            y = y.float() + product(product(x, a).to(x.dtype), b.T).float()
        return y.to(x.dtype)


def _gated(module: nn.Module, wide: Tensor) -> Tensor:
    """Gates and ups as one [rows, 2 inner] to what goes down, as the module itself says it where it does."""
    own: Any = getattr(module, "_apply_gate", None)
    if callable(own):
        bent: Tensor = own(wide)
        return bent
    act: Any = module.act_fn
    gate, up = wide.chunk(2, dim=-1)
    made: Tensor = act(gate) * up
    return made


def find(calls: Sequence[Call], tokens: int) -> tuple[ExpertsPlace, ...]:
    """The places of a recorded pass over so many tokens, in the order in which they ran."""
    by_module: dict[nn.Module, list[Call]] = {}
    for call in calls:
        by_module.setdefault(call.module, []).append(call)
    candidates = ((its[0], _place(its[0], tokens)) for its in by_module.values() if len(its) == 1)
    return tuple(place for call, place in candidates if place is not None and _works(call, place))


def _place(call: Call, tokens: int) -> ExpertsPlace | None:
    """What the module's parameters and its one call look like; None if it is no module of experts."""
    parameters = dict(call.module.named_parameters())
    if tuple(parameters) != PARAMETERS or any(p.dim() != 3 for p in parameters.values()):
        return None
    transposed = bool(getattr(call.module, "is_transposed", False))
    up, down = (tuple(p.shape) if not transposed else (p.shape[0], p.shape[2], p.shape[1]) for p in parameters.values())
    if list(call.inputs) != [0, 1, 2] or call.output is None or up[0] != down[0] or up[0] < 2:
        return None
    x, chosen, weights = (call.inputs[i] for i in range(3))
    wide = (tokens, up[2])
    fits = x.shape == wide and call.output.shape == wide and down[1] == up[2] and up[1] == 2 * down[2]
    routed = chosen.dim() == 2 and chosen.shape[0] == tokens and weights.shape == chosen.shape
    if not fits or not routed or chosen.is_floating_point() or not weights.is_floating_point():
        return None
    return ExpertsPlace(call.path, up[0], ((up[1], up[2]), (down[1], down[2])), transposed)


def _works(call: Call, place: ExpertsPlace) -> bool:
    """Whether the module computes what ``compute`` does, on the call that was recorded and on one for all experts."""
    x, chosen, weights = (call.inputs[i] for i in range(3))
    assert call.output is not None
    count, every = chosen.shape[1], -(-place.experts // chosen.shape[1])
    generator = torch.Generator().manual_seed(0)
    trial = torch.randn(every, x.shape[1], generator=generator).to(x.device, x.dtype)
    listed = (torch.arange(every * count) % place.experts).view(every, count).to(chosen.device, chosen.dtype)
    shares = torch.rand(every, count, generator=generator).to(weights.device, weights.dtype)
    with torch.inference_mode():
        made: Tensor = call.module(trial, listed, shares)
        for given, output in (((x, chosen, weights), call.output), ((trial, listed, shares), made)):
            again = place.compute(call.module, *given, {})
            if difference(output.float(), again, x.dtype) is not None:
                return False
    return True


class ExpertsHook:
    """Computes the rows again whose adapters are inside the experts of a place, number ``index``."""

    def __init__(self, place: ExpertsPlace, index: int):
        self._place, self._index = place, index

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hook."""
        yield model.get_submodule(self._place.path).register_forward_hook(self._compute)

    def _compute(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        step = active()
        if step.rows is None or step.kernels is None:
            return
        for segment, pairs in _by_segment(step.kernels.carried(step.rows, Kind.EXPERTS, self._index)):
            own = slice(segment.start, segment.stop)
            x, chosen, weights = (given[own] for given in args)
            output[own] = self._place.compute(module, x, chosen, weights, pairs).to(output.dtype)


def _by_segment(carried: Sequence[Carried]) -> Iterator[tuple[Segment, Pairs]]:
    """The pairs of each segment by the number of their parameter."""
    found: dict[int, tuple[Segment, dict[int, tuple[Tensor, Tensor]]]] = {}
    for each in carried:
        a, b = each.pieces
        assert a is not None
        assert b is not None
        found.setdefault(each.segment.start, (each.segment, {}))[1][each.record.options[0]] = a, b
    yield from found.values()
