"""Records of one form that many single rows carry, applied to all of these rows at once.

All is elementwise, or a sum along the last dimension, whose order depends on its length alone: so a row gets the same
bits in any company, which a batched matmul does not promise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.activation import SIGMOID, activate_rows
from weft.kernels.bags import Chosen
from weft.kernels.extras import Kind
from weft.kernels.parts import Carried, epsilon_of, rowwise, tapped

# pieces of a bottleneck in front of those of its maps
VECTORS = 7

# a matrix [n, out, in] alone, or the three of a sum of Kronecker products (``_kron_stack``)
Map = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Stacks:
    """The rows' pieces one behind another: ``vectors`` [n, rows, columns], None where the form has none; ``maps``."""

    vectors: tuple[Tensor | None, ...]
    maps: tuple[Map, ...] = ()

    @property
    def nbytes(self) -> int:
        """What they take."""
        tensors = (*self.vectors, *(tensor for each in self.maps for tensor in each))
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True, eq=False)
class Alike:
    """Single rows whose records have the same options and shapes."""

    carried: tuple[Carried, ...]
    rows: Chosen

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Of the stacks that these rows need."""
        record = self.carried[0].record
        return record.kind, record.place, tuple((each.block_key, each.record) for each in self.carried)

    @cached_property
    def blocks(self) -> frozenset[int]:
        """Keys of the blocks that the stacks are made of."""
        return frozenset(each.block_key for each in self.carried)

    @property
    def options(self) -> tuple[int, ...]:
        """Of all of these records."""
        return self.carried[0].record.options

    def stacks(self) -> Stacks:
        """Copies of all pieces."""
        kind = self.carried[0].record.kind
        pieces = tuple(zip(*(each.pieces for each in self.carried), strict=True))
        if kind is Kind.BOTTLENECK:
            split = VECTORS + max(1, 3 * self.options[2])
            maps = pieces[VECTORS:split], pieces[split:]
            return Stacks(tuple(map(_stack, pieces[:VECTORS])), tuple(_map_stack(found) for found in maps if found))
        vectors = tuple(map(_stack, pieces))
        if kind is Kind.GATED:
            a, b, *gates = vectors
            assert b is not None
            return Stacks((a, b.transpose(1, 2).contiguous(), *gates))
        return Stacks(vectors)


def split(carried: Sequence[Carried], device: torch.device) -> tuple[list[Alike], list[Carried]]:
    """Single rows by form, and the segments that are left: longer ones, and further records of the same row."""
    forms: dict[object, list[Carried]] = {}
    left, seen = [], set()
    for each in carried:
        if each.single and each.segment.start not in seen and _even(each):
            seen.add(each.segment.start)
            shapes = tuple(None if piece is None else piece.shape for piece in each.pieces)
            forms.setdefault((each.record.options, shapes), []).append(each)
        else:
            left.append(each)
    return [Alike(tuple(same), Chosen([e.segment.start for e in same], device)) for same in forms.values()], left


def _even(carried: Carried) -> bool:
    """Whether each sum of Kronecker products has terms of one shape."""
    if carried.record.kind is not Kind.BOTTLENECK:
        return True
    _, _, down_terms, up_terms, _ = carried.record.options
    split = VECTORS + max(1, 3 * down_terms)
    maps = (down_terms, carried.pieces[VECTORS:split]), (up_terms, carried.pieces[split:])
    shapes = [[p if p is None else p.shape for p in pieces] for terms, pieces in maps if terms]
    return all(shape == shape[:3] * (len(shape) // 3) for shape in shapes)


def gated(x: Tensor, alike: Alike, stacks: Stacks) -> Tensor:
    """What GATED deltas add to the rows' outputs: [n, out] in fp32, of x [tokens, in]."""
    a, b, gate, gate_bias = stacks.vectors
    assert a is not None
    assert b is not None
    assert gate is not None
    own = alike.rows.take(x)
    return _gate(own, gate, gate_bias) * rowwise(rowwise(own, a).to(x.dtype), b)


