"""PEFT ``OFT``: the weight sees its input rotated in blocks, x R₁ ⊕ R₂ ⊕ …, served as what that adds to the weight.

Tensor at ``base_model.model.<module>.``: ``oft_R.weight`` [blocks, b(b - 1)/2], one block with ``block_share``: the
part above the diagonal of a skew matrix Q. R = (I - Q)(I + Q)⁻¹, or the first terms of a series of it, I + 2Q + 2Q² +
… with the last term once, with ``use_cayley_neumann``. ``coft`` keeps each Q within eps/√blocks of 0.
"""

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import require_shape
from weft.adapters_store.operators import Dense, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "OFT"
SERVES = (Served("OFT", "2306.07280", "dense", "PEFT OFT, coft, block_share", refuses="convolutions"),)

SKEW = "oft_R.weight"


@dataclass(frozen=True, slots=True)
class _Form:
    """Number of blocks or their size; terms of the series, 0 for the exact form; eps of coft, None without."""

    count: int
    size: int
    terms: int
    bound: float | None
    shared: bool


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights", "module_dropout")
    count, size = settings.integer("r", 0), settings.integer("oft_block_size", 0)
    if bool(count) == bool(size):
        raise expected("r", "either this or oft_block_size, the other 0", count, f"oft_block_size is {size}")
    series = settings.choice("use_cayley_neumann", (True, False), True)
    terms = settings.integer("num_cayley_neumann_terms") if series else 0
    settings.ignore("num_cayley_neumann_terms")
    bound = settings.number("eps") if settings.flag("coft") else None
    settings.ignore("eps")
    form = _Form(count, size, terms, bound, settings.flag("block_share"))
    targets = read_targets(settings, catalogue, METHOD, METHOD)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [SKEW])
    sites = {site.path: _operators(found.by_site[site.path][SKEW], site, form) for site in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def rotated(weight: "Tensor", rotations: "Tensor") -> "Tensor":
    """A weight [out, in] that is to see its input rotated, x R₁ ⊕ R₂ ⊕ …, with rotations [blocks, b, b]."""
    blocks, size, _ = rotations.shape
    pieces = weight.reshape(len(weight), blocks, size).transpose(0, 1)
    return (pieces @ rotations.transpose(1, 2)).transpose(0, 1).reshape(weight.shape)


def _operators(skew: TensorRef, site: SiteInfo, form: _Form) -> SiteOperators:
    wide = site.in_features
    size = _divisor(form.size, wide) if form.size else wide // _divisor(form.count, wide)
    blocks = wide // size
    require_shape(skew, (1 if form.shared else blocks, size * (size - 1) // 2), f"{blocks} blocks, {sizes(site)}")

    def change(skew: "Tensor", weight: "Tensor") -> "Tensor":
        return rotated(weight, _rotations(skew, size, form).expand(blocks, size, size)) - weight

    shape = (site.out_features, site.in_features)
    return SiteOperators((Dense(Computed(skew.name, shape, change, (skew,), (f"{site.path}.weight",))),), ("W R - W",))


def _divisor(wanted: int, whole: int) -> int:
    """The divisor that PEFT takes in the place of a number that is none: the next one, the lower of two as near."""
    if wanted >= whole:
        return whole
    higher = next(number for number in range(wanted, whole + 1) if whole % number == 0)
    lower = next(number for number in range(wanted, 0, -1) if whole % number == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _rotations(upper: "Tensor", size: int, form: _Form) -> "Tensor":
    import torch

    skew = upper.new_zeros(len(upper), size, size)
    row, column = torch.triu_indices(size, size, 1)
    skew[:, row, column] = upper
    skew = skew - skew.transpose(1, 2)
    if form.bound is not None:
        most = form.bound / sqrt(len(skew))
        norm = skew.norm(dim=(1, 2), keepdim=True)
        skew = torch.where(norm <= most, skew, most * skew / norm)
    identity = torch.eye(size).expand_as(skew)
    if not form.terms:
        exact: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
        return exact
    return _series(identity, skew, form.terms)


def _series(identity: "Tensor", skew: "Tensor", terms: int) -> "Tensor":
    """The sum as PEFT forms it: with three terms asked for it has four."""
    result = identity
    if terms > 1:
        result = result + 2 * skew
    if terms > 2:
        power = skew @ skew
        result = result + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            result = result + 2 * power
        result = result + power @ skew
    return result
