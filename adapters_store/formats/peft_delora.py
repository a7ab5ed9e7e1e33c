"""PEFT ``DELORA``: y += x (B D A diag(w))ᵀ with D = diag(λ / (r ‖aᵢ‖ ‖bᵢ‖)), norms of at least 1e-4.

Tensors at ``base_model.model.<module>.``: ``delora_A`` [r, in], ``delora_B`` [out, r], ``delora_lambda`` [1],
``delora_w_norm`` [in], the norms of the weight's columns where it was trained. Everything goes into A.
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

METHOD = "DELORA"
SERVES = (Served("DeLoRA", "2503.18225", "low_rank", "PEFT DELORA"),)

A, B, LAMBDA, NORMS = ROLES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")

# λ as it began: what came of it is a tensor
TRAINING_ONLY = ("delora_lambda", "lambda_pattern", "module_dropout", "init_weights")
NORM_MIN = 1e-4


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore(*TRAINING_ONLY)
    targets = read_targets(settings, catalogue, METHOD, "DeLoRA")
    rank = settings.integer("r")
    ranks = by_pattern(settings.integer_by_pattern("rank_pattern"), rank, targets.paths, "rank_pattern")
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, ROLES)
    sites = {s.path: _operators(found.by_site[s.path], s, ranks[s.path]) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, rank: int) -> SiteOperators:
    why = f"r is {rank} here, {sizes(site)}"
    shapes = ((rank, site.in_features), (site.out_features, rank), (1,), (site.in_features,))
    for role, shape in zip(ROLES, shapes, strict=True):
        require_shape(tensors[role], shape, why)

    def scaled(a: "Tensor", b: "Tensor", bound: "Tensor", norms: "Tensor") -> "Tensor":
        lengths: Tensor = a.norm(dim=1).clamp(min=NORM_MIN) * b.norm(dim=0).clamp(min=NORM_MIN)
        return (bound / rank / lengths)[:, None] * a * norms

    a = Computed(tensors[A].name, (rank, site.in_features), scaled, tuple(tensors[role] for role in ROLES))
    return SiteOperators((LowRank(a, tensors[B]),), ("norms, lambda/r and weight norms into a",))
