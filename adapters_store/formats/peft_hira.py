"""PEFT ``HIRA``: y += x (W ⊙ (B A))ᵀ, the weight times a low-rank matrix element by element.

Tensors at ``base_model.model.<module>.``: ``hira_A`` [r, in], ``hira_B`` [out, r].
"""

from typing import TYPE_CHECKING

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import by_pattern
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import Dense, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "HIRA"
SERVES = (Served("HiRA", "OpenReview TwJrTz9cRS", "dense", "PEFT HIRA", refuses="input embeddings, convolutions"),)

A, B = "hira_A", "hira_B"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights", "hira_dropout")
    targets = read_targets(settings, catalogue, METHOD, "HiRA", conv1d=True)
    rank = settings.integer("r")
    ranks = by_pattern(settings.integer_by_pattern("rank_pattern"), rank, targets.paths, "rank_pattern")
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [A, B])
    sites: dict[str, SiteOperators] = {}
    for site in targets.sites:
        tensors = found.by_site[site.path]
        # PEFT 0.21 reads rank_pattern but then gives every module of a first adapter the rank r
        plain = tensors[A].shape[:1] == (rank,)
        sites[site.path] = _operators(tensors, site, rank if plain else ranks[site.path])
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, rank: int) -> SiteOperators:
    why = f"r is {rank} here, {sizes(site)}"
    require_shape(tensors[A], (rank, site.in_features), why)
    require_shape(tensors[B], (site.out_features, rank), why)
    shape, sources = (site.out_features, site.in_features), (tensors[A], tensors[B])
    delta = Computed(tensors[A].name, shape, _times_weight, sources, (f"{site.path}.weight",))
    return SiteOperators((Dense(delta),), ("W times B A",))


def _times_weight(a: "Tensor", b: "Tensor", weight: "Tensor") -> "Tensor":
    return weight * (b @ a)
