"""PEFT ``HRA``: the weight behind a chain of reflections of the input, W (I - 2 u₁u₁ᵀ) … (I - 2 uᵣuᵣᵀ).

Tensor at ``base_model.model.<module>.``: ``hra_u`` [in, r], whose columns are made unit vectors. The chain is
I - U T Uᵀ with T⁻¹ = ½I + the part of UᵀU above its diagonal (compact WY form), so it is a low-rank pair: A = Uᵀ,
B = -W U T. With ``apply_GS`` the columns are made orthogonal one after the other, and T = 2I.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import require_shape
from weft.adapters_store.operators import LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "HRA"
SERVES = (Served("HRA", "2405.17484", "low_rank", "PEFT HRA, apply_GS", refuses="convolutions"),)

VECTORS = "hra_u"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights")
    rank, orthogonal = settings.integer("r"), settings.flag("apply_GS")
    targets = read_targets(settings, catalogue, METHOD, METHOD)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [VECTORS])
    sites = {s.path: _operators(found.by_site[s.path][VECTORS], s, rank, orthogonal) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(vectors: TensorRef, site: SiteInfo, rank: int, orthogonal: bool) -> SiteOperators:
    require_shape(vectors, (site.in_features, rank), f"r is {rank}, {sizes(site)}")
    unit: Callable[[Tensor], Tensor] = _orthonormal if orthogonal else _units

    def a(u: "Tensor") -> "Tensor":
        return unit(u.double()).T

    def b(u: "Tensor", weight: "Tensor") -> "Tensor":
        q = unit(u.double())
        chained = 2 * q if orthogonal else q @ _chain(q)
        return -(weight @ chained.float())

    pair = LowRank(
        Computed(vectors.name, (rank, site.in_features), a, (vectors,)),
        Computed(vectors.name, (site.out_features, rank), b, (vectors,), (f"{site.path}.weight",)),
    )
    return SiteOperators((pair,), ("reflections as low_rank",))


def _units(u: "Tensor") -> "Tensor":
    lengths: Tensor = u.norm(dim=0)
    return u / lengths


def _orthonormal(u: "Tensor") -> "Tensor":
    import torch

    columns: list[Tensor] = []
    for column in u.unbind(dim=1):
        rest = column
        for earlier in columns:
            rest = rest - (earlier @ rest) * earlier
        columns.append(rest / rest.norm())
    return torch.stack(columns, dim=1)


def _chain(q: "Tensor") -> "Tensor":
    """T [r, r], upper triangular."""
    import torch

    half = torch.eye(q.shape[1], dtype=q.dtype) / 2
    chained: Tensor = torch.linalg.inv((q.T @ q).triu(1) + half)
    return chained
