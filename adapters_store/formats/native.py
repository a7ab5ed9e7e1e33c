"""Weft's own formats, by their ``peft_type``."""

from collections.abc import Callable, Mapping

from weft.adapters_store.formats import (
    native_apt,
    native_bitfit,
    native_bottleneck,
    native_dense,
    native_difffit,
    native_glora,
    native_ipt,
    native_krona_b,
    native_lst,
    native_norm,
    native_rows,
    native_said,
    native_sparse,
    native_union,
)
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo

PARSERS: Mapping[str, Callable[[Settings, Header, CatalogueInfo], ParsedAdapter]] = {
    module.METHOD: module.parse
    for module in (
        native_bitfit,
        native_norm,
        native_sparse,
        native_rows,
        native_dense,
        native_difffit,
        native_glora,
        native_ipt,
        native_apt,
        native_bottleneck,
        native_krona_b,
        native_lst,
        native_said,
        native_union,
    )
}
