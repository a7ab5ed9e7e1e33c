"""How weft's own formats name the places behind sublayers, where what joins the residual stream can be changed.

``<decoder layer>.attention`` and ``<decoder layer>.mlp``, whatever the family calls its modules; the path of the module
that attends is taken for the first as well: ``model.layers.0.self_attn``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from weft.adapters_store.errors import expected, quoted
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, by_module
from weft.adapters_store.parts import ATTENTION, MLP, TAPS
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, HiddenInfo


def by_place(header: Header, roles: Iterable[str], catalogue: CatalogueInfo) -> list[tuple[str, HiddenInfo, Roles]]:
    """Tensors by the place behind a sublayer that their names say: (the name, the place, tensors by role), in order."""
    names = place_names(catalogue)
    known = replace(catalogue, modules=catalogue.modules.union(names))
    found: dict[tuple[int, str], tuple[str, HiddenInfo, Roles]] = {}
    for module, tensors in by_module(header, roles, known).items():
        first = next(iter(tensors.values()))
        if module not in names or names[module] not in catalogue.hidden_index:
            why = "" if module not in names else "what it adds to the residual stream is not known"
            wanted = "the attention or the mlp of a decoder layer"
            raise expected(first.name, wanted, f"{quoted(module)}, which is none that weft adapts", why)
        place = names[module]
        if place in found:
            raise expected(first.name, f"one name of {found[place][0]}", "another", "both mean one place")
        found[place] = module, catalogue.hidden[catalogue.hidden_index[place]], tensors
    return [found[place] for place in sorted(found, key=catalogue.hidden_index.__getitem__)]


def place_names(catalogue: CatalogueInfo) -> Mapping[str, tuple[int, str]]:
    """Every name of a place: (number of the layer, behind which sublayer)."""
    names: dict[str, tuple[int, str]] = {}
    for number, layer in enumerate(catalogue.layers):
        names |= {layer.attention: (number, ATTENTION)}
        names |= {f"{layer.path}.{after}": (number, after) for after in (ATTENTION, MLP)}
    return names


def read_tap(settings: Settings, allowed: tuple[str, ...] = TAPS) -> str:
    """The setting ``tap``: what is read."""
    tap = settings.text("tap", required=True)
    if tap not in allowed:
        raise expected("tap", f"one of {', '.join(allowed)}", f'"{quoted(str(tap))}"')
    return tap


def require_tap(tap: str, name: str, place: HiddenInfo) -> None:
    """There is such a thing to read at this place."""
    if tap not in place.taps:
        raise expected("tap", f"one of {', '.join(place.taps)} at {name}", tap, "no norm makes the sublayer's input")