def bottleneck(h: Tensor, x_res: Tensor | None, ln_x: Tensor | None, alike: Alike, stacks: Stacks) -> Tensor:
    """What bottlenecks add to the rows' h [tokens, d]: [n, d] in fp32 (``parts.bottleneck``)."""
    tap, function, _, _, epsilon = alike.options
    norm_weight, norm_bias, gate, gate_bias, skip, down_bias, up_bias = stacks.vectors
    own = [None if t is None else alike.rows.take(t) for t in (h, x_res, ln_x)]
    assert own[0] is not None
    x = tapped(tap, own[0], own[1], own[2])
    u = x
    if norm_weight is not None:
        assert norm_bias is not None
        u = F.layer_norm(x.float(), (x.shape[1],), eps=epsilon_of(epsilon)) * norm_weight[:, 0] + norm_bias[:, 0]
    out = _plus(_mapped(u, stacks.maps[0]), down_bias)
    for up in stacks.maps[1:]:
        out = _plus(_mapped(activate_rows(out, function).to(h.dtype), up), up_bias)
    if skip is not None:
        out = out + skip[:, 0] * x.float()
    return out if gate is None else _gate(x, gate, gate_bias) * out


def _gate(x: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    """sigmoid(x gateᵀ + bias) [n, k]; a row is all of its request's in this call, so there is no mean to take."""
    score = rowwise(x, gate)
    return activate_rows(score if bias is None else score + bias[:, 0], SIGMOID)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias[:, 0]


def _mapped(x: Tensor, found: Map) -> Tensor:
    """x [n, in] through each row's own map: [n, out] in fp32."""
    if len(found) == 1:
        return rowwise(x, found[0])
    first, second, third = found
    count = len(x)
    if first.dim() == 5:
        # P[t, k, i1] = right · x;  Q[t, k, o1] = w1 P;  out[o1, o2] = Q · left
        folded = (x.float().view(count, 1, 1, -1, first.shape[4]) * first).sum(dim=-1)
        mixed = (second * folded[:, :, :, None]).sum(dim=-1)
        last = mixed.flatten(1, 2).transpose(1, 2).contiguous()
        return (last[:, :, None] * third).sum(dim=-1).flatten(1)
    # P[t, i1, o2] = w2 x;  out[o1, o2] = w1 · P over t and i1
    folded = (x.float().view(count, 1, -1, 1, first.shape[3]) * first[:, :, None]).sum(dim=-1)
    last = folded.flatten(1, 2).transpose(1, 2).contiguous()
    return (second[:, :, None] * last[:, None]).sum(dim=-1).flatten(1)


def _map_stack(pieces: Sequence[tuple[Tensor | None, ...]]) -> Map:
    if len(pieces) == 1:
        return (_whole(pieces[0]),)
    w1, w2 = (torch.stack([_whole(piece) for piece in pieces[at::3]], dim=1) for at in (0, 1))
    if pieces[2][0] is None:
        # w2 [n, t, o2, i2]; w1 [n, o1, t·i1]
        return w2, w1.transpose(1, 2).flatten(2).contiguous(), w1[:0]
    # right [n, t, k, 1, i2]; w1 [n, t, 1, o1, i1]; left [n, 1, o2, t·k]
    right = torch.stack([_whole(piece) for piece in pieces[2::3]], dim=1)
    left = w2.flatten(1, 2).transpose(1, 2).contiguous()
    return right[:, :, :, None], w1[:, :, None], left[:, None]


def _whole(pieces: Sequence[Tensor | None]) -> Tensor:
    stacked = _stack(pieces)
    assert stacked is not None
    return stacked


def _stack(pieces: Sequence[Tensor | None]) -> Tensor | None:
    found = [piece for piece in pieces if piece is not None]
    assert len(found) in (0, len(pieces)), "records of one form"
    return torch.stack(found) if found else None
