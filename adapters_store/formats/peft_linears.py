"""What PEFT's methods for linears have in common: the sites that a config means, and their tensors in the file."""

from collections.abc import Iterable
from dataclasses import dataclass

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.peft_common import COPY_ROLES, copies, fan_in_fan_out_notes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import target_sites
from weft.adapters_store.formats.tensors import Roles, by_module, require_exactly, require_kind
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import TensorRef

# how names begin that belong to no module: ``base_model.vera_A``
MODEL = "base_model."


@dataclass(frozen=True, slots=True)
class Targets:
    """The sites that a config means, in site order, and what the report says about its settings."""

    sites: tuple[SiteInfo, ...]
    notes: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Their paths."""
        return tuple(site.path for site in self.sites)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a file: by site path and role, by the name that belongs to no module, copies of the backbone's."""

    by_site: dict[str, Roles]
    shared: Roles
    copies: tuple[tuple[TensorRef, str], ...]


def read_targets(
    settings: Settings, catalogue: CatalogueInfo, name: str, conv1d: bool = False, by_layer: bool = True
) -> Targets:
    """The sites, and the settings that say something about them.

    name:      of the method, for messages
    conv1d:    whether PEFT has the method for Conv1D
    by_layer:  whether the method has ``layers_to_transform`` and ``layers_pattern``
    """
    paths = target_sites(settings, catalogue, by_layer)
    sites = tuple(catalogue.sites[catalogue.index[path]] for path in paths)
    transposed = [site.path for site in sites if site.kind == "conv1d"]
    if transposed and not conv1d:
        raise expected("target_modules", "nn.Linear modules", some(transposed), f"PEFT has no {name} for Conv1D")
    settings.choice("bias", ("none",), "none", f"biases that were trained along with {name} are not served")
    kinds = [site.kind for site in sites if site.kind != "lm_head"]
    return Targets(sites, fan_in_fan_out_notes(settings, kinds) if kinds else ())


def read_tensors(
    header: Header,
    catalogue: CatalogueInfo,
    targets: Targets,
    roles: Iterable[str],
    optional: Iterable[str] = (),
    integers: Iterable[str] = (),
    shared: Iterable[str] = (),
) -> Tensors:
    """Every target has all roles, other modules have none, and nothing else is in the file.

    optional:  roles that a target may have
    integers:  the roles, required or optional, whose tensors are integers
    shared:    names behind ``base_model.`` that must be there once
    """
    wanted, possible, common = tuple(roles), tuple(optional), tuple(shared)
    apart = {name: header.tensors[MODEL + name] for name in common if MODEL + name in header.tensors}
    for name in common:
        if name not in apart:
            raise expected(MODEL + name, "this tensor", "none", "all modules share it")
        require_kind(apart[name])
    names = {MODEL + name for name in common}
    rest = Header({n: t for n, t in header.tensors.items() if n not in names}, header.data_start)
    found = by_module(rest, [*wanted, *possible, *COPY_ROLES], catalogue, integers)
    require_exactly(found, targets.paths, wanted)
    require_exactly({m: t for m, t in found.items() if m not in targets.paths}, (), possible)
    return Tensors({path: found.get(path, {}) for path in targets.paths}, apart, copies(found))


def sizes(site: SiteInfo) -> str:
    """Why a tensor has the shape that it must have."""
    return f"{site.path} is {site.in_features} -> {site.out_features}"
