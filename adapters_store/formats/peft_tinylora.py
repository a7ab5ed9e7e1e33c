"""PEFT ``TINYLORA``: a low-rank pair out of the weight's singular vectors, with Σ vᵢ Pᵢ between its two halves.

Tensors at ``base_model.model.<module>.``: ``tinylora_A`` [r, in], ``tinylora_B`` [out, r], the random ``tinylora_P``
[u, r, r]; and ``base_model.tinylora_v.<group>`` [u], all that was trained. Groups are runs of targeted modules in the
order in which the model declares them, as many as ``weight_tying`` leaves. r is at most the smaller size of a module.
Without ``save_projection`` each module's P is not in the file but normal with deviation 1/√r, drawn from
``projection_seed`` plus the number of the module in that order (``drawn``); A and B are saved all the same.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.drawn import REDRAWN, Drawn
from weft.adapters_store.formats.peft_linears import Targets, adapter, as_declared, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import PREFIX, Roles, require_shape
from weft.adapters_store.operators import LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Generator, Tensor

METHOD = "TINYLORA"
SERVES = (Served("TinyLoRA", "2602.04118", "low_rank", f"PEFT TINYLORA, {REDRAWN}"),)

A, B, P = "tinylora_A", "tinylora_B", "tinylora_P"
V = "tinylora_v"

TRAINING_ONLY = ("init_v_bound", "tinylora_dropout", "init_weights")


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore(*TRAINING_ONLY)
    saved = settings.choice("save_projection", (True, False), True)
    seed = settings.optional_integer("projection_seed", 0) if saved else settings.integer("projection_seed", 0)
    rank, length, tying = settings.integer("r"), settings.integer("u"), settings.number("weight_tying")
    if tying > 1:
        raise expected("weight_tying", "a number from 0 to 1", tying)
    targets = read_targets(settings, catalogue, METHOD, "TinyLoRA", conv1d=True)
    settings.finish(METHOD)
    groups = _groups(targets, catalogue, tying)
    roles = (A, B, P) if saved else (A, B)
    found = read_tensors(header, catalogue, targets, roles, shared=dict.fromkeys(groups.values()))
    sites: dict[str, SiteOperators] = {}
    for number, site in enumerate(as_declared(targets, catalogue)):
        trained = found.shared[groups[site.path]]
        require_shape(trained, (length,), f"u is {length}")
        tensors, shape = found.by_site[site.path], (length, *[min(rank, site.in_features, site.out_features)] * 2)
        if P in tensors:
            require_shape(tensors[P], shape, f"r is {rank}, u {length}, {sizes(site)}")
        random = tensors[P] if seed is None or P in tensors else _projection(seed + number, shape, site)
        sites[site.path] = _operators(tensors, trained, random, site)
    return adapter(METHOD, targets, found, sites, catalogue)


def _groups(targets: Targets, catalogue: CatalogueInfo, tying: float) -> dict[str, str]:
    """The trained vector of each site."""
    ordered = as_declared(targets, catalogue)
    groups = max(1, round(len(ordered) * (1 - tying)))
    size = max(1, len(ordered) // groups)
    return {site.path: f"{V}.{min(i // size, groups - 1)}" for i, site in enumerate(ordered)}


def _projection(seed: int, shape: tuple[int, ...], site: SiteInfo) -> Computed:
    def draw(random: "Generator") -> "tuple[Tensor, ...]":
        import torch

        return (torch.normal(0.0, 1 / shape[-1] ** 0.5, shape, generator=random),)

    return Drawn(seed, (shape,), draw).value(0, f"{PREFIX}{site.path}.{P}")


def _operators(tensors: Roles, trained: TensorRef, random: Value, site: SiteInfo) -> SiteOperators:
    kept = random.shape[-1]
    require_shape(tensors[A], (kept, site.in_features), f"r is {kept}, {sizes(site)}")
    require_shape(tensors[B], (site.out_features, kept), f"r is {kept}, {sizes(site)}")
    a = Computed(tensors[A].name, (kept, site.in_features), _mixed, (trained, random, tensors[A]))
    return SiteOperators((LowRank(a, tensors[B]),), ("v and P into a",))


def _mixed(v: "Tensor", p: "Tensor", a: "Tensor") -> "Tensor":
    return (v[:, None, None] * p).sum(dim=0) @ a
