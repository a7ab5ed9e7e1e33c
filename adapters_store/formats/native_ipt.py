"""Our own ``X_IPT``: the soft prompt of intrinsic prompt tuning, decoded.

Tensor ``prompt_embeddings`` [v, d], rows that stand in front of the text's embeddings. The decoder that made them of a
few numbers is used once, when a checkpoint is converted, and is no part of the file. Settings: ``decoded`` true, and
those of ``native_common``.
"""

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import DIALECT, read_common
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import require_kind
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import SoftPrompt
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.tensor_refs import TensorRef

METHOD = "X_IPT"

ROWS = "prompt_embeddings"

SERVES = (
    Served("IPT", "2110.07867", "soft_prompt", "weft X_IPT", survey=True, refuses="prompts that are not decoded"),
)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    if not settings.flag("decoded"):
        raise expected("decoded", "true", "false", "weft runs no decoders of prompts: evaluate it and save the rows")
    settings.finish(METHOD)
    rows = only_tensor(header, ROWS)
    embedding = catalogue.embedding
    if embedding is None:
        raise expected(rows.name, "a backbone whose input embedding weft knows", "this one")
    if len(rows.shape) != 2 or rows.shape[1] != embedding.features:
        raise expected(rows.name, f"shape [rows, {embedding.features}]", list(rows.shape))
    return ParsedAdapter(METHOD, DIALECT, {}, parts=(SoftPrompt(rows),))


def only_tensor(header: Header, name: str) -> TensorRef:
    """The one tensor of a file."""
    stray = next((other for other in header.tensors if other != name), None)
    if stray is not None:
        raise expected(stray, f"only {name}", "another tensor")
    require_kind(header.tensors[name])
    return header.tensors[name]
