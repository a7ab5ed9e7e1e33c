"""PEFT ``SHIRA``: single elements of a weight, each moved by a number.

Tensors at ``base_model.model.<module>.``: ``shira_weight`` [n], ``shira_indices`` [2, n] int32, rows above columns,
with n = r·(in + out). How the places were chosen does not matter any more.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import ParsedAdapter, SiteOperators, Sparse
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "SHIRA"
SERVES = (Served("SHiRA", "2406.13175", "sparse", "PEFT SHIRA"),)

VALUES, INDICES = "shira_weight", "shira_indices"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights", "mask_type", "random_seed")
    rank = settings.integer("r")
    targets = read_targets(settings, catalogue, METHOD, "SHiRA", by_layer=False)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [VALUES, INDICES], integers=[INDICES])
    sites = {site.path: _operators(found.by_site[site.path], site, rank) for site in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, rank: int) -> SiteOperators:
    count, wide = rank * (site.in_features + site.out_features), site.in_features
    require_shape(tensors[VALUES], (count,), f"r is {rank}, {sizes(site)}")
    require_shape(tensors[INDICES], (2, count), f"r is {rank}, {sizes(site)}")

    def flat(places: "Tensor") -> "Tensor":
        rows, columns = places.long().unbind()
        # a column beyond the last one would be a place in the next row
        outside = columns[(columns < 0) | (columns >= wide)]
        if len(outside):
            raise expected(tensors[INDICES].name, f"columns from 0 to {wide - 1}", int(outside[0]))
        return rows * wide + columns

    def ascending(places: "Tensor") -> "Tensor":
        return flat(places).sort().values

    def in_that_order(values: "Tensor", places: "Tensor") -> "Tensor":
        return values[flat(places).argsort()]

    index = Computed(tensors[INDICES].name, (count,), ascending, (tensors[INDICES],))
    values = Computed(tensors[VALUES].name, (count,), in_that_order, (tensors[VALUES], tensors[INDICES]))
    return SiteOperators((Sparse(index, values),), ("rows and columns to flat indices",))
