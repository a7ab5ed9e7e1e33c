"""What AdapterHub's ``adapters`` calls the places of the families that it and weft both know.

It wraps modules of Llama, Mistral and GPT-2 itself, and reaches the others through an interface of named modules and
hooks, which has no prefixes. Llama and Mistral have the two names of their feed-forward part the wrong way round:
``intermediate`` is what leads out of it. Source: ``adapters`` 1.3.0, ``models/*/mixin_*.py`` and
``wrappers/interfaces.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.sites import CatalogueInfo


@dataclass(frozen=True, slots=True)
class Places:
    """The modules of one family.

    attention:     of queries, keys and values, below the attention
    fused:         the one module in their place, with queries, keys and values below each other; empty if there is none
    intermediate:  below the layer, likewise ``output``
    hooked:        reached through an interface
    bottlenecks:   why there are none, empty if there are
    prefixes:      whether there are any
    """

    intermediate: str
    output: str
    attention: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    fused: str = ""
    hooked: bool = False
    bottlenecks: str = ""
    prefixes: bool = False


_NORM_BEHIND = (
    "AdapterHub puts it in front of the norm behind the sublayer, where weft has no place: only x + f(norm(x)) has one"
)
UP, DOWN = "mlp.up_proj", "mlp.down_proj"

FAMILIES: Mapping[str, Places] = {
    "gpt2": Places("mlp.c_fc", "mlp.c_proj", fused="c_attn", prefixes=True),
    "llama": Places(DOWN, UP, prefixes=True),
    "mistral": Places(DOWN, UP, prefixes=True),
    "qwen2": Places(UP, DOWN, hooked=True),
    "qwen3": Places(UP, DOWN, hooked=True),
    "gemma2": Places(UP, DOWN, hooked=True, bottlenecks=_NORM_BEHIND),
    "gemma3_text": Places(UP, DOWN, hooked=True, bottlenecks=_NORM_BEHIND),
}


def read_family(settings: Settings, catalogue: CatalogueInfo) -> Places:
    """The places of this backbone. AdapterInvalid if AdapterHub has none for it, or the file is of another family."""
    said = settings.text("model_type", required=True)
    if catalogue.family not in FAMILIES:
        wanted = f"a family that AdapterHub has built in and weft serves ({', '.join(FAMILIES)})"
        raise expected("model_type", wanted, catalogue.family or "another", "the backbone is of no such family")
    if said != catalogue.family:
        raise expected("model_type", f"this backbone's, {catalogue.family}", f'"{said}"')
    assert catalogue.layers, "families that AdapterHub has built in have decoder layers"
    width = settings.integer("hidden_size")
    if width != catalogue.layers[0].features:
        raise expected("hidden_size", f"this backbone's, {catalogue.layers[0].features}", width)
    return FAMILIES[catalogue.family]
