"""PEFT ``BOFT``: a weight behind a rotation of the input in blocks, its outputs scaled: s ⊙ (W ⊕Rᵀ x) + bias.

Tensors at ``base_model.model.<module>.``: ``boft_R`` [1, blocks, b, b], whose skew part Q gives R = (I - Q)(I + Q)⁻¹,
and ``boft_s`` [out, 1]. More than one butterfly factor, [n, blocks, b, b], needs PEFT's CUDA extension and is refused.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.peft_oft import rotated
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import Dense, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "BOFT"
FACTORS = "butterflies of several factors are not served: PEFT has them with a CUDA extension only"
SERVES = (Served("BOFT", "2311.06243", "dense", "PEFT BOFT", refuses=f"convolutions; {FACTORS}"),)

BLOCKS, SCALE = "boft_R", "boft_s"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    # the tensor's own shape says how many factors there are: PEFT makes one of any number without its extension
    settings.ignore("init_weights", "boft_dropout", "boft_n_butterfly_factor")
    size, count = settings.integer("boft_block_size", 0), settings.integer("boft_block_num", 0)
    if bool(size) == bool(count):
        raise expected("boft_block_num", "either this or boft_block_size, the other 0", count, f"the other is {size}")
    targets = read_targets(settings, catalogue, METHOD, METHOD)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [BLOCKS, SCALE])
    sites = {site.path: _operators(found.by_site[site.path], site, size, count) for site in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, block_size: int, block_count: int) -> SiteOperators:
    blocks, wide, tall = tensors[BLOCKS], site.in_features, site.out_features
    if len(blocks.shape) == 4 and blocks.shape[0] > 1:
        raise expected(blocks.name, "one butterfly factor", list(blocks.shape), FACTORS)
    size = block_size or wide // block_count
    count = block_count or wide // block_size
    if size * count != wide:
        raise expected("boft_block_size", f"blocks that divide the {wide} inputs of {site.path}", f"{count} of {size}")
    require_shape(blocks, (1, count, size, size), sizes(site))
    require_shape(tensors[SCALE], (tall, 1), sizes(site))

    def change(blocks: "Tensor", scale: "Tensor", weight: "Tensor") -> "Tensor":
        import torch

        skew = (blocks[0] - blocks[0].transpose(1, 2)) / 2
        identity = torch.eye(size).expand_as(skew)
        rotations = torch.linalg.solve(identity + skew, identity - skew, left=False)
        return scale * rotated(weight, rotations) - weight

    sources = (blocks, tensors[SCALE])
    delta = Computed(blocks.name, (tall, wide), change, sources, (f"{site.path}.weight",))
    return SiteOperators((Dense(delta),), ("s W R - W",))
