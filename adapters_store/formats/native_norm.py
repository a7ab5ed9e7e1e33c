"""Our own ``X_NORM``: weights and biases of norms in the place of the backbone's, which is LN tuning.

Tensors at ``base_model.model.<norm>.``: ``norm_weight`` [d] as the backbone stores it (Gemma multiplies by 1 + it),
``norm_bias`` [d] where the norm has one, either or both. Settings: those of ``native_common``.
"""

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import Said, norm_at, read_common, require_norm_vector
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, by_module
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo

METHOD = "X_NORM"

WEIGHT, BIAS = "norm_weight", "norm_bias"

SERVES = (Served("LN tuning", "2303.15647", "norm_override", "weft X_NORM", survey=True),)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    settings.finish(METHOD)
    said = Said()
    for module, tensors in by_module(header, [WEIGHT, BIAS], catalogue).items():
        add_norm(said, module, tensors, catalogue)
    return said.parsed(METHOD, catalogue)


def add_norm(said: Said, module: str, tensors: Roles, catalogue: CatalogueInfo) -> None:
    """The weight and the bias of one norm, as far as they are among these tensors."""
    weight, bias = tensors.get(WEIGHT), tensors.get(BIAS)
    for tensor in (weight, bias):
        if tensor is not None:
            require_norm_vector(tensor, norm_at(module, tensor, catalogue), of_bias=tensor is bias)
    if weight is not None or bias is not None:
        said.norm(module, weight, bias)
