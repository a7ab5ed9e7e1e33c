"""What a forward pass needs beyond its token ids: which rows carry which adapter, where keys and values lie.

Model code of transformers calls linears and attention without extra arguments; this is the channel to them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.batch import Rows, SoftSpan
from weft.kernels.dispatch import Kernels


def padded_context(tokens: int) -> int:
    """The context that a sequence of this many tokens is padded to: at most a quarter more, or 64 in all.

    It depends on nothing but the length, so the sums over a context are the same in any company.
    """
    step = max(64, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


@dataclass(frozen=True, eq=False, slots=True)
class PrefillSpan:
    """Tokens of one sequence that attend causally to each other, to what is cached, and to its adapter's prefix.

    start, stop:  rows of the batch
    slots:        [context] int64, KV slots of the sequence's tokens up to and including the last of these rows
    prefixed:     whether its adapter has a prefix, which lies before all of these
    shifted:      whether that prefix counts as so many positions of the sequence
    """

    start: int
    stop: int
    slots: Tensor
    prefixed: bool = False
    shifted: bool = False
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, before: int) -> Tensor:
        """[rows, before + context] bool: what these rows must not see, of ``before`` places of a prefix and the rest.

        window:  positions that a row reaches back; a prefix without positions is in every window
        """
        known = self._masks.get((window, before))
        if known is None:
            count, context = self.stop - self.start, before + len(self.slots)
            position = torch.arange(context, device=self.slots.device)
            own = position[context - count :, None]
            known = position > own
            if window is not None:
                known |= (position <= own - window) & (position >= (0 if self.shifted else before))
            self._masks[window, before] = known
        return known


@dataclass(frozen=True, eq=False, slots=True)
class DecodeSpan:
    """One token of each of several sequences, whose adapters' prefixes, if they have any, are of like lengths.

    rows:     [sequences] int64, rows of the batch, or None when they are all its rows in order
    slots:    [sequences * context] int64, KV slots padded with the scratch slot to one context for all
    lengths:  [sequences] int64, context length of each sequence
    padding:  [sequences, context] bool, where the padding is
    prefixed: the rows again, on the host, if their adapters have prefixes
    shifted:  whether those count as so many positions of their sequences
    """

    rows: Tensor | None
    slots: Tensor
    lengths: Tensor
    padding: Tensor
    prefixed: tuple[int, ...] = ()
    shifted: bool = False
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """Tokens that every sequence is padded to."""
        return self.padding.shape[1]

    def mask(self, window: int | None, before: int) -> Tensor:
        """[sequences, before + context] bool: what a token must not see (``PrefillSpan.mask``)."""
        known = self._masks.get((window, before))
        if known is None:
            known = F.pad(self.padding, (before, 0))
            if window is not None and before + self.context > window:
                position = torch.arange(-before, self.context, device=self.lengths.device)
                first = -before if self.shifted else 0
                known = known | ((position < self.lengths[:, None] - window) & (position >= first))
            self._masks[window, before] = known
        return known


@dataclass(frozen=True, eq=False, slots=True)
class SideSpan:
    """Tokens of one sequence whose adapter has a network beside the backbone.

    start, stop:  rows of the batch
    slots:        [context] int64, slots of ``PagedKV.narrowed`` for the sequence's tokens up to the last of these
    first:        the position of the first of these
    """

    start: int
    stop: int
    slots: Tensor
    first: int


class PagedKV:
    """Keys and values of every layer, [kv heads, slots, size] each: a page of one head is contiguous.

    The first page of slots is scratch: padding reads it, so it stays zero.
    """

    def __init__(self, shapes: list[tuple[int, int, int]], slots: int, dtype: torch.dtype, device: torch.device):
        """``shapes``: per layer (kv heads, key size, value size)."""
        self.keys = [torch.empty(heads, slots, size, dtype=dtype, device=device) for heads, size, _ in shapes]
        self.values = [torch.empty(heads, slots, size, dtype=dtype, device=device) for heads, _, size in shapes]
        self.clear_scratch(1)

    def clear_scratch(self, slots: int) -> None:
        """Zero the first ``slots`` slots, which padding reads."""
        for tensor in (*self.keys, *self.values):
            tensor[:, :slots] = 0

    def narrowed(self, layers: Sequence[int], reduction: int) -> "PagedKV":
        """The same memory for layers whose keys and values are narrower: each slot of these layers is so many."""
        narrow = copy(self)
        for name in ("keys", "values"):
            of_layer = [getattr(self, name)[layer] for layer in layers]
            views = [t.view(t.shape[0], t.shape[1] * reduction, t.shape[2] // reduction) for t in of_layer]
            setattr(narrow, name, views)
        return narrow

    @staticmethod
    def token_bytes(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in all layers."""
        return sum(heads * (key + value) for heads, key, value in shapes) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass.

    write_slots:  [tokens] int64, the slot where each row's key and value go
    rows:         adapters of the token rows, None when all are base rows
    head_rows:    adapters of the rows whose logits are kept, None when all are base rows
    soft:         rows that stand for soft prompts
    side:         rows whose adapters have a network beside the backbone
    attention_inputs:  by layer, what its attention was given, while a row's prefix asks for it
    """

    kv: PagedKV
    write_slots: Tensor
    decode: tuple[DecodeSpan, ...]
    prefill: tuple[PrefillSpan, ...]
    kernels: Kernels | None = None
    rows: Rows | None = None
    head_rows: Rows | None = None
    soft: tuple[SoftSpan, ...] = ()
    side: tuple[SideSpan, ...] = ()
    attention_inputs: dict[int, Tensor] = field(default_factory=dict)


_active: ContextVar[Step] = ContextVar("weft_step")


def active() -> Step:
    """The step whose forward pass is running."""
    return _active.get()


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make ``step`` the active one inside the block."""
    token = _active.set(step)
    try:
        yield
    finally:
        _active.reset(token)
