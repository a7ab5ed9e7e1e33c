"""PEFT ``LN_TUNING``: norms whose weight, and bias where they have one, are replaced.

Tensors at ``base_model.model.<norm>.``: ``ln_tuning_layers.weight`` [d] and ``ln_tuning_layers.bias`` [d], in the form
that the norm's own have (Gemma's are what is added to 1).
"""

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_common import DIALECT, read_common
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import target_modules
from weft.adapters_store.formats.tensors import by_module, require_exactly, require_shape
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import NormOverride
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo

METHOD = "LN_TUNING"
SERVES = (Served("LN tuning", "2312.11420", "norm_override", "PEFT LN_TUNING", survey=True),)

WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings)
    targets = target_modules(settings, catalogue, by_layer=False)
    settings.finish(METHOD)
    strangers = [path for path in targets if path not in catalogue.norm_index]
    if strangers:
        norms = ", ".join(sorted({norm.path.rpartition(".")[2] for norm in catalogue.norms}))
        raise expected("target_modules", f"norms of this backbone ({norms or 'none that it lends'})", some(strangers))
    norms_by_path = {path: catalogue.norms[catalogue.norm_index[path]] for path in targets}
    found = by_module(header, [WEIGHT, BIAS], catalogue)
    require_exactly(found, targets, [WEIGHT])
    require_exactly(found, [path for path in targets if norms_by_path[path].has_bias], [BIAS], "the norm has a bias")
    parts: list[NormOverride] = []
    for path in sorted(targets, key=catalogue.norm_index.__getitem__):
        norm, tensors = norms_by_path[path], found[path]
        for tensor in tensors.values():
            require_shape(tensor, (norm.features,), f"{path} has {norm.features} features")
        parts.append(NormOverride(path, tensors[WEIGHT], tensors.get(BIAS)))
    return ParsedAdapter(METHOD, DIALECT, {}, parts=tuple(parts))
