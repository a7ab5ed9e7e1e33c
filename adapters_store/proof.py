"""Proves a fold: what was compiled computes what the file says, on random input, before anything is accepted.

The file's side is computed in fp64, one output row at a time, from the definitions: element (i, j) of kron(w1, w2) is
w1[i // o2, j // i2] · w2[i % o2, j % i2]. The compiled side is computed in fp32, as a kernel would. They may differ by
rounding only, judged by the size of what was summed up, so that cancellation raises no false alarm.
"""

from math import sqrt

import torch
from torch import Tensor

from weft.adapters_store.errors import StoreBug, expected
from weft.adapters_store.fold import Folded, base_bias, read_factor
from weft.adapters_store.operators import (
    Bias,
    Columns,
    Dense,
    Kron,
    LowRank,
    Operator,
    Rows,
    Scale,
    Shared,
    SiteOperators,
    Sparse,
)
from weft.adapters_store.sites import SiteCatalogue
from weft.adapters_store.values import Values

TOKENS = 2
ROWS = 16
EPSILON = torch.finfo(torch.float32).eps


def prove(folded: Folded, said: SiteOperators, values: Values, catalogue: SiteCatalogue) -> None:
    """AdapterInvalid if fp32 cannot hold the result, StoreBug if the fold is wrong."""
    site = folded.site
    random = torch.Generator().manual_seed(site.in_features * 31 + site.out_features)
    x = torch.randn(TOKENS, site.in_features, generator=random, dtype=torch.float64)
    base = torch.randn(TOKENS, site.out_features, generator=random, dtype=torch.float64)
    rows = torch.linspace(0, site.out_features - 1, min(ROWS, site.out_features)).round().long()
    said_y, size = _as_said(said, values, folded, catalogue, x, base, rows)
    compiled = _as_compiled(folded, x.float(), base.float())[:, rows].double()
    name = said.operators[0]
    if not bool(torch.isfinite(compiled).all()):
        raise expected(_first_tensor(name), "values that float32 can compute with", "an overflow on ordinary input")
    slack = 8 * sqrt(site.in_features + folded.rank + 1) * EPSILON
    if not bool(((said_y - compiled).abs() <= slack * size + torch.finfo(torch.float32).tiny).all()):
        raise StoreBug(f"the compiled form of {type(name).__name__} at {site.path} is not what its file says")
    scale_in = [operator for operator in said.operators if isinstance(operator, Scale) and operator.of_input]
    if bool(scale_in) != (folded.sigma_in is not None):
        raise StoreBug(f"the input scale at {site.path} was lost")


def _as_compiled(folded: Folded, x: Tensor, base: Tensor) -> Tensor:
    terms = folded.terms
    y = base if terms.sigma is None else base * terms.sigma
    if terms.low_rank is not None:
        a, b = terms.low_rank
        y = y + (x @ a.T) @ b.T
    for w1, w2 in terms.krons:
        y = y + (w1 @ x.view(TOKENS, w1.shape[1], w2.shape[1]) @ w2.T).reshape(TOKENS, -1)
    return y if terms.beta is None else y + terms.beta


def _as_said(
    said: SiteOperators,
    values: Values,
    folded: Folded,
    catalogue: SiteCatalogue,
    x: Tensor,
    base: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rows asked for, in fp64, and the sum of the sizes of everything that was added up to each."""
    y, size = base[:, rows], base[:, rows].abs()
    for operator in said.operators:
        match operator:
            case LowRank(a, b, scale, None):
                down, up = values.read(a).double(), values.read(b)[rows].double() * scale
                y, size = y + (x @ down.T) @ up.T, size + (x.abs() @ down.abs().T) @ up.abs().T
            case Kron():
                delta, bulk = _kron_rows(operator, values, x, rows)
                y, size = y + delta, size + bulk
            case Scale(vector, of_input):
                if not of_input:
                    v = values.read(vector).reshape(-1)[rows].double()
                    y, size = y * v, size * v.abs()
            case Bias(vector, scale, absolute):
                v = values.read(vector).reshape(-1)[rows].double() * scale
                old = base_bias(folded.site, catalogue)[rows].double() if absolute else torch.zeros_like(v)
                y, size = y - old + v, size + v.abs() + old.abs()
    return y, size


def _kron_rows(kron: Kron, values: Values, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    (_, i1), (o2, i2) = kron.w1.shape, kron.w2.shape
    grid = x.view(TOKENS, i1, i2)
    results = []
    for absolute in (False, True):
        first, second = (
            _factor_rows(values, kron, "w1", rows // o2, absolute),
            _factor_rows(values, kron, "w2", rows % o2, absolute),
        )
        inside = grid.abs() if absolute else grid
        results.append(torch.einsum("kp,tpq,kq->tk", first, inside, second) * kron.scale)
    return results[0], results[1].abs()


def _factor_rows(values: Values, kron: Kron, which: str, rows: Tensor, absolute: bool) -> Tensor:
    left, right = read_factor(getattr(kron, which), values)
    taken = left[rows].double()
    if absolute:
        taken = taken.abs()
    if right is None:
        return taken
    return taken @ (right.double().abs() if absolute else right.double())


def _first_tensor(operator: Operator) -> str:
    match operator:
        case LowRank(_, b, _, _):
            return b.name
        case Kron(w1, _, _):
            return w1.left.name
        case Scale(vector, _) | Bias(vector, _, _):
            return vector.name
        case Sparse(index, _) | Rows(index, _) | Columns(index, _):
            return index.name
        case Dense(delta):
            return delta.name
        case Shared(_, inner, _):
            return inner.name
