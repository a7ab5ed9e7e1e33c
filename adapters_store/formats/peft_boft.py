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
    # the tensor's own shape says how many blocks and factors there are
    settings.ignore("init_weights", "boft_dropout", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor")
    targets = read_targets(settings, catalogue, METHOD, METHOD)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [BLOCKS, SCALE])
    sites = {site.path: _operators(found.by_site[site.path], site) for site in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo) -> SiteOperators:
    blocks, wide, tall = tensors[BLOCKS], site.in_features, site.out_features
    factors, count, size, again = blocks.shape if len(blocks.shape) == 4 else (0, 0, 0, 0)
    if factors > 1:
        raise expected(blocks.name, "one butterfly factor", factors, FACTORS)
    if factors == 0 or size != again or count * size != wide:
        raise expected(blocks.name, f"shape [1, {wide}/b, b, b]", list(blocks.shape), sizes(site))
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
