"""PEFT ``BEFT``: a vector that is added to the output of a linear, whether that has a bias of its own or not.

Tensor at ``base_model.model.<module>.``: ``beft_bias`` [1, out].
"""

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import require_shape
from weft.adapters_store.operators import Bias, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo

METHOD = "BEFT"
SERVES = (Served("BEFT (BitFit of added biases)", "2509.15974", "bias", "PEFT BEFT", True, counts_as="BitFit"),)

VECTOR = "beft_bias"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights")
    targets = read_targets(settings, catalogue, METHOD, METHOD, by_layer=False)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [VECTOR])
    sites: dict[str, SiteOperators] = {}
    for site in targets.sites:
        vector = found.by_site[site.path][VECTOR]
        require_shape(vector, (1, site.out_features), sizes(site))
        sites[site.path] = SiteOperators((Bias(vector),))
    return adapter(METHOD, targets, found, sites, catalogue)
