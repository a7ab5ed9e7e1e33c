"""PEFT ``MISS``: inputs whose places are equal modulo r are added up, then multiplied: y += (Σ of blocks of x) D.

Tensor at ``base_model.model.<module>.``: ``miss_block`` D [r, out], or with ``init_weights="mini"`` [r, mini_r], whose
columns repeat. As a low-rank pair: A[k, j] = 1 where j mod r = k, B = Dᵀ.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
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

METHOD = "MISS"
BAT = "bat multiplies blocks of the weight, which would be a dense matrix per linear"
SERVES = (Served("MiSS", "2409.15371", "low_rank", "PEFT MISS, mini", refuses=f'init_weights="bat": {BAT}'),)

BLOCK = "miss_block"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("miss_dropout")
    form = settings.choice("init_weights", (True, False, "mini"), True, BAT)
    rank = settings.integer("r")
    repeats = settings.optional_integer("mini_r") if form == "mini" else None
    settings.ignore("mini_r")
    targets = read_targets(settings, catalogue, METHOD, "MiSS")
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [BLOCK])
    sites = {s.path: _operators(found.by_site[s.path][BLOCK], s, rank, repeats) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(block: TensorRef, site: SiteInfo, rank: int, period: int | None) -> SiteOperators:
    wide, tall = site.in_features, site.out_features
    require_shape(block, (rank, period or tall), f"r is {rank}, mini_r {period or 'unused'}, {sizes(site)}")
    if period and tall % period:
        raise expected("mini_r", f"a divisor of the {tall} outputs of {site.path}", period)

    def a() -> "Tensor":
        import torch

        return (torch.arange(wide) % rank == torch.arange(rank)[:, None]).float()

    def b(block: "Tensor") -> "Tensor":
        return (block.repeat(1, tall // period) if period else block).T

    pair = LowRank(Computed(block.name, (rank, wide), a, ()), Computed(block.name, (tall, rank), b, (block,)))
    return SiteOperators((pair,), ("sum of blocks as a",))
