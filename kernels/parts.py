"""Operators beyond the normal form in plain torch, over the rows of one segment at a time.

A row's result depends on its own segment alone, so no neighbour can change a bit of it. Sums are made in fp32, or in
short products where a device multiplies those natively, and rounded where they are added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.activation import SIGMOID, activate, activate_rows
from weft.kernels.bags import bag
from weft.kernels.batch import Segment
from weft.kernels.extras import Kind, Record

Pieces = tuple[Tensor | None, ...]

# what a bottleneck reads, by the number in its options
TAP_H, TAP_SUM, TAP_RESIDUAL, TAP_NORMED = range(4)


@dataclass(frozen=True, eq=False)
class Carried:
    """A record in a batch: the rows whose adapter has it, and views of its pieces."""

    segment: Segment
    record: Record
    pieces: Pieces

    @property
    def rows(self) -> slice:
        """Of the batch."""
        return slice(self.segment.start, self.segment.stop)

    @property
    def block_key(self) -> int:
        """Of the adapter."""
        assert self.segment.block is not None
        return self.segment.block.key

    @property
    def bank_key(self) -> int:
        """Of the bank that the record names."""
        assert self.segment.block is not None
        return self.segment.block.banks[self.record.options[0]].key

    @property
    def single(self) -> bool:
        """Whether it is for one row."""
        return self.segment.stop - self.segment.start == 1

    @property
    def span(self) -> tuple[int, int]:
        """First row of the batch and the one behind the last."""
        return self.segment.start, self.segment.stop


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] weightᵀ [in, out]: in their short dtype where the device multiplies that natively, else in fp32."""
    native = x.dtype == weight.dtype and (x.dtype == torch.bfloat16 or (x.is_cuda and x.dtype == torch.float16))
    return x @ weight.T if native else x.float() @ weight.float().T


def mean_gate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """sigmoid(x weightᵀ + bias) [k], averaged over the rows of x [rows, d]: those of one request in one call."""
    return torch.sigmoid(F.linear(x.float(), weight.float(), None if bias is None else bias[0])).mean(dim=0)


def delta(x: Tensor, carried: Carried, tall: int) -> Tensor:
    """What a delta adds to the outputs [rows, tall] of a linear whose input is x [rows, in]."""
    kind, pieces = carried.record.kind, carried.pieces
    first, second = pieces[0], pieces[min(1, len(pieces) - 1)]
    assert first is not None
    assert second is not None
    if kind is Kind.DENSE:
        return product(x, first)
    if kind is Kind.COLUMNS:
        return product(x.index_select(1, first[0]), second.T)
    if kind is Kind.SPARSE:
        return _sparse(x, first[0], second[0], tall)
    assert kind is Kind.GATED, f"{kind.name} is no delta of all outputs"
    gate, bias = pieces[2], pieces[3]
    assert gate is not None
    return mean_gate(x, gate, bias) * product(product(x, first).to(x.dtype), second.T).float()


def add_delta(y: Tensor, x: Tensor, carried: Carried) -> None:
    """Add a delta to y [rows, out] in place, rounded once."""
    if carried.record.kind is Kind.ROWS:
        index, weight = carried.pieces
        assert index is not None
        assert weight is not None
        part = y.index_select(1, index[0])
        y.index_copy_(1, index[0].long(), (part.float() + product(x, weight)).to(y.dtype))
    else:
        y.copy_(y.float() + delta(x, carried, y.shape[1]))


def _sparse(x: Tensor, index: Tensor, values: Tensor, tall: int) -> Tensor:
    """x [rows, in] times the transposed matrix [tall, in] that is zero but for ``values`` at the flat ``index``."""
    wide = x.shape[1]
    firsts = torch.arange(0, (tall + 1) * wide, wide, dtype=torch.int64, device=x.device)
    starts = torch.searchsorted(index, firsts).int()
    return bag(x.T.float().contiguous(), index % wide, starts, values.float()).T


def bottleneck(h: Tensor, x_res: Tensor | None, ln_x: Tensor | None, carried: Carried) -> Tensor:
    """What is added to h [rows, d], in fp32.

    options:  tap, function, terms of the two maps (0: a matrix), bits of the norm's epsilon
    pieces:   norm weight, norm bias, gate weight, gate bias, skip, all in fp32; down bias, up bias; down.., up..
    """
    tap, function, down_terms, up_terms, epsilon = carried.record.options
    norm_weight, norm_bias, gate, gate_bias, skip, down_bias, up_bias, *maps = carried.pieces
    x = tapped(tap, h, x_res, ln_x)
    u = x
    if norm_weight is not None:
        assert norm_bias is not None
        u = F.layer_norm(x.float(), (x.shape[1],), norm_weight[0], norm_bias[0], epsilon_of(epsilon))
    split = max(1, 3 * down_terms)
    out = _plus(_mapped(u, maps[:split], down_terms), down_bias)
    if maps[split:]:
        out = _plus(_mapped(activate(out, function).to(h.dtype), maps[split:], up_terms), up_bias)
    if skip is not None:
        out = out + skip[0] * x.float()
    if gate is not None:
        out = mean_gate(x, gate, gate_bias) * out
    return out


