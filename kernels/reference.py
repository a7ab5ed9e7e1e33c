"""The formulas as code, in fp64, one segment and one site at a time: what every implementation is measured against.

The signatures are those of ``dispatch.Kernels``, with the segments and the arena in place of ``rows``; results are
returned in fp64 and nothing is changed in place.

What follows ``norm`` are the formulas of records (``extras``), for the rows of one segment. They compute in the dtype
of what they are handed: in fp64 they are oracles, in another dtype they are what a user of torch would write.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.activation import activate
from weft.kernels.batch import Segment
from weft.kernels.layout import Geometry, SiteTerms, unpack
from weft.kernels.norms import Norm


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x [tokens, in] through A [rank, in] and B [out, rank]: [tokens, out]."""
    return x.double() @ a.double().T @ b.double().T


def kron(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x [tokens, i1 * i2] times the materialised product of w1 [o1, i1] and w2 [o2, i2]: [tokens, o1 * o2]."""
    return x.double() @ torch.kron(w1.double().contiguous(), w2.double().contiguous()).T


def site(y: Tensor, x: Tensor, terms: SiteTerms) -> Tensor:
    """The normal form at one site, from the frozen linear's y [tokens, out] and x [tokens, in]."""
    total = y.double()
    if terms.sigma is not None:
        total = total * terms.sigma.double()
    if terms.low_rank is not None:
        a, b = terms.low_rank
        hidden = x.double() @ a.double().T
        hidden = hidden if terms.inner is None else hidden + terms.inner.double()
        total = total + activate(hidden, terms.act) @ b.double().T
    for w1, w2 in terms.krons:
        total = total + kron(x, w1, w2)
    return total if terms.beta is None else total + terms.beta.double()


def apply(y: Tensor, x: Tensor, segments: Sequence[Segment], group: int, arena: Tensor, geometry: Geometry) -> Tensor:
    """Outputs of a group of sites with every segment's adapter added."""
    result = y.double().clone()
    for segment, terms in _adapted(segments, arena, geometry):
        rows, left = slice(segment.start, segment.stop), 0
        for index in geometry.members[group]:
            right = left + geometry.sites[index].out_features
            if index in terms:
                result[rows, left:right] = site(y[rows, left:right], x[rows], terms[index])
            left = right
    return result


def scale_input(x: Tensor, segments: Sequence[Segment], index: int, arena: Tensor, geometry: Geometry) -> Tensor:
    """Inputs of a site with every segment's sigma_in applied."""
    result = x.double().clone()
    for segment, terms in _adapted(segments, arena, geometry):
        sigma_in = terms[index].sigma_in if index in terms else None
        if sigma_in is not None:
            result[segment.start : segment.stop] *= sigma_in.double()
    return result


def entries(x: Tensor, index: Tensor, values: Tensor, tall: int) -> Tensor:
    """x [tokens, in] times the transposed matrix [tall, in] whose flat ``index`` holds ``values``: [tokens, tall]."""
    delta = torch.zeros(tall * x.shape[1], dtype=torch.float64, device=x.device)
    delta[index.long()] = values.double()
    return x.double() @ delta.view(tall, x.shape[1]).T


def norm(x: Tensor, module: Norm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The module of x [.., d] with these in the place of its own weight and bias."""
    wide = x.double()
    if module.centred:
        wide = wide - wide.mean(dim=-1, keepdim=True)
    wide = wide / (wide.square().mean(dim=-1, keepdim=True) + module.eps).sqrt()
    wide = wide * (module.offset + (module.weight if weight is None else weight).double())
    shift = module.bias if bias is None else bias
    return wide if shift is None else wide + shift.double()


def columns(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, in] times the transposed matrix [out, in] whose columns ``index`` are weight [k, out]."""
    return x[:, index.long()] @ weight


def dense(x: Tensor, delta: Tensor) -> Tensor:
    """x [tokens, in] times the transposed delta [out, in]."""
    return x @ delta.T


def gate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Gates [k] of x [tokens, d]: the mean over its tokens of sigmoid(x weight^T + bias), weight [k, d], bias [k]."""
    raised = x @ weight.T
    return torch.sigmoid(raised if bias is None else raised + bias).mean(dim=0)


def gated(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gate(x) (x A^T) B: A [rank, in], B [rank, out]; one gate for all outputs."""
    return gate(x, weight, bias) * (x @ a.T @ b)


def shared(x: Tensor, inner: Tensor, outer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """outer ((inner (x A^T)) B): inner [rank], outer [out]; A [rank, >= in] and B [rank, >= out] reach further."""
    return outer * ((inner * (x @ a[:, : x.shape[1]].T)) @ b[:, : len(outer)])


@dataclass(frozen=True)
class Bottleneck:
    """What ``bottleneck`` computes: up(act(down(norm(u)) + down_bias)) + up_bias, gated, plus skip u.

    down, up:  matrices [r, d] and [d, r], written out; without ``up``, down [d, d] is all there is
    norm:      weight, bias and epsilon of a layer norm of u
    gate:      weight [1, d] and bias [1], of u before its norm
    """

    down: Tensor
    up: Tensor | None
    act: int
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    norm: tuple[Tensor, Tensor, float] | None = None
    gate: tuple[Tensor, Tensor | None] | None = None
    skip: Tensor | None = None


def bottleneck(u: Tensor, of: Bottleneck) -> Tensor:
    """What a bottleneck adds to a sublayer's output [tokens, d], from its tap u [tokens, d]."""
    made = u
    if of.norm is not None:
        weight, bias, eps = of.norm
        centred = u - u.mean(dim=-1, keepdim=True)
        made = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias
    made = made @ of.down.T
    made = made if of.down_bias is None else made + of.down_bias
    if of.up is not None:
        made = activate(made, of.act) @ of.up.T
        made = made if of.up_bias is None else made + of.up_bias
    made = made if of.skip is None else made + of.skip * u
    return made if of.gate is None else gate(u, *of.gate) * made


def prefix(keys: Tensor, gates: Tensor | None, per_token: bool, first: bool) -> Tensor:
    """Keys, or values, [heads, p, size] of a prefix times its gates [k].

    per_token:  one gate for each of p; else the ``first`` one is the keys', the last one the values'
    """
    if gates is None:
        return keys
    return keys * (gates[None, :, None] if per_token else gates[0 if first else -1])


def embed_rows(out: Tensor, ids: Tensor, listed: Tensor, rows: Tensor) -> Tensor:
    """Embeddings [tokens, d] of ids [tokens], with rows [n, d] in the place of those of ``listed`` [n]."""
    own = dict(zip(listed.tolist(), rows, strict=True))
    return torch.stack([own.get(id, frozen) for id, frozen in zip(ids.tolist(), out, strict=True)])


def embed_entries(out: Tensor, ids: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Embeddings out [tokens, d] of ids [tokens] plus those of a table that is ``values`` at its flat ``index``."""
    wide = out.shape[1]
    added = torch.zeros_like(out)
    for place, value in zip(index.tolist(), values, strict=True):
        added[ids == place // wide, place % wide] = value
    return out + added


def embed_pair(out: Tensor, ids: Tensor, a: Tensor, b: Tensor, outer: Tensor | None) -> Tensor:
    """outer out + a[id] b for embeddings out [tokens, d]: a [vocabulary, rank], b [rank, d], outer [d]."""
    return (out if outer is None else outer * out) + a[ids] @ b


def _adapted(
    segments: Sequence[Segment], arena: Tensor, geometry: Geometry
) -> list[tuple[Segment, dict[int, SiteTerms]]]:
    found = []
    for segment in segments:
        block = segment.block
        if block is not None:
            found.append((segment, unpack(geometry, arena[block.offset : block.offset + block.nbytes])))
    return found
