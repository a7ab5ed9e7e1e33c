"""PEFT ``DEFT``: a subspace of the outputs is taken out of the weight and replaced: y += x (Q (s·R - P'ᵀ W))ᵀ.

Tensors at ``base_model.model.<module>.``: ``deft_P`` [out, r], ``deft_R`` [r, in]; r at most the outputs of a module.
``decomposition_method`` relu: Q = P and P' = relu(P); qr: both are the orthogonal factor of P. s = alpha/r, or 1
without alpha. With ``para`` (PaRa) the subspace is only taken out, and there is no R.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "DEFT"
RELU, QR = "relu", "qr"
SERVES = (Served("DEFT, PaRa", "PEFT 0.21", "low_rank", "PEFT DEFT, para", refuses="convolutions"),)

P, R = "deft_P", "deft_R"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights", "init_scale", "deft_dropout")
    rank, alpha = settings.integer("r"), settings.optional_number("alpha")
    method, removes = settings.choice("decomposition_method", (RELU, QR), RELU), settings.flag("para")
    targets = read_targets(settings, catalogue, METHOD, METHOD, conv1d=True)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [P] if removes else [P, R])
    sites = {s.path: _operators(found.by_site[s.path], s, rank, alpha or None, method) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, rank: int, alpha: float | None, method: str) -> SiteOperators:
    kept = min(rank, site.out_features)
    scale = alpha / kept if alpha is not None else 1.0
    why = f"r is {rank}, {sizes(site)}"
    require_shape(tensors[P], (site.out_features, kept), why)
    injected = tensors.get(R)
    if injected is not None:
        require_shape(injected, (kept, site.in_features), why)

    def rows(p: "Tensor", *rest: "Tensor") -> "Tensor":
        removed = (p.relu() if method == RELU else _orthogonal(p)).T @ rest[-1]
        return rest[0] * scale - removed if injected is not None else -removed

    sources = (tensors[P], *([injected] if injected is not None else []))
    a = Computed(tensors[P].name, (kept, site.in_features), rows, sources, (f"{site.path}.weight",))
    b = tensors[P] if method == RELU else Computed(tensors[P].name, tensors[P].shape, _orthogonal, (tensors[P],))
    return SiteOperators((LowRank(a, b),), ("projection of W into a",))


def _orthogonal(p: "Tensor") -> "Tensor":
    import torch

    q: Tensor = torch.linalg.qr(p)[0]
    return q
