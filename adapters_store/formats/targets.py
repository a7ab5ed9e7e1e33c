"""Which modules a PEFT config means: ``target_modules`` and the settings around it, resolved exactly as PEFT does."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn, TypeVar

from weft.adapters_store import patterns
from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.patterns import Form
from weft.adapters_store.sites import CatalogueInfo

T = TypeVar("T")
Names = str | tuple[str, ...] | None

# the first number that stands alone between two dots, behind at least two components
_LAYER = re.compile(r".*?\.[^.]*\.([0-9]+)\.")


def target_sites(settings: Settings, catalogue: CatalogueInfo, by_layer: bool = True) -> tuple[str, ...]:
    """Paths of the sites that a config targets, in site order.

    by_layer:  whether the method has ``layers_to_transform`` and ``layers_pattern``
    AdapterInvalid if a target matches nothing, or matches a module that is no site.
    """
    return sites_among(target_modules(settings, catalogue, by_layer), catalogue)


def sites_among(found: Collection[str], catalogue: CatalogueInfo) -> tuple[str, ...]:
    """These modules in site order. AdapterInvalid if one is no site."""
    strangers = [name for name in found if name not in catalogue.index]
    if strangers:
        why = "weft adapts linear modules of the decoder layers and the output embedding, not input embeddings or norms"
        raise expected("target_modules", "linear modules only", some(strangers), why)
    return tuple(sorted(found, key=catalogue.index.__getitem__))


def target_modules(
    settings: Settings, catalogue: CatalogueInfo, by_layer: bool = True, needed: bool = True
) -> list[str]:
    """Paths of the modules of any kind that a config targets. AdapterInvalid if there is none where one is needed."""
    targets, excluded = settings.names("target_modules"), settings.names("exclude_modules")
    layers = settings.integers("layers_to_transform") if by_layer else None
    layers_pattern = settings.names("layers_pattern") if by_layer else None
    if not targets and not needed:
        choosing = {"exclude_modules": excluded, "layers_to_transform": layers, "layers_pattern": layers_pattern}
        idle = next((key for key, said in choosing.items() if said), None)
        if idle is not None:
            raise expected(idle, "null without target_modules", show(choosing[idle]), "it chooses among modules")
        return []
    if not targets:
        raise expected("target_modules", "the names that PEFT writes when it saves", "none")
    if isinstance(targets, str) and layers is not None:
        raise expected("layers_to_transform", "null when target_modules is a pattern", list(layers))
    if layers_pattern and layers is None:
        raise expected("layers_pattern", "it together with layers_to_transform", "it alone")
    names = sorted(catalogue.modules.union(catalogue.index))
    found = _matching(targets, names, catalogue)
    if layers:
        kept = _in_layers(found, layers, layers_pattern)
        # a full path is taken at its word whatever its layer
        found = [name for name in found if name in targets or name in kept]
    left_out = _excluded(excluded, found)
    found = [name for name in found if name not in left_out]
    if not found:
        raise expected("target_modules", "to match a module of this backbone", "no match")
    return found


def by_pattern(pattern_values: Mapping[str, T], default: T, sites: Sequence[str], field: str) -> dict[str, T]:
    """The value for each site: that of the first pattern, in the order of the file, that matches its path."""
    rows = patterns.match(list(pattern_values), sites, Form.SUFFIX, field) if pattern_values else []
    values = list(pattern_values.values())
    return {
        site: next((values[p] for p, row in enumerate(rows) if row[s] is not None), default)
        for s, site in enumerate(sites)
    }


def matches_whole(pattern: str, names: Sequence[str], field: str) -> list[str]:
    """The names that a regular expression matches from end to end."""
    (row,) = patterns.match([pattern], names, Form.WHOLE, field)
    return [name for name, hit in zip(names, row, strict=True) if hit is not None]


def names_of_backbone(catalogue: CatalogueInfo) -> str:
    """What the linear modules of this backbone are called, for a message."""
    return ", ".join(sorted({site.path.rpartition(".")[2] for site in catalogue.sites}))


def _matching(targets: str | tuple[str, ...], names: list[str], catalogue: CatalogueInfo) -> list[str]:
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return [site.path for site in catalogue.sites if site.kind != "lm_head"]
        found = matches_whole(targets, names, "target_modules")
        why = "text is a pattern for whole paths; a list holds names"
        return found if found else _no_match([targets], catalogue, why)
    listed, said = set(targets), {name: set(suffixes(name)) for name in names}
    missing = listed.difference(*said.values())
    if missing:
        _no_match(sorted(missing), catalogue)
    return [name for name in names if listed & said[name]]


def suffixes(name: str) -> list[str]:
    """The name and what is behind each of its dots: all that a list entry of PEFT can say to mean it."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _no_match(targets: list[str], catalogue: CatalogueInfo, why: str = "") -> NoReturn:
    wanted = f"names of this backbone's modules ({names_of_backbone(catalogue)})"
    raise expected("target_modules", wanted, some(targets), why)


def _in_layers(names: list[str], layers: tuple[int, ...], layers_pattern: Names) -> set[str]:
    if not layers_pattern:
        numbers = [int(m[1]) if (m := _LAYER.match(name)) else None for name in names]
    else:
        listed = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern)
        rows = patterns.match(listed, names, Form.LAYER, "layers_pattern")
        numbers = [next((n for n in column if n is not None), None) for column in zip(*rows, strict=True)]
    wanted = set(layers)
    return {name for name, number in zip(names, numbers, strict=True) if number in wanted}


def _excluded(excluded: Names, names: list[str]) -> set[str]:
    if not excluded:
        return set()
    if isinstance(excluded, str):
        return set(matches_whole(excluded, names, "exclude_modules"))
    listed = set(excluded)
    return {name for name in names if listed.intersection(suffixes(name))}
