"""What weft's own formats share: settings that each of them may carry, and how changed parameters become operators.

The two files are named as PEFT names them. Tensors are ``base_model.model.<path>.<tensor>``; factors, rows and columns
lie as [out, in] whatever the module stores, and what speaks of a *parameter* lies as that parameter does. Settings of
every format: ``format_version`` 1, and where wanted ``base_model_name_or_path`` and ``target_modules``, which inform
only, and ``base_fingerprint``, the digest of the one backbone that the adapter may run on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected, quoted
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.tensors import require_shape
from weft.adapters_store.operators import Operator, ParsedAdapter, SiteOperators
from weft.adapters_store.parts import NormOverride, Part
from weft.adapters_store.sites import CatalogueInfo, NormInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

DIALECT = "native"
FORMAT_VERSION = 1


def read_common(settings: Settings, catalogue: CatalogueInfo) -> None:
    """The settings that every format of weft's own has."""
    version = settings.integer("format_version")
    if version != FORMAT_VERSION:
        raise expected("format_version", str(FORMAT_VERSION), version)
    settings.text("base_model_name_or_path")
    settings.names("target_modules")
    fingerprint = settings.text("base_fingerprint")
    if fingerprint is not None and fingerprint != catalogue.digest:
        raise expected("base_fingerprint", f"this backbone's, {catalogue.digest}", show(fingerprint))


@dataclass
class Said:
    """What a parser has found so far: operators of sites in the order in which they apply, norms, and other parts."""

    operators: dict[str, list[Operator]] = field(default_factory=dict)
    folds: dict[str, list[str]] = field(default_factory=dict)
    norms: dict[str, NormOverride] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)

    def at(self, path: str, operator: Operator, fold: str = "") -> None:
        """One more operator at a site, behind those that are there."""
        self.operators.setdefault(path, []).append(operator)
        folds = self.folds.setdefault(path, [])
        if fold and fold not in folds:
            folds.append(fold)

    def norm(self, path: str, weight: Value | None = None, bias: Value | None = None) -> None:
        """A norm's new weight or bias; the other stays as it was said before."""
        said = self.norms.get(path, NormOverride(path))
        self.norms[path] = replace(said, weight=weight or said.weight, bias=bias or said.bias)

    def parsed(self, method: str, catalogue: CatalogueInfo, notes: tuple[str, ...] = ()) -> ParsedAdapter:
        """All of it, in the order of the backbone."""
        paths = sorted(self.operators, key=catalogue.index.__getitem__)
        sites = {path: SiteOperators(tuple(self.operators[path]), tuple(self.folds[path])) for path in paths}
        norms = [self.norms[path] for path in sorted(self.norms, key=catalogue.norm_index.__getitem__)]
        return ParsedAdapter(method, DIALECT, sites, notes=notes, parts=(*norms, *self.parts))


def linear_or_norm(module: str, tensor: TensorRef, catalogue: CatalogueInfo) -> SiteInfo | NormInfo:
    """The linear or the norm at this path. AdapterInvalid if it is neither."""
    if module in catalogue.index:
        return catalogue.sites[catalogue.index[module]]
    return norm_at(module, tensor, catalogue, "a linear module or a norm")


def norm_at(module: str, tensor: TensorRef, catalogue: CatalogueInfo, wanted: str = "a norm") -> NormInfo:
    """The norm at this path. AdapterInvalid if the module is none."""
    if module not in catalogue.norm_index:
        raise expected(tensor.name, wanted, f"{quoted(module)}, which is none that weft adapts")
    return catalogue.norms[catalogue.norm_index[module]]


def require_norm_vector(tensor: TensorRef, norm: NormInfo, of_bias: bool = False) -> None:
    """The tensor is as long as the norm's weight; one of its bias needs a bias there."""
    if of_bias and not norm.has_bias:
        raise expected(tensor.name, "a norm that has a bias", f"{norm.path}, which has none")
    require_shape(tensor, (norm.features,), f"{norm.path} has {norm.features} features")


def only_one_of(tensors: Mapping[str, TensorRef], *roles: str) -> TensorRef | None:
    """The tensor in the first of these roles that is there. AdapterInvalid if several are."""
    there = [tensors[role] for role in roles if role in tensors]
    if len(there) > 1:
        raise expected(there[1].name, f"one of {', '.join(roles)}", "several")
    return there[0] if there else None


def raised(delta: Value, parameter: str) -> Computed:
    """A frozen parameter with this added to it."""

    def formula(delta: "Tensor", old: "Tensor") -> "Tensor":
        return old + delta

    return Computed(delta.name, delta.shape, formula, (delta,), (parameter,))


def times(value: Value, factor: float) -> Value:
    """The value times a number."""
    return value if factor == 1 else Computed(value.name, value.shape, lambda v: v * factor, (value,))
