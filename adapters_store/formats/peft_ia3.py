"""PEFT ``IA3``: a vector that scales the output of a linear, bias included, or the input of a feed-forward one.

Tensor at ``base_model.model.<module>.``: ``ia3_l`` [out, 1] scales the output, [1, in] the input. The shape decides,
and must agree with ``feedforward_modules``, whose entries PEFT matches as plain endings: ``wo`` also means ``two``.
"""

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_common import (
    COPY_ROLES,
    DIALECT,
    copies,
    fan_in_fan_out_notes,
    read_common,
)
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import matches_whole, target_sites
from weft.adapters_store.formats.tensors import by_module, require_exactly, require_shape
from weft.adapters_store.operators import ParsedAdapter, Scale, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo

METHOD = "IA3"

VECTOR = "ia3_l"

SERVES = (Served("(IA)³", "2205.05638", "scale", "PEFT IA3", survey=True),)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings)
    settings.ignore("init_ia3_weights")
    sites = target_sites(settings, catalogue, by_layer=False)
    feedforward = _feedforward(settings, sites)
    kinds = (catalogue.sites[catalogue.index[path]].kind for path in sites)
    notes = fan_in_fan_out_notes(settings, (kind for kind in kinds if kind != "lm_head"))
    settings.finish(METHOD)
    found = by_module(header, [VECTOR, *COPY_ROLES], catalogue)
    require_exactly(found, sites, [VECTOR])
    parsed: dict[str, SiteOperators] = {}
    for path in sites:
        site, vector = catalogue.sites[catalogue.index[path]], found[path][VECTOR]
        if path in feedforward:
            require_shape(vector, (1, site.in_features), "feedforward_modules names it, so it scales the input")
        else:
            why = "feedforward_modules does not name it, so it scales the output"
            require_shape(vector, (site.out_features, 1), why)
        parsed[path] = SiteOperators((Scale(vector, of_input=path in feedforward),))
    return ParsedAdapter(METHOD, DIALECT, parsed, copies(found), notes)


def _feedforward(settings: Settings, sites: tuple[str, ...]) -> set[str]:
    named = settings.names("feedforward_modules")
    if named is None:
        raise expected("feedforward_modules", "the names that PEFT writes when it saves", "none")
    if isinstance(named, str):
        return set(matches_whole(named, sites, "feedforward_modules"))
    return {path for path in sites if path.endswith(named)}
