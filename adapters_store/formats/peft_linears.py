"""What PEFT's methods for linears have in common: the sites that a config means, and their tensors in the file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.peft_beside import ROLES, Beside, Brought, gather, read_beside, without_saved
from weft.adapters_store.formats.peft_common import COPY_ROLES, DIALECT, copies, fan_in_fan_out_notes, read_common
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import sites_among, target_modules
from weft.adapters_store.formats.tensors import Roles, by_module, require_exactly, require_kind
from weft.adapters_store.operators import Bias, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import TensorRef

# how names begin that belong to no module: ``base_model.vera_A``
MODEL = "base_model."


@dataclass(frozen=True, slots=True)
class Targets:
    """The sites that a config means, in site order, what else the file brings, what the report says of the settings."""

    sites: tuple[SiteInfo, ...]
    beside: Beside
    notes: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Their paths."""
        return tuple(site.path for site in self.sites)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a file.

    by_site:  of the method, by site path and role
    shared:   of no module, by name
    brought:  what the file brings beside the method
    copies:   weights of the backbone that PEFT saves along, with the parameter that each must equal
    """

    by_site: dict[str, Roles]
    shared: Roles
    brought: Brought
    copies: tuple[tuple[TensorRef, str], ...]


def read_targets(
    settings: Settings, catalogue: CatalogueInfo, method: str, name: str, conv1d: bool = False, by_layer: bool = True
) -> Targets:
    """The sites, and the settings that say something about them and that every method of PEFT has.

    name:      of the method, for messages
    conv1d:    whether PEFT has the method for Conv1D
    by_layer:  whether the method has ``layers_to_transform`` and ``layers_pattern``
    """
    beside = read_beside(settings, catalogue, f"{method.lower()}_only")
    read_common(settings)
    paths = sites_among(without_saved(beside, target_modules(settings, catalogue, by_layer)), catalogue)
    if not paths:
        raise expected("target_modules", "a module that modules_to_save leaves", "none")
    sites = tuple(catalogue.sites[catalogue.index[path]] for path in paths)
    transposed = [site.path for site in sites if site.kind == "conv1d"]
    if transposed and not conv1d:
        raise expected("target_modules", "nn.Linear modules", some(transposed), f"PEFT has no {name} for Conv1D")
    kinds = [site.kind for site in sites if site.kind != "lm_head"]
    return Targets(sites, beside, fan_in_fan_out_notes(settings, kinds))


def read_tensors(
    header: Header,
    catalogue: CatalogueInfo,
    targets: Targets,
    roles: Iterable[str],
    optional: Iterable[str] = (),
    integers: Iterable[str] = (),
    shared: Iterable[str] = (),
) -> Tensors:
    """Every target has all roles, other modules have none, and nothing unknown is in the file.

    optional:  roles that a target may have
    integers:  the roles, required or optional, whose tensors are integers
    shared:    names behind ``base_model.`` that must be there once
    """
    wanted, possible, common = tuple(roles), tuple(optional), tuple(shared)
    apart = {name: header.tensors[MODEL + name] for name in common if MODEL + name in header.tensors}
    for name in common:
        if name not in apart:
            raise expected(MODEL + name, "this tensor", "none", "modules share it")
        require_kind(apart[name])
    names = {MODEL + name for name in common}
    rest = Header({n: t for n, t in header.tensors.items() if n not in names}, header.data_start)
    found = by_module(rest, [*wanted, *possible, *ROLES, *COPY_ROLES], catalogue, integers)
    require_exactly(found, targets.paths, wanted)
    require_exactly({m: t for m, t in found.items() if m not in targets.paths}, (), possible)
    brought = gather(found, targets.beside, targets.paths, catalogue)
    along = copies({module: tensors for module, tensors in found.items() if module not in targets.beside.saved})
    return Tensors({path: found.get(path, {}) for path in targets.paths}, apart, brought, along)


def adapter(
    method: str,
    targets: Targets,
    found: Tensors,
    said: Mapping[str, SiteOperators],
    catalogue: CatalogueInfo,
    zeros: tuple[TensorRef, ...] = (),
) -> ParsedAdapter:
    """What the method says at its sites, behind what the file brings beside it; sites without operators are left out.

    zeros:  tensors that must hold nothing but zeros
    """
    sites: dict[str, SiteOperators] = {}
    for path in sorted({*said, *found.brought.operators}, key=catalogue.index.__getitem__):
        before, own = found.brought.operators.get(path, []), said.get(path, SiteOperators(()))
        folds = ("bias value - base",) if any(isinstance(operator, Bias) for operator in before) else ()
        if before or own.operators:
            sites[path] = SiteOperators((*before, *own.operators), (*folds, *own.folds))
    parts = found.brought.parts(catalogue)
    return ParsedAdapter(method, DIALECT, sites, found.copies, targets.notes, parts=parts, zeros=zeros)


def as_declared(targets: Targets, catalogue: CatalogueInfo) -> tuple[SiteInfo, ...]:
    """The sites in the order in which PEFT comes upon their modules."""
    order = {path: i for i, path in enumerate(catalogue.declared or catalogue.index)}
    return tuple(sorted(targets.sites, key=lambda site: order[site.path]))


def sizes(site: SiteInfo) -> str:
    """Why a tensor has the shape that it must have."""
    return f"{site.path} is {site.in_features} -> {site.out_features}"
