"""The formulas as code, in fp64, one segment and one site at a time: what every implementation is measured against.

The signatures are those of ``dispatch.Kernels``, with the segments and the arena in place of ``rows``; results are
returned in fp64 and nothing is changed in place.
"""

from collections.abc import Sequence

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


def _adapted(
    segments: Sequence[Segment], arena: Tensor, geometry: Geometry
) -> list[tuple[Segment, dict[int, SiteTerms]]]:
    found = []
    for segment in segments:
        block = segment.block
        if block is not None:
            found.append((segment, unpack(geometry, arena[block.offset : block.offset + block.nbytes])))
    return found
