"""Our own ``X_ROWS``: some rows or columns of a linear's weight are other ones, as FAR trains them.

Tensors at ``base_model.model.<linear>.``, the weight being [out, in] whatever the module stores. With ``axis`` ``out``:
``row_indices`` [k] int32 or int64, each once, in any order, ``rows_delta`` [k, in], and where wanted
``bias_rows_delta`` [k], what is added to the outputs of these rows. With ``axis`` ``in``: ``col_indices`` [k] and
``cols_delta`` [out, k]. Settings: ``axis`` and those of ``native_common``.
"""

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import Said, read_common
from weft.adapters_store.formats.native_parameters import spread
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, by_module, require_exactly, require_shape, require_site
from weft.adapters_store.operators import Bias, Columns, ParsedAdapter, Rows
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo

METHOD = "X_ROWS"

ROW_INDICES, ROWS, BIAS_ROWS = "row_indices", "rows_delta", "bias_rows_delta"
COL_INDICES, COLS = "col_indices", "cols_delta"
ROLES = {"out": (ROW_INDICES, ROWS), "in": (COL_INDICES, COLS)}

SERVES = (Served("FAR", "2205.01730", "rows, columns, bias", "weft X_ROWS", survey=True),)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    axis = settings.text("axis", required=True)
    if axis not in ROLES:
        raise expected("axis", "out or in", repr(axis))
    settings.finish(METHOD)
    roles = ROLES[axis]
    served = (*roles, BIAS_ROWS) if axis == "out" else roles
    found = by_module(header, served, catalogue, [roles[0]])
    require_exactly(found, found, roles, "the module has another tensor")
    said = Said()
    for module, tensors in found.items():
        index = tensors[roles[0]]
        site = require_site(module, index, catalogue)
        if len(index.shape) != 1:
            raise expected(index.name, "one axis", list(index.shape))
        _add(said, site, tensors, axis)
    return said.parsed(METHOD, catalogue)


def _add(said: Said, site: SiteInfo, tensors: Roles, axis: str) -> None:
    index, delta = (tensors[role] for role in ROLES[axis])
    count, limit = index.elements, site.out_features if axis == "out" else site.in_features
    if count > limit:
        raise expected(index.name, f"at most {limit} indices", count)
    why = f"{count} indices, {site.path} is {site.in_features} -> {site.out_features}"
    if axis == "in":
        require_shape(delta, (site.out_features, count), why)
        said.at(site.path, Columns(index, delta))
        return
    require_shape(delta, (count, site.in_features), why)
    said.at(site.path, Rows(index, delta))
    bias = tensors.get(BIAS_ROWS)
    if bias is not None:
        require_shape(bias, (count,), why)
        said.at(site.path, Bias(spread(index, bias, site.out_features, ascending=False)))
