"""PEFT ``C3A``: y += x Δᵀ where Δ is made of circulant blocks, each said by one row.

Tensor at ``base_model.model.<module>.``: ``c3a_kernel`` [out/b, in/b, b]; block (m, n) of Δ has k[m, n, (j - i) mod b]
/ in at row i and column j.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.operators import Dense, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "C3A"
SERVES = (Served("C3A", "2407.19342", "dense", "PEFT C3A"),)

KERNEL = "c3a_kernel"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights")
    allowed = {settings.integer("block_size"), *settings.integer_by_pattern("block_size_pattern").values()}
    targets = read_targets(settings, catalogue, METHOD, METHOD)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [KERNEL])
    sites = {site.path: _operators(found.by_site[site.path][KERNEL], site, allowed) for site in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(kernel: TensorRef, site: SiteInfo, allowed: set[int]) -> SiteOperators:
    wide, tall = site.in_features, site.out_features
    rows, columns, size = kernel.shape if len(kernel.shape) == 3 else (0, 0, 0)
    # which of the sizes a kernel has, its own shape says
    if (rows * size, columns * size) != (tall, wide) or size not in allowed:
        wanted = f"[{tall}/b, {wide}/b, b] for b = {' or '.join(str(size) for size in sorted(allowed))}"
        raise expected(kernel.name, wanted, list(kernel.shape), sizes(site))

    def blocks(kernel: "Tensor") -> "Tensor":
        import torch

        step = torch.arange(size)
        # [rows, columns, i, j] to [rows, i, columns, j]
        circulant = kernel[:, :, (step[None] - step[:, None]) % size]
        return circulant.transpose(1, 2).reshape(tall, wide) / wide

    return SiteOperators((Dense(Computed(kernel.name, (tall, wide), blocks, (kernel,))),), ("circulant blocks",))
