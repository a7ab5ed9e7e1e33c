"""PEFT ``UNILORA``: low-rank pairs whose every element is one of few trained numbers, scaled by how often that is used.

Tensors: ``base_model.unilora_theta_d`` [length], all that was trained; with ``save_indices`` also, at
``base_model.model.<module>.``, ``unilora_indices_A`` [r, in], ``unilora_indices_B`` [out, r] int64 and
``unilora_scales_A``, ``unilora_scales_B`` of the same shapes. Without it PEFT draws the indices from ``proj_seed``
when it loads: a shuffle of balanced indices by numpy, dealt out to the targeted modules in the order in which the
model declares them, A before B; the scales are 1/√(uses). That is repeated here.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, as_declared, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "UNILORA"
SERVES = (Served("Uni-LoRA", "2506.00799", "low_rank (expanded)", "PEFT UNILORA, with and without save_indices"),)

TRAINED = "unilora_theta_d"
INDICES_A, INDICES_B = "unilora_indices_A", "unilora_indices_B"
SCALES_A, SCALES_B = "unilora_scales_A", "unilora_scales_B"

TRAINING_ONLY = ("unilora_dropout", "init_theta_d_bound", "init_weights")


@dataclass(frozen=True)
class _Dealt:
    """Indices for all elements of all pairs, made when a value is first read."""

    count: int
    length: int
    seed: int
    places: dict[str, int] = field(default_factory=dict)

    @cached_property
    def indices(self) -> "Tensor":
        """[count], as PEFT's ``generate_index`` makes them."""
        import numpy as np
        import torch

        random = np.random.default_rng(self.seed)
        whole, rest = divmod(self.count, self.length)
        data = np.repeat(np.arange(self.length), whole)
        if rest:
            data = np.concatenate([data, random.choice(self.length, size=rest, replace=False)])
        random.shuffle(data)
        return torch.as_tensor(data, dtype=torch.long)

    @cached_property
    def scales(self) -> "Tensor":
        """[length], for each trained number; 0 for those that nothing uses."""
        uses = self.indices.bincount(minlength=self.length)
        return uses.float().rsqrt().where(uses > 0, 0.0)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore(*TRAINING_ONLY)
    rank, length = settings.integer("r"), settings.integer("theta_d_length")
    seed, saved = settings.integer("proj_seed", 0), settings.flag("save_indices")
    targets = read_targets(settings, catalogue, METHOD, "Uni-LoRA", conv1d=True)
    settings.finish(METHOD)
    roles = [INDICES_A, INDICES_B, SCALES_A, SCALES_B] if saved else []
    found = read_tensors(header, catalogue, targets, roles, integers=[INDICES_A, INDICES_B], shared=[TRAINED])
    trained = found.shared[TRAINED]
    require_shape(trained, (length,), f"theta_d_length is {length}")
    if saved:
        sites = {s.path: _from_file(found.by_site[s.path], trained, s, rank) for s in targets.sites}
    else:
        ordered = as_declared(targets, catalogue)
        places: dict[str, int] = {}
        at = 0
        for site in ordered:
            places[site.path] = at
            at += rank * (site.in_features + site.out_features)
        dealt = _Dealt(at, length, seed, places)
        sites = {site.path: _from_seed(dealt, trained, site, rank) for site in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _from_file(tensors: Roles, trained: TensorRef, site: SiteInfo, rank: int) -> SiteOperators:
    pair: list[Computed] = []
    shapes = (rank, site.in_features), (site.out_features, rank)
    for shape, index, scales in zip(shapes, (INDICES_A, INDICES_B), (SCALES_A, SCALES_B), strict=True):
        for role in (index, scales):
            require_shape(tensors[role], shape, f"r is {rank}, {sizes(site)}")
        pair.append(_picked(trained, tensors[index], tensors[scales], shape))
    return SiteOperators((LowRank(pair[0], pair[1]),), ("trained numbers into a and b",))


def _picked(trained: TensorRef, index: TensorRef, scales: TensorRef, shape: tuple[int, int]) -> Computed:
    def pick(numbers: "Tensor", indices: "Tensor", factors: "Tensor") -> "Tensor":
        outside = indices[(indices < 0) | (indices >= len(numbers))]
        if len(outside):
            raise expected(index.name, f"indices from 0 to {len(numbers) - 1}", int(outside[0]))
        return numbers[indices.long()] * factors

    return Computed(index.name, shape, pick, (trained, index, scales))


def _from_seed(dealt: _Dealt, trained: TensorRef, site: SiteInfo, rank: int) -> SiteOperators:
    start = dealt.places[site.path]
    pair: list[Computed] = []
    for shape in ((rank, site.in_features), (site.out_features, rank)):
        pair.append(_drawn(dealt, trained, start, shape))
        start += shape[0] * shape[1]
    return SiteOperators((LowRank(pair[0], pair[1]),), ("trained numbers into a and b, indices drawn from proj_seed",))


def _drawn(dealt: _Dealt, trained: TensorRef, start: int, shape: tuple[int, int]) -> Computed:
    def pick(numbers: "Tensor") -> "Tensor":
        indices = dealt.indices[start : start + shape[0] * shape[1]].view(shape)
        return numbers[indices] * dealt.scales[indices]

    return Computed(trained.name, shape, pick, (trained,))
