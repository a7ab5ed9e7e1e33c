"""PEFT ``LOHA``: y += (alpha/r)·x ((w1a w1b) ⊙ (w2a w2b))ᵀ, which is one low-rank pair of rank r².

Tensors at ``base_model.model.<module>.``: ``hada_w1_a`` [out, r], ``hada_w1_b`` [r, in], and the same for ``hada_w2``.
The pair: column (i, j) of B is w1a[:, i] ⊙ w2a[:, j], row (i, j) of A is w1b[i] ⊙ w2b[j].
"""

from typing import TYPE_CHECKING

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import by_pattern
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "LOHA"
SERVES = (Served("LoHa", "2108.06098", "low_rank", "PEFT LOHA", refuses="convolutions"),)

W1_A, W1_B, W2_A, W2_B = ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

TRAINING_ONLY = ("rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d")


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore(*TRAINING_ONLY)
    targets = read_targets(settings, catalogue, METHOD, "LoHa")
    rank, alpha, paths = settings.integer("r"), settings.number("alpha"), targets.paths
    ranks = by_pattern(settings.integer_by_pattern("rank_pattern"), rank, paths, "rank_pattern")
    alphas = by_pattern(settings.number_by_pattern("alpha_pattern"), alpha, paths, "alpha_pattern")
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, ROLES)
    sites = {s.path: _operators(found.by_site[s.path], s, ranks[s.path], alphas[s.path]) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, rank: int, alpha: float) -> SiteOperators:
    why = f"r is {rank} here, {sizes(site)}"
    for role in (W1_A, W2_A):
        require_shape(tensors[role], (site.out_features, rank), why)
    for role in (W1_B, W2_B):
        require_shape(tensors[role], (rank, site.in_features), why)
    a = Computed(tensors[W1_B].name, (rank * rank, site.in_features), _a, (tensors[W1_B], tensors[W2_B]))
    b = Computed(tensors[W1_A].name, (site.out_features, rank * rank), _b, (tensors[W1_A], tensors[W2_A]))
    return SiteOperators((LowRank(a, b, alpha / rank),), ("alpha/r", "hadamard product as low_rank"))


def _a(first: "Tensor", second: "Tensor") -> "Tensor":
    return (first[:, None] * second[None]).flatten(0, 1)


def _b(first: "Tensor", second: "Tensor") -> "Tensor":
    return (first[:, :, None] * second[:, None]).flatten(1)
