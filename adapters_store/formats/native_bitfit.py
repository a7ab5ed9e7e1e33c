"""Our own ``X_BITFIT``: biases, added to those of the backbone or in their place.

Tensors at ``base_model.model.<linear or norm>.``: ``bias_delta`` [out] or ``bias_value`` [out]. A linear without a bias
takes a ``bias_delta`` all the same; a norm takes neither. Settings: ``mode``, ``delta`` or ``value``, says that all
tensors are of that kind; without it each says so itself. Beside it those of ``native_common``.
"""

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import (
    Said,
    linear_or_norm,
    only_one_of,
    raised,
    read_common,
    require_norm_vector,
)
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, by_module, require_shape
from weft.adapters_store.operators import Bias, ParsedAdapter
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, NormInfo

METHOD = "X_BITFIT"

DELTA, VALUE = "bias_delta", "bias_value"
MODES = {"delta": DELTA, "value": VALUE}

SERVES = (Served("BitFit", "2106.10199", "bias, norm_override", "weft X_BITFIT", survey=True),)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    mode = settings.choice("mode", tuple(MODES), None)
    settings.finish(METHOD)
    found = by_module(header, [DELTA, VALUE], catalogue)
    said = Said()
    for module, tensors in found.items():
        stray = next((t for role, t in tensors.items() if mode is not None and role != MODES[mode]), None)
        if stray is not None:
            raise expected(stray.name, f"tensors named {MODES[mode]}", "another", f"mode is {mode}")
        add_bias(said, module, tensors, catalogue)
    return said.parsed(METHOD, catalogue)


def add_bias(said: Said, module: str, tensors: Roles, catalogue: CatalogueInfo) -> None:
    """The bias of one linear or norm, if there is one among these tensors."""
    tensor = only_one_of(tensors, DELTA, VALUE)
    if tensor is None:
        return
    absolute, place = tensor is tensors.get(VALUE), linear_or_norm(module, tensor, catalogue)
    if isinstance(place, NormInfo):
        require_norm_vector(tensor, place, of_bias=True)
        said.norm(module, bias=tensor if absolute else raised(tensor, f"{module}.bias"))
        return
    if absolute and not place.has_bias:
        raise expected(tensor.name, "a bias of the backbone to replace", "a module without one", f"{DELTA} would do")
    require_shape(tensor, (place.out_features,), f"{module} has {place.out_features} outputs")
    said.at(module, Bias(tensor, absolute=absolute), "bias value - base" if absolute else "")
