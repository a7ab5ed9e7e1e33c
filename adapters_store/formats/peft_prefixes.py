"""PEFT ``PREFIX_TUNING`` and ``CARTRIDGE``: keys and values of each layer that stand in front of the text's.

Tensor ``prompt_embeddings`` [v, 2·L·h·s], seen as [v, 2L, h, s] with L layers, h heads of keys and values and their
size s, in the order K₀, V₀, K₁, V₁, …: rotated already where the backbone rotates. The text's positions begin at v.
An MLP behind ``prefix_projection`` is evaluated when PEFT saves, and a cartridge is frozen in no other way.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_common import DIALECT
from weft.adapters_store.formats.peft_prompts import ROWS, only, read_prompt_settings
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import require_shape
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import KVPrefix
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

PREFIX_TUNING, CARTRIDGE = "PREFIX_TUNING", "CARTRIDGE"

SERVES = (
    Served("Prefix tuning", "2101.00190", "kv_prefix", "PEFT PREFIX_TUNING", survey=True),
    Served("Cartridges", "2506.06266", "kv_prefix", "PEFT CARTRIDGE"),
)

TRAINING_ONLY = ("encoder_hidden_size", "prefix_projection", "init_weights", "num_frozen_tokens")


def prefix_tuning(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    return _parse(PREFIX_TUNING, settings, header, catalogue)


def cartridge(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    return _parse(CARTRIDGE, settings, header, catalogue)


def _parse(method: str, settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    count, width = read_prompt_settings(settings)
    layers, heads = settings.integer("num_layers"), settings.integer("num_attention_heads")
    settings.ignore(*TRAINING_ONLY)
    settings.finish(method)
    _check_backbone(catalogue, layers, heads, width)
    rows = only(header, (ROWS,))[ROWS]
    why = f"num_virtual_tokens is {count}, num_layers {layers}, token_dim {width}"
    require_shape(rows, (count, 2 * layers * width), why)
    parts = tuple(
        KVPrefix(layer, _part(rows, 2 * layer, width), _part(rows, 2 * layer + 1, width), shifts=True)
        for layer in range(layers)
    )
    return ParsedAdapter(method, DIALECT, {}, parts=parts)


def _check_backbone(catalogue: CatalogueInfo, layers: int, heads: int, width: int) -> None:
    if len(catalogue.layers) != layers:
        raise expected("num_layers", f"this backbone's {len(catalogue.layers)} that take a prefix", layers)
    for layer in catalogue.layers:
        if layer.kv_heads != heads:
            wanted = f"this backbone's {layer.kv_heads} heads of keys and values"
            raise expected("num_attention_heads", wanted, heads, f"at {layer.attention}")
        if {layer.key_size * heads, layer.value_size * heads} != {width}:
            wanted = f"{layer.kv_heads} heads times this backbone's {layer.key_size} of keys, {layer.value_size} values"
            raise expected("token_dim", wanted, width, f"at {layer.attention}")


def _part(rows: TensorRef, number: int, width: int) -> Computed:
    """The keys or values of one layer, [v, heads · size]."""

    def columns(rows: "Tensor") -> "Tensor":
        return rows[:, number * width : (number + 1) * width]

    return Computed(rows.name, (rows.shape[0], width), columns, (rows,))