@lru_cache
def epsilon_of(bits: int) -> float:
    """A norm's epsilon from the bits of its fp32."""
    return float(np.array(bits, dtype=np.int32).view(np.float32))


def tapped(tap: int, h: Tensor, x_res: Tensor | None, ln_x: Tensor | None) -> Tensor:
    """The input that a tap names. An adapter that needs what the place lacks is refused at registration."""
    if tap == TAP_H:
        return h
    if tap == TAP_NORMED:
        assert ln_x is not None
        return ln_x
    assert x_res is not None
    return x_res if tap == TAP_RESIDUAL else h + x_res


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.float() if bias is None else x.float() + bias[0]


def _mapped(x: Tensor, factors: Sequence[Tensor | None], terms: int) -> Tensor:
    """x [rows, in] through a matrix [out, in], or through a sum of Kronecker products that is never written out.

    factors:  the matrix, or three of each term: w1, w2 and none, or w1, left [k, o2] and right [k, i2] of w2
    """
    if not terms:
        assert factors[0] is not None
        return product(x, factors[0])
    total: Tensor | None = None
    for w1, w2, right in zip(factors[::3], factors[1::3], factors[2::3], strict=True):
        assert w1 is not None
        assert w2 is not None
        last = w2 if right is None else right
        folded = x.reshape(-1, last.shape[1]).float() @ last.float().T
        if right is not None:
            folded = folded @ w2.float()
        mixed = torch.matmul(w1.float(), folded.view(-1, w1.shape[1], folded.shape[1])).flatten(1)
        total = mixed if total is None else total + mixed
    assert total is not None
    return total


def prefix(carried: Carried, heads: int, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values [heads, p, size] of a prefix, times its gate on the attention's input x [rows, d]."""
    keys, values, gate, gate_bias = carried.pieces
    assert keys is not None
    assert values is not None
    count, _, per_token, which = carried.record.options
    keys, values = (t.reshape(heads, count, -1) for t in (keys, values))
    if gate is None:
        return keys, values
    assert x is not None, "the hook of the attention keeps its input for gates"
    g = mean_gate((x, x[:1], x[-1:])[which], gate, gate_bias)
    for_keys, for_values = (g[:, None], g[:, None]) if per_token else (g[0], g[-1])
    return (keys.float() * for_keys).to(keys.dtype), (values.float() * for_values).to(values.dtype)


def prefixes(carried: Sequence[Carried], heads: int, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same [heads, n, p, size] for n single rows of x [tokens, d] whose prefixes have the same options."""
    count, _, per_token, _ = carried[0].record.options
    keys, values = (_stacked(carried, piece).view(len(carried), heads, count, -1).transpose(0, 1) for piece in (0, 1))
    if carried[0].pieces[2] is None:
        return keys, values
    assert x is not None, "the hook of the attention keeps its input for gates"
    gate = _stacked(carried, 2).float()
    scores = rowwise(x[[each.segment.start for each in carried]], gate)
    if carried[0].pieces[3] is not None:
        scores = scores + _stacked(carried, 3).flatten(1)
    g = activate_rows(scores, SIGMOID)
    for_keys, for_values = (g[:, :, None],) * 2 if per_token else (g[:, :1, None], g[:, -1:, None])
    return (keys.float() * for_keys).to(keys.dtype), (values.float() * for_values).to(values.dtype)


def rowwise(x: Tensor, weights: Tensor) -> Tensor:
    """x [n, in] times a matrix of each row's own, weights [n, out, in]: [n, out] in fp32.

    Sums along the last dimension, each in an order that depends on its length alone; a batched matmul's does not.
    """
    return (x.float()[:, None] * weights.float()).sum(dim=-1)


def _stacked(carried: Sequence[Carried], piece: int) -> Tensor:
    found = [tensor for each in carried if (tensor := each.pieces[piece]) is not None]
    assert len(found) == len(carried)
    return torch.stack(found)


def embed_rows(out: Tensor, ids: Tensor, carried: Carried) -> None:
    """Rows of out [rows, d] whose id has a row of its own become that row."""
    listed, rows = carried.pieces
    assert listed is not None
    assert rows is not None
    place = torch.searchsorted(listed[0], ids.int()).clamp(max=listed.shape[1] - 1)
    hit = listed[0][place] == ids
    out.copy_(torch.where(hit[:, None], rows[place].to(out.dtype), out))


def embed_entries(out: Tensor, ids: Tensor, carried: Carried) -> None:
    """Each row of out [rows, d] plus the entries of its id."""
    index, values = carried.pieces
    assert index is not None
    assert values is not None
    wide = out.shape[1]
    # an entry for every place or none: how many a row has is known to no host, so shapes must not depend on it
    places = ids.int()[:, None] * wide + torch.arange(wide, dtype=torch.int32, device=out.device)
    found = torch.searchsorted(index[0], places).clamp(max=index.shape[1] - 1)
    out.copy_(out.float() + torch.where(index[0][found] == places, values[0][found].float(), 0.0))


def embed_pair(out: Tensor, ids: Tensor, carried: Carried) -> None:
    """out [rows, d] = outer ⊙ out + a[id] b."""
    a, b, outer = carried.pieces
    assert a is not None
    assert b is not None
    old = out.float() if outer is None else out.float() * outer
    out.copy_(old + a[ids].float() @ b.float())
