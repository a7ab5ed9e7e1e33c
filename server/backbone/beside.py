"""Networks at work in a step beside the rows whose adapters they are: one per request, or one for many single rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weft.adapters_store.sites import SideInfo
from weft.kernels.alike import Alike, Stacks
from weft.kernels.parts import Carried, product, rowwise
from weft.server.backbone.step import (
    DecodeSpan,
    PagedKV,
    PrefillSpan,
    SideSpan,
    Step,
    padded_context,
    running,
)

if TYPE_CHECKING:
    from weft.server.backbone.side import Names, Network

# pieces in front of those of the norm: gates, first weight and bias, up weight and bias
HEAD = 5


class Beside:
    """A network at work: an adapter's, on the rows of one request.

    layers:  those of the backbone that it reads
    """

    def __init__(self, info: SideInfo, carried: Carried, span: SideSpan):
        self.info, self._carried, self._span = info, carried, span
        self.layers = carried.record.options[1:]
        self._pieces = _present(carried.pieces)
        # what the network begins with, and by layer what is put into it
        self._z: Tensor
        self._fed: dict[int, Tensor] = {}

    def begin(self, x: Tensor) -> None:
        """Read the first layer's input x [rows of the batch, d]."""
        self._z = self._affine(self._take(x), *self._pieces[1:3])

    def read(self, layer: int, x: Tensor) -> None:
        """Read a layer's output x [rows of the batch, d]."""
        if layer in self.layers:
            self._fed[layer] = self._affine(self._take(x), *self._of(layer)[:2])

    def finish(self, hidden: Tensor, network: "Network", names: "Names", kv: PagedKV) -> None:
        """Write what the head reads in the place of the backbone's end: hidden [rows of the batch, d]."""
        gates, _, _, up, up_bias, *norm = self._pieces[: HEAD + len(self.info.norm)]

        def feed(index: int, z: Tensor) -> Tensor:
            # the model may have changed what it was given; the first layer gets the start itself
            before = self._z if index == 0 else z.float()
            return (gates[..., index] * before + self._fed[self.layers[index]]).to(z.dtype)

        given = {f"{names.norm}.{n}": self._shaped(t, s) for (n, s), t in zip(self.info.norm, norm, strict=True)}
        for index, layer in enumerate(self.layers):
            block = zip(self.info.block, self._of(layer)[2:], strict=True)
            given |= {f"{names.layers}.{index}.{n}": self._shaped(t, s) for (n, s), t in block}
        with running(self._step(kv)):
            z = network.run(given, self._z.to(up.dtype), self._positions(up.device), feed)
        self._put(hidden, self._affine(z, up, up_bias))

    def _of(self, layer: int) -> list[Tensor]:
        """Weights of one of its layers: down weight, down bias, then those of the block."""
        size = 2 + len(self.info.block)
        at = HEAD + len(self.info.norm) + self.layers.index(layer) * size
        return self._pieces[at : at + size]

    def _take(self, x: Tensor) -> Tensor:
        return x[self._carried.rows]

    def _put(self, hidden: Tensor, made: Tensor) -> None:
        hidden[self._carried.rows] = made.to(hidden.dtype)

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x weightᵀ + bias in fp32; the bias is a row."""
        return product(x, weight).float() + bias[0]

    def _shaped(self, piece: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A parameter of this shape."""
        return piece.reshape(shape)

    def _positions(self, device: torch.device) -> Tensor:
        span = self._span
        return torch.arange(span.first, span.first + span.stop - span.start, device=device)

    def _step(self, kv: PagedKV) -> Step:
        return own_step(kv, self._span, self.info.reduction, self.layers)


class BesideRows(Beside):
    """The same for single rows whose adapters' networks have one form and whose contexts are padded alike."""

    def __init__(self, info: SideInfo, alike: Alike, stacks: Stacks, spans: Sequence[SideSpan]):
        super().__init__(info, alike.carried[0], spans[0])
        self._rows, self._pieces, self._spans = alike.rows, _present(stacks.vectors), spans

    def _take(self, x: Tensor) -> Tensor:
        return self._rows.take(x)

    def _put(self, hidden: Tensor, made: Tensor) -> None:
        self._rows.put(hidden, made)

    def _affine(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return rowwise(x, weight) + bias[:, 0]

    def _shaped(self, piece: Tensor, shape: tuple[int, ...]) -> Tensor:
        return piece.reshape(len(piece), *shape)

    def _positions(self, device: torch.device) -> Tensor:
        return torch.tensor([span.first for span in self._spans], device=device)

    def _step(self, kv: PagedKV) -> Step:
        return rows_step(kv, self._spans, self.info.reduction, self.layers)


def context_of(span: SideSpan) -> int:
    """What the context of a single row is padded to."""
    return padded_context(len(span.slots))


def own_step(kv: PagedKV, span: SideSpan, reduction: int, layers: Sequence[int]) -> Step:
    """The pass of a network: the keys and values of its layers lie where those of the layers that it reads do."""
    count = span.stop - span.start
    spans = (PrefillSpan(0, count, span.slots),)
    return Step(kv.narrowed(layers, reduction), span.slots[-count:], (), spans)


def rows_step(kv: PagedKV, spans: Sequence[SideSpan], reduction: int, layers: Sequence[int]) -> Step:
    """The pass of a network over single rows, each the last of its own sequence."""
    context, device = context_of(spans[0]), spans[0].slots.device
    lengths = torch.tensor([len(span.slots) for span in spans], device=device)
    padding = torch.arange(context, device=device) >= lengths[:, None]
    slots = torch.zeros(len(spans), context, dtype=torch.int64, device=device)
    for row, span in zip(slots, spans, strict=True):
        row[: len(span.slots)] = span.slots
    decode = DecodeSpan(None, slots.flatten(), lengths, padding)
    return Step(kv.narrowed(layers, reduction), torch.stack([span.slots[-1] for span in spans]), (decode,), ())


def _present(pieces: Sequence[Tensor | None]) -> list[Tensor]:
    found = [piece for piece in pieces if piece is not None]
    assert len(found) == len(pieces)
    return found
