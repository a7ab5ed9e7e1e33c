"""PEFT ``GRALORA``: the weight in k × k blocks, each with a low-rank pair of its own of rank r/k; y += s·x Δᵀ.

Tensors at ``base_model.model.<module>.``: ``gralora_A`` [k, in/k, r], ``gralora_B`` [k, r, out/k]; with ``hybrid_r``
also ``gralora_A_general.weight`` [hybrid_r, in] and ``gralora_B_general.weight`` [out, hybrid_r]. s = alpha/(r +
hybrid_r). The block of inputs n and outputs m reads columns m·r/k… of A[n] and rows n·r/k… of B[m], so all blocks
together are a pair of rank k·r whose rows and columns are zero outside their blocks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
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

METHOD = "GRALORA"
SERVES = (Served("GraLoRA", "2505.20355", "low_rank", "PEFT GRALORA, hybrid_r"),)

A, B = "gralora_A", "gralora_B"
GENERAL_A, GENERAL_B = "gralora_A_general.weight", "gralora_B_general.weight"


@dataclass(frozen=True, slots=True)
class _Ranks:
    """r, hybrid_r, k and alpha."""

    rank: int
    general: int
    blocks: int
    alpha: float


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("gralora_dropout", "init_weights")
    ranks = _Ranks(
        settings.integer("r"),
        settings.optional_integer("hybrid_r", 0) or 0,
        settings.integer("gralora_k"),
        settings.number("alpha"),
    )
    if ranks.rank % ranks.blocks:
        raise expected("gralora_k", f"a divisor of r, which is {ranks.rank}", ranks.blocks)
    targets = read_targets(settings, catalogue, METHOD, "GraLoRA", conv1d=True)
    settings.finish(METHOD)
    roles = [A, B, *([GENERAL_A, GENERAL_B] if ranks.general else [])]
    found = read_tensors(header, catalogue, targets, roles)
    sites = {site.path: _operators(found.by_site[site.path], site, ranks) for site in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, ranks: _Ranks) -> SiteOperators:
    wide, tall, k, rank = site.in_features, site.out_features, ranks.blocks, ranks.rank
    if wide % k or tall % k:
        raise expected("gralora_k", f"a divisor of both sizes ({sizes(site)})", k)
    why = f"r is {rank}, gralora_k {k}, {sizes(site)}"
    require_shape(tensors[A], (k, wide // k, rank), why)
    require_shape(tensors[B], (k, rank, tall // k), why)
    scale = ranks.alpha / (rank + ranks.general)
    pairs = [
        LowRank(
            Computed(tensors[A].name, (k * rank, wide), _a, (tensors[A],)),
            Computed(tensors[B].name, (tall, k * rank), _b, (tensors[B],)),
            scale,
        )
    ]
    if ranks.general:
        require_shape(tensors[GENERAL_A], (ranks.general, wide), f"hybrid_r is {ranks.general}, {sizes(site)}")
        require_shape(tensors[GENERAL_B], (tall, ranks.general), f"hybrid_r is {ranks.general}, {sizes(site)}")
        pairs.append(LowRank(tensors[GENERAL_A], tensors[GENERAL_B], scale))
    return SiteOperators(tuple(pairs), ("alpha/r", "blocks as low_rank"))


def _a(blocks: "Tensor") -> "Tensor":
    """[k, in/k, r] to [(m, n, s), in]: row (m, n, s) is A[n][:, m·r/k + s] at the inputs of block n."""
    k, width, rank = blocks.shape
    rows = blocks.new_zeros(k, k, rank // k, k, width)
    for n in range(k):
        rows[:, n, :, n] = blocks[n].T.view(k, rank // k, width)
    return rows.view(k * rank, k * width)


def _b(blocks: "Tensor") -> "Tensor":
    """[k, r, out/k] to [out, (m, n, s)]: column (m, n, s) is B[m][n·r/k + s] at the outputs of block m."""
    k, rank, width = blocks.shape
    columns = blocks.new_zeros(k, width, k, rank)
    for m in range(k):
        columns[m, :, m] = blocks[m].T
    return columns.view(k * width, k * rank)
