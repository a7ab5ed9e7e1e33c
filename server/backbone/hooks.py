"""The hooks at a model's places: registered while a step's adapters act there, so that no other step pays for them."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from weft.kernels.batch import Rows
from weft.kernels.dispatch import Kernels
from weft.kernels.extras import Kind
from weft.server.backbone import embedding
from weft.server.backbone.experts import ExpertsHook
from weft.server.backbone.norms import NormHook
from weft.server.backbone.places import Places
from weft.server.backbone.side import Networks, SideHook
from weft.server.backbone.step import Step, active
from weft.server.backbone.sublayers import Argument, Sublayer

# where a prefix has its gate, among its pieces
GATE = 2

# norms, hidden places, attention inputs, experts, networks beside, the embedding: whether the hooks of each are wanted
Wanted = tuple[bool, bool, bool, bool, bool, bool]
NOTHING = (False, False, False, False, False, False)


class Hook(Protocol):
    """What acts at one place."""

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hook, or several."""
        ...


class Hooks:
    """The hooks of one model; asked once per step which it needs."""

    def __init__(self, model: nn.Module, places: Places, networks: Networks):
        self._model, self._places = model, places
        self._side = [SideHook(networks)]
        self._norms = [NormHook(place, i) for i, place in enumerate(places.norms)]
        self._sublayers = [Sublayer(place, i) for i, place in enumerate(places.hidden)]
        self._inputs = [_Keeper(layer, at) for layer, at in enumerate(places.inputs) if at is not None]
        self._experts = [ExpertsHook(place, i) for i, place in enumerate(places.experts)]
        self._handles: list[RemovableHandle] = []
        self._attached: Wanted = NOTHING
        self._known: tuple[Rows | None, Wanted] = (None, NOTHING)

    def prepare(self, step: Step) -> None:
        """Register what this step's adapters need, and nothing else."""
        rows, kernels = step.rows, step.kernels
        if rows is None or kernels is None:
            wanted: Wanted = NOTHING
        else:
            if rows is not self._known[0]:
                self._known = (rows, self._wanted(rows, kernels))
            wanted = (*self._known[1][:5], self._places.embedding is not None and embedding.wanted(step))
        if wanted != self._attached:
            for handle in self._handles:
                handle.remove()
            self._handles = list(self._attach(wanted))
            self._attached = wanted

    def _wanted(self, rows: Rows, kernels: Kernels) -> Wanted:
        return (
            any(kernels.has(rows, Kind.NORM, i) for i in range(len(self._norms))),
            any(kernels.touches_hidden(rows, i) for i in range(len(self._sublayers))),
            any(keeper.wanted(rows, kernels) for keeper in self._inputs),
            any(kernels.has(rows, Kind.EXPERTS, i) for i in range(len(self._experts))),
            kernels.has(rows, Kind.SIDE, 0),
            False,
        )

    def _attach(self, wanted: Wanted) -> Iterator[RemovableHandle]:
        # a norm's own hook comes before those that read what it makes
        groups: tuple[Sequence[Hook], ...] = (self._norms, self._sublayers, self._inputs, self._experts, self._side)
        for hooks, needed in zip(groups, wanted[:5], strict=True):
            for hook in hooks if needed else ():
                yield from hook.attach(self._model)
        if wanted[5]:
            assert self._places.embedding is not None
            yield self._model.get_submodule(self._places.embedding.path).register_forward_hook(embedding.override)


class _Keeper:
    """Keeps an attention's input in the step while a row's prefix has a gate on it."""

    def __init__(self, layer: int, argument: Argument):
        self._layer, self._argument = layer, argument

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hook."""
        module = model.get_submodule(self._argument.path)
        yield module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def wanted(self, rows: Rows, kernels: Kernels) -> bool:
        """Whether any row's prefix has a gate at this layer."""
        if not kernels.has(rows, Kind.PREFIX, self._layer):
            return False
        return any(carried.pieces[GATE] is not None for carried in kernels.carried(rows, Kind.PREFIX, self._layer))

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = active()
        if step.rows is not None and step.kernels is not None and self.wanted(step.rows, step.kernels):
            x = self._argument.of(args, kwargs)
            step.attention_inputs[self._layer] = x.reshape(-1, x.shape[-1])
