"""PEFT ``MISS``: inputs whose places are equal modulo r are added up, then multiplied: y += (Σ of blocks of x) D.

Tensor at ``base_model.model.<module>.``: ``miss_block`` D [r, out], or with ``init_weights="mini"`` [r, mini_r], whose
columns repeat. As a low-rank pair: A[k, j] = 1 where j mod r = k, B = Dᵀ. With ``init_weights="bat"`` it is [out/r, r,
r], and the weight's blocks W [r, r] become W + W Dᵢ + Dᵢ, with Dᵢ that of their rows: a dense delta.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import require_shape
from weft.adapters_store.operators import Dense, LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "MISS"
SERVES = (
    Served("MiSS", "2409.15371", "low_rank", "PEFT MISS, mini"),
    Served("MiSS", "2409.15371", "dense", "PEFT MISS, bat"),
)

BLOCK = "miss_block"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("miss_dropout")
    form = settings.choice("init_weights", (True, False, "mini", "bat"), True)
    rank = settings.integer("r")
    repeats = settings.optional_integer("mini_r") if form == "mini" else None
    settings.ignore("mini_r")
    targets = read_targets(settings, catalogue, METHOD, "MiSS")
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [BLOCK])
    blocks = {site.path: found.by_site[site.path][BLOCK] for site in targets.sites}
    if form == "bat":
        sites = {site.path: _multiplied(blocks[site.path], site, rank) for site in targets.sites}
    else:
        sites = {site.path: _operators(blocks[site.path], site, rank, repeats) for site in targets.sites}
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


def _multiplied(block: TensorRef, site: SiteInfo, rank: int) -> SiteOperators:
    wide, tall = site.in_features, site.out_features
    if wide % rank or tall % rank:
        raise expected("r", f"a divisor of both sizes of {site.path}", rank, sizes(site))
    require_shape(block, (tall // rank, rank, rank), f"r is {rank}, {sizes(site)}")

    def delta(block: "Tensor", weight: "Tensor") -> "Tensor":
        blocks = weight.reshape(tall // rank, rank, wide // rank, rank).transpose(1, 2)
        by_rows = block[:, None]
        return (blocks @ by_rows + by_rows).transpose(1, 2).reshape(tall, wide)

    change = Computed(block.name, (tall, wide), delta, (block,), (f"{site.path}.weight",))
    return SiteOperators((Dense(change),), ("W D + D by blocks",))
