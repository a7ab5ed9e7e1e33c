"""PEFT ``TINYLORA``: a low-rank pair out of the weight's singular vectors, with Σ vᵢ Pᵢ between its two halves.

Tensors at ``base_model.model.<module>.``: ``tinylora_A`` [r, in], ``tinylora_B`` [out, r], the random ``tinylora_P``
[u, r, r]; and ``base_model.tinylora_v.<group>`` [u], all that was trained. Groups are runs of targeted modules in the
order in which the model declares them, as many as ``weight_tying`` leaves. r is at most the smaller size of a module.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import Targets, adapter, as_declared, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "TINYLORA"
NOT_SAVED = "the random projections are not in the file then, and other machines may draw others"
SERVES = (Served("TinyLoRA", "2602.04118", "low_rank", "PEFT TINYLORA", refuses=f"save_projection=false: {NOT_SAVED}"),)

A, B, P = ROLES = ("tinylora_A", "tinylora_B", "tinylora_P")
V = "tinylora_v"

TRAINING_ONLY = ("projection_seed", "init_v_bound", "tinylora_dropout", "init_weights")


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore(*TRAINING_ONLY)
    settings.choice("save_projection", (True,), True, NOT_SAVED)
    rank, length, tying = settings.integer("r"), settings.integer("u"), settings.number("weight_tying")
    if tying > 1:
        raise expected("weight_tying", "a number from 0 to 1", tying)
    targets = read_targets(settings, catalogue, METHOD, "TinyLoRA", conv1d=True)
    settings.finish(METHOD)
    groups = _groups(targets, catalogue, tying)
    found = read_tensors(header, catalogue, targets, ROLES, shared=dict.fromkeys(groups.values()))
    sites: dict[str, SiteOperators] = {}
    for site in targets.sites:
        trained = found.shared[groups[site.path]]
        require_shape(trained, (length,), f"u is {length}")
        sites[site.path] = _operators(found.by_site[site.path], trained, site, rank, length)
    return adapter(METHOD, targets, found, sites, catalogue)


def _groups(targets: Targets, catalogue: CatalogueInfo, tying: float) -> dict[str, str]:
    """The trained vector of each site."""
    ordered = as_declared(targets, catalogue)
    groups = max(1, round(len(ordered) * (1 - tying)))
    size = max(1, len(ordered) // groups)
    return {site.path: f"{V}.{min(i // size, groups - 1)}" for i, site in enumerate(ordered)}


def _operators(tensors: Roles, trained: TensorRef, site: SiteInfo, rank: int, length: int) -> SiteOperators:
    kept = min(rank, site.in_features, site.out_features)
    why = f"r is {rank}, u {length}, {sizes(site)}"
    require_shape(tensors[A], (kept, site.in_features), why)
    require_shape(tensors[B], (site.out_features, kept), why)
    require_shape(tensors[P], (length, kept, kept), why)
    a = Computed(tensors[A].name, (kept, site.in_features), _mixed, (trained, tensors[P], tensors[A]))
    return SiteOperators((LowRank(a, tensors[B]),), ("v and P into a",))


def _mixed(v: "Tensor", p: "Tensor", a: "Tensor") -> "Tensor":
    return (v[:, None, None] * p).sum(dim=0) @ a
