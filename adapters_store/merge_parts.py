"""Parts of several adapters as those of one: what adds up, stands in line, or may stand once. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from weft.adapters_store.errors import AdapterInvalid, expected
from weft.adapters_store.parts import (
    Bottleneck,
    EmbeddingEntries,
    EmbeddingPair,
    ExpertPair,
    KronSum,
    KVPrefix,
    Matrix,
    NormOverride,
    Part,
    RowOverride,
    SideNet,
    SoftPrompt,
    TokenMask,
)
from weft.adapters_store.tensor_refs import Computed, Value

if TYPE_CHECKING:
    from torch import Tensor

WORDS = {
    NormOverride: "an override of a norm",
    RowOverride: "an override of embedding rows",
    SoftPrompt: "a soft prompt",
    KVPrefix: "a prefix of keys and values",
    EmbeddingEntries: "a change of embedding entries",
    EmbeddingPair: "a scale of embeddings",
    Bottleneck: "a bottleneck",
    SideNet: "a side network",
    ExpertPair: "a pair inside experts",
}


class Parts:
    """Parts that have been put together so far, in the order of their adapters."""

    def __init__(self) -> None:
        self._found: list[tuple[str, Part]] = []
        # where in that list the part stands that has a place to itself
        self._at: dict[object, int] = {}
        self._masks: list[tuple[str, tuple[int, ...]]] = []

    def add(self, parts: Sequence[Part], label: str, weight: float) -> None:
        """Those of one more adapter. AdapterInvalid, with the names of both, where two cannot stand together."""
        self._masks.append((label, next((part.tokens for part in parts if isinstance(part, TokenMask)), ())))
        (first, mask), (_, its) = self._masks[0], self._masks[-1]
        if mask != its:
            why = "whatever acts from a token on composes with its like only"
            raise expected(label, f"the invocation tokens of {first}, {_tokens(mask)}", _tokens(its), why)
        for part in parts:
            self._add(_weighted(part, label, weight), label)

    def all(self) -> tuple[Part, ...]:
        """What came of it."""
        shifting = [(label, p) for label, p in self._found if isinstance(p, KVPrefix) and p.shifts]
        for label, part in shifting[1:]:
            length, first = part.keys.shape[0], shifting[0][1].keys.shape[0]
            if length != first:
                wanted = f"prefixes of one length in all layers, {first} as that of {shifting[0][0]}"
                raise expected(label, wanted, f"{length} in layer {part.layer}", "they shift the text's positions")
        return tuple(part for _, part in self._found)

    def _add(self, part: Part, label: str) -> None:
        if isinstance(part, RowOverride | EmbeddingEntries):
            self._refuse_scaled_rows(label)
            self._refuse_rows_with_entries(part, label)
        key = _place(part)
        if key not in self._at:
            if key is not None:
                self._at[key] = len(self._found)
            self._found.append((label, part))
            return
        owner, there = self._found[self._at[key]]
        self._found[self._at[key]] = (f"{owner} and {label}", _together(there, owner, part, label))

    def _refuse_scaled_rows(self, label: str) -> None:
        """Rows are replaced before anything scales them, whatever the order of the adapters."""
        for owner, part in self._found:
            if isinstance(part, EmbeddingPair) and part.outer is not None:
                wanted = f"embedding rows before {owner}, which scales embeddings"
                raise expected(label, wanted, "some behind it", "name the two the other way round")

    def _refuse_rows_with_entries(self, part: Part, label: str) -> None:
        """Rows are replaced before entries are added, whatever the order of the adapters."""
        for owner, there in self._found:
            if {type(there), type(part)} == {RowOverride, EmbeddingEntries}:
                raise expected(label, f"no other embedding beside {WORDS[type(there)]} in {owner}", WORDS[type(part)])


def times(value: Value, weight: float) -> Computed:
    """The tensor times a number."""
    return Computed(value.name, value.shape, lambda t: t * weight, (value,))


def needs_one(label: str, weight: float, why: str) -> AdapterInvalid:
    """The refusal of a weight where it has no meaning."""
    return expected(f"weight of {label}", "1", f"{weight:g}", why)


def _weighted(part: Part, label: str, weight: float) -> Part:
    if weight == 1.0 or isinstance(part, TokenMask):
        return part
    if isinstance(part, Bottleneck):
        return _weighted_bottleneck(part, weight)
    if isinstance(part, EmbeddingEntries):
        return replace(part, values=times(part.values, weight))
    if isinstance(part, ExpertPair) or (isinstance(part, EmbeddingPair) and part.outer is None):
        return replace(part, scale=part.scale * weight)
    raise needs_one(label, weight, f"{WORDS[type(part)]} has no weight")


def _weighted_bottleneck(part: Bottleneck, weight: float) -> Bottleneck:
    """What it adds, times the weight; a gate stays as it is."""
    if part.up is None:
        return replace(part, down=_map(part.down, weight), down_bias=_maybe(part.down_bias, weight))
    up, up_bias, skip = _map(part.up, weight), _maybe(part.up_bias, weight), _maybe(part.skip, weight)
    return replace(part, up=up, up_bias=up_bias, skip=skip)


def _map(said: Matrix | KronSum, weight: float) -> Matrix | KronSum:
    if isinstance(said, Matrix):
        return Matrix(times(said.weight, weight))
    return said.times(lambda w1: times(w1, weight))


def _maybe(value: Value | None, weight: float) -> Value | None:
    return None if value is None else times(value, weight)


def _place(part: Part) -> object:
    """What stands for the place that a part needs to itself; None for those that stand side by side."""
    match part:
        case NormOverride(path, _, _):
            return (NormOverride, path)
        case KVPrefix():
            return (KVPrefix, part.layer)
        case Bottleneck():
            return (Bottleneck, part.layer, part.after) if part.plain else None
        case EmbeddingPair() | EmbeddingEntries():
            return None
        case ExpertPair(path, parameter, _, _, _):
            return (ExpertPair, path, parameter)
        case _:
            return type(part)


def _together(there: Part, owner: str, part: Part, label: str) -> Part:
    """Both as one part. AdapterInvalid where there is no such thing."""
    match there, part:
        case SoftPrompt(a), SoftPrompt(b):
            return SoftPrompt(_stacked(a, b))
        case TokenMask(), TokenMask():
            return there
        case KVPrefix(), KVPrefix():
            if there.gate is not None or part.gate is not None:
                why = "each gate is of one prefix"
                raise expected(label, f"a layer {part.layer} without prefix", f"one beside that of {owner}", why)
            if there.shifts != part.shifts:
                said = ("that begin behind the prefix", "that begin at 0")
                wanted = f"positions of the text {said[part.shifts]}, as {owner} has them"
                raise expected(label, wanted, f"some {said[not part.shifts]}")
            return replace(there, keys=_stacked(there.keys, part.keys), values=_stacked(there.values, part.values))
        case Bottleneck(), Bottleneck():
            if (there.tap, there.act) != (part.tap, part.act):
                wanted = f"a bottleneck that reads {there.tap} and bends by {there.act}, as that of {owner} does"
                got = f"one that reads {part.tap} and bends by {part.act}"
                raise expected(label, f"{wanted} behind the {part.after} of layer {part.layer}", got)
            return _wider(there, part)
        case ExpertPair(), ExpertPair():
            return _both_inside(there, part)
        case NormOverride(path, _, _), _:
            wanted = f"one override of the norm {path}"
            raise expected(label, wanted, f"another beside that of {owner}", "one would undo the other")
        case _:
            wanted, why = f"{WORDS[type(part)]} in one adapter", "one would undo the other"
            raise expected(label, wanted, f"another beside that of {owner}", why)


def _stacked(a: Value, b: Value) -> Computed:
    def formula(first: "Tensor", second: "Tensor") -> "Tensor":
        import torch

        return torch.cat([first.flatten(1), second.flatten(1)]).view(-1, *a.shape[1:])

    return Computed(a.name, (a.shape[0] + b.shape[0], *a.shape[1:]), formula, (a, b))


def _wider(there: Bottleneck, part: Bottleneck) -> Bottleneck:
    """Two bottlenecks that read the same and bend alike, side by side."""
    assert isinstance(there.down, Matrix)
    assert isinstance(part.down, Matrix)
    assert isinstance(there.up, Matrix)
    assert isinstance(part.up, Matrix)
    a, b = there.up.weight, part.up.weight
    up = Computed(a.name, (a.shape[0], a.shape[1] + b.shape[1]), _beside(1), (a, b))
    ranks = there.down.shape[0], part.down.shape[0]
    return replace(
        there,
        down=Matrix(_stacked(there.down.weight, part.down.weight)),
        up=Matrix(up),
        down_bias=_end_to_end(there.down_bias, part.down_bias, ranks),
        up_bias=_sum(there.up_bias, part.up_bias),
    )


def _both_inside(there: ExpertPair, part: ExpertPair) -> ExpertPair:
    """Two pairs inside the same experts as one of both ranks."""
    (count, rank, wide), (_, more, _), tall = there.a.shape, part.a.shape, there.b.shape[1]
    a = Computed(there.a.name, (count, rank + more, wide), _beside(1), (there.a, part.a))
    scaled = times(there.b, there.scale), times(part.b, part.scale)
    return replace(there, a=a, b=Computed(there.b.name, (count, tall, rank + more), _beside(2), scaled), scale=1.0)


def _beside(dim: int) -> "Callable[[Tensor, Tensor], Tensor]":
    def formula(first: "Tensor", second: "Tensor") -> "Tensor":
        import torch

        return torch.cat([first, second], dim=dim)

    return formula


def _end_to_end(a: Value | None, b: Value | None, ranks: tuple[int, int]) -> Value | None:
    """One vector behind the other, zeros in the place of one that is missing."""
    present = [value for value in (a, b) if value is not None]
    if not present:
        return None

    def formula(*found: "Tensor") -> "Tensor":
        import torch

        given = iter(found)
        parts = [torch.zeros(n) if v is None else next(given).flatten() for v, n in zip((a, b), ranks, strict=True)]
        return torch.cat(parts)

    return Computed(present[0].name, (sum(ranks),), formula, tuple(present))


def _sum(a: Value | None, b: Value | None) -> Value | None:
    if a is None or b is None:
        return b if a is None else a
    return Computed(a.name, (a.elements,), lambda x, y: x.flatten() + y.flatten(), (a, b))


def _tokens(mask: tuple[int, ...]) -> str:
    return f"{list(mask)}" if mask else "none"
