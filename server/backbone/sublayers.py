"""Hidden places: where a decoder layer's sublayers join the residual stream, found by numbers, and the hooks there.

For a layer from x0 to x2, the module whose output h satisfies x0 + h = x1, x1 being what a later module reads, ends the
attention's sublayer; the one with x1 + h = x2 ends the other. Layers that do not add up so have no hidden places.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weft.adapters_store.parts import ATTENTION, MLP, TAPS
from weft.server.backbone.recording import Call, first_of, rows_of, same
from weft.server.backbone.step import Step, active


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor that a module is given: by position or name."""

    path: str
    name: int | str

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The tensor in a call of the module."""
        value: Tensor = args[self.name] if isinstance(self.name, int) else kwargs[self.name]
        return value


@dataclass(frozen=True, slots=True)
class HiddenPlace:
    """A place behind a sublayer.

    path:      the module whose output, or the first of several, joins the residual stream
    residual:  who is given the residual stream before that
    norm:      the norm between that stream and the sublayer, if there is one
    """

    layer: int
    after: str
    features: int
    path: str
    residual: Argument
    norm: str | None

    @property
    def taps(self) -> tuple[str, ...]:
        """Which of ``parts.TAPS`` there are here."""
        return TAPS if self.norm is not None else tuple(tap for tap in TAPS if tap != "ln_x")


@dataclass(frozen=True)
class Pass:
    """A recorded pass over so many tokens, and the paths of the norms in it."""

    calls: Sequence[Call]
    tokens: int
    norms: frozenset[str]

    def once(self) -> frozenset[str]:
        """Modules that ran once: a hook on any other would act in places that were not meant."""
        counts = Counter(call.path for call in self.calls)
        return frozenset(path for path, count in counts.items() if count == 1)


def find(watched: Pass, layers: Sequence[str], attentions: Sequence[str]) -> tuple[HiddenPlace, ...]:
    """The hidden places of these decoder layers, two or none for each; ``attentions`` are the modules that attend."""
    once = watched.once()
    by_path = {call.path: call for call in watched.calls if call.path in once}
    places: list[HiddenPlace] = []
    for index, (path, attention) in enumerate(zip(layers, attentions, strict=True)):
        if path in by_path and attention in by_path:
            inner = [call for call in by_path.values() if call.within(by_path[path])]
            places += _Layer(index, by_path[path], inner, watched).places(by_path[attention])
    return tuple(places)


class _Layer:
    """One decoder layer's call and those that it made."""

    def __init__(self, index: int, call: Call, inner: Sequence[Call], watched: Pass):
        self._index, self._call, self._inner, self._norms = index, call, inner, watched.norms
        self._tokens = watched.tokens
        self._features = 0 if call.output is None else call.output.shape[-1]

    def places(self, attention: Call) -> list[HiddenPlace]:
        """Both places, or none."""
        x0 = next((x for x in map(self._rows, self._call.inputs.values()) if x is not None), None)
        x2 = self._rows(self._call.output)
        if x0 is None or x2 is None:
            return []
        for end in sorted(self._inner, key=lambda call: -call.finished):
            h = self._rows(end.output)
            if h is None or end.finished < attention.finished:
                continue
            x1 = x0 + h
            later = [call for call in self._inner if call.started > end.finished and self._reads(call, x1)]
            # h = 0 proves nothing
            last = None if same(x1, x0) or not later else self._last(x1, x2, end)
            if last is not None:
                found = self._place(ATTENTION, end, x0, [*self._inner, self._call], 0)
                other = self._place(MLP, last, x1, later, end.finished)
                return [found, other] if found is not None and other is not None else []
        return []

    def _last(self, x1: Tensor, x2: Tensor, before: Call) -> Call | None:
        """The last module to finish whose output leads from x1 to x2."""
        for call in sorted(self._inner, key=lambda call: -call.finished):
            h = self._rows(call.output)
            if call.started > before.finished and h is not None and same(x1 + h, x2) and not same(x1, x2):
                return call
        return None

    def _place(self, after: str, end: Call, x_res: Tensor, readers: Sequence[Call], since: int) -> HiddenPlace | None:
        readers = [call for call in readers if since <= call.started < end.finished and self._reads(call, x_res)]
        if not readers:
            return None
        normed = [call for call in readers if call.path in self._norms and self._feeds(call, end)]
        norm = normed[0] if len(normed) == 1 else None
        reader = norm or readers[0]
        name = next(name for name, x in reader.inputs.items() if same(self._rows(x), x_res))
        path = None if norm is None else norm.path
        return HiddenPlace(self._index, after, self._features, end.path, Argument(reader.path, name), path)

    def _feeds(self, norm: Call, end: Call) -> bool:
        """Whether what the norm makes goes into the sublayer that this module ends."""
        made = self._rows(norm.output)
        inside = (call for call in self._inner if norm.finished < call.started and call.finished <= end.finished)
        return made is not None and any(self._reads(call, made) for call in inside)

    def _reads(self, call: Call, rows: Tensor) -> bool:
        return any(same(self._rows(x), rows) for x in call.inputs.values())

    def _rows(self, tensor: Tensor | None) -> Tensor | None:
        return rows_of(tensor, self._tokens, self._features)


class Sublayer:
    """The hooks of one hidden place: two take notes on the way, the last lets the adapters act."""

    def __init__(self, place: HiddenPlace, index: int):
        self._place, self._index = place, index
        self._x_res: Tensor | None = None
        self._ln_x: Tensor | None = None

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hooks."""
        place = self._place
        reader = model.get_submodule(place.residual.path)
        yield reader.register_forward_pre_hook(self._note_residual, with_kwargs=True)
        if place.norm is not None:
            yield model.get_submodule(place.norm).register_forward_hook(self._note_normed)
        yield model.get_submodule(place.path).register_forward_hook(self._join)

    def _touched(self) -> Step | None:
        """The step, if any of its rows has an adapter that acts here."""
        step = active()
        if step.rows is None or step.kernels is None or not step.kernels.touches_hidden(step.rows, self._index):
            return None
        return step

    def _note_residual(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._touched() is not None:
            self._x_res = self._place.residual.of(args, kwargs)

    def _note_normed(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        if self._touched() is not None:
            self._ln_x = output

    def _join(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        step = self._touched()
        if step is None:
            return None
        h = first_of(output)
        assert h is not None
        assert step.rows is not None
        assert step.kernels is not None
        # others may hold the module's own output: linears that were computed together do
        h = h.clone(memory_format=torch.contiguous_format)
        width = self._place.features
        x_res, ln_x = (None if x is None else x.reshape(-1, width) for x in (self._x_res, self._ln_x))
        step.kernels.hidden(h.view(-1, width), x_res, ln_x, step.rows, self._index)
        self._x_res = self._ln_x = None
        return h if isinstance(output, Tensor) else (h, *output[1:])
