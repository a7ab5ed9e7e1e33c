"""Our own ``X_DENSE``: a delta of whole parameters, for what is no adapter: full fine-tuning, GaLore, attention tuning.

Tensors at ``base_model.model.<parameter>.``: ``delta``, of the parameter's own shape. Every weight of a linear takes as
much memory as the backbone's, and counts against the adapters' budget as such. Settings: ``origin``, text that informs
only; ``tied`` (``native_parameters``), and those of ``native_common``.
"""

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import Said, read_common
from weft.adapters_store.formats.native_parameters import BIAS, WEIGHT, add, parameter_at, read_tied
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import by_module, require_shape
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo

METHOD = "X_DENSE"

ROLES = {f"{name}.delta": name for name in (WEIGHT, BIAS)}

SERVES = (
    Served("GaLore", "2403.03507", "dense, bias, norm_override, row_override", "weft X_DENSE", survey=True),
    Served("Attention tuning", "2303.15647", "dense", "weft X_DENSE", survey=True),
)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    settings.text("origin")
    tied = read_tied(settings, catalogue)
    settings.finish(METHOD)
    said = Said()
    for module, tensors in by_module(header, ROLES, catalogue).items():
        for role, tensor in tensors.items():
            parameter = parameter_at(module, ROLES[role], tensor, tied, catalogue)
            require_shape(tensor, parameter.shape, f"{parameter.path} is {list(parameter.shape)}")
            add(said, parameter, tensor)
    return said.parsed(METHOD, catalogue)
