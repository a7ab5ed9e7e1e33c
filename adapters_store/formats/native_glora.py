"""Our own ``X_GLORA``: GLoRA with matrix products, as its paper and the survey have it; PEFT's is elementwise.

    product:       y = (W + W A + B) x + W C + D ⊙ b + E + b     the equation; A [in, in]
    left_product:  y = (W + A W + B) x + W C + D ⊙ b + E + b     the survey's listing; A [out, out]

Tensors at ``base_model.model.<linear>.``, any of these: A as ``glora_A.Xd`` and ``glora_A.Xu`` with A = Xd Xu, Xd
[in, r] or [out, r], Xu [r, in] or [r, out]; B as ``glora_B.Xd`` [out, r] and ``glora_B.Xu`` [r, in]; vectors
``glora_C.X`` [in], ``glora_D.X`` [out], which needs a bias b of the linear, and ``glora_E.X`` [out]. Ranks may differ.
Settings: ``dialect``, one of the two above, and those of ``native_common``. All of it folds, with W read once: A is
the pair (Xu, W Xd) or (Xu W, Xd). Source: arXiv 2306.07967, equation 10, and arXiv 2303.15647, section 9.5.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import Said, read_common
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.tensors import Roles, by_module, missing_tensor, require_shape, require_site
from weft.adapters_store.operators import Bias, LowRank, ParsedAdapter
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "X_GLORA"
SERVES = (Served("GLoRA", "2306.07967", "low_rank, bias", "weft X_GLORA, W A or A W by dialect", survey=True),)

PRODUCT, LEFT = "product", "left_product"
A, B = ("glora_A.Xd", "glora_A.Xu"), ("glora_B.Xd", "glora_B.Xu")
C, D, E = "glora_C.X", "glora_D.X", "glora_E.X"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    dialect = settings.text("dialect", required=True)
    if dialect not in (PRODUCT, LEFT):
        raise expected("dialect", f"{PRODUCT} or {LEFT}", show(dialect), "the elementwise reading is PEFT's GLORA")
    settings.finish(METHOD)
    said = Said()
    for module, tensors in by_module(header, (*A, *B, C, D, E), catalogue).items():
        site = require_site(module, next(iter(tensors.values())), catalogue)
        _add_pairs(said, site, tensors, dialect)
        _add_bias(said, site, tensors)
    return said.parsed(METHOD, catalogue)


def _add_pairs(said: Said, site: SiteInfo, tensors: Roles, dialect: str) -> None:
    wide, tall, weight = site.in_features, site.out_features, (f"{site.path}.weight",)
    side = wide if dialect == PRODUCT else tall
    pair = _pair(tensors, A, site, (side, side), dialect)
    if pair is not None and dialect == PRODUCT:
        xd, xu = pair
        b = Computed(xd.name, (tall, xd.shape[1]), lambda xd, w: w @ xd, (xd,), weight)
        said.at(site.path, LowRank(xu, b), "W A as low_rank")
    elif pair is not None:
        xd, xu = pair
        a = Computed(xu.name, (xu.shape[0], wide), lambda xu, w: xu @ w, (xu,), weight)
        said.at(site.path, LowRank(a, xd), "A W as low_rank")
    pair = _pair(tensors, B, site, (tall, wide), dialect)
    if pair is not None:
        said.at(site.path, LowRank(pair[1], pair[0]))


def _pair(
    tensors: Roles, roles: tuple[str, str], site: SiteInfo, shape: tuple[int, int], dialect: str
) -> tuple[TensorRef, TensorRef] | None:
    """Xd and Xu, whose product has this shape, or None where neither is there."""
    why = f"{site.path} is {site.in_features} -> {site.out_features}, dialect is {dialect}"
    there = [role for role in roles if role in tensors]
    if not there:
        return None
    down, up = (tensors.get(role) for role in roles)
    if down is None or up is None:
        (missing,) = set(roles) - set(there)
        raise missing_tensor(site.path, missing, f"{there[0]} is there")
    rank = down.shape[-1] if len(down.shape) == len(shape) else 1
    require_shape(down, (shape[0], rank), why)
    require_shape(up, (rank, shape[1]), f"{why}, {roles[0]} has {rank} columns")
    return down, up


def _add_bias(said: Said, site: SiteInfo, tensors: Roles) -> None:
    """W C + D ⊙ b + E."""
    if D in tensors and not site.has_bias:
        raise expected(tensors[D].name, "a linear that has a bias", f"{site.path}, which has none", "D multiplies it")
    lengths = {C: site.in_features, D: site.out_features, E: site.out_features}
    for role, length in lengths.items():
        if role in tensors:
            require_shape(tensors[role], (length,), f"{site.path} is {site.in_features} -> {site.out_features}")
    if C in tensors:
        said.at(site.path, Bias(_changed(tensors[C], site, "weight", _through)), "W C as bias")
    if D in tensors:
        said.at(site.path, Bias(_changed(tensors[D], site, "bias", _times)), "D b as bias")
    if E in tensors:
        said.at(site.path, Bias(tensors[E]))


def _changed(tensor: TensorRef, site: SiteInfo, parameter: str, formula: "Callable[..., Tensor]") -> Computed:
    return Computed(tensor.name, (site.out_features,), formula, (tensor,), (f"{site.path}.{parameter}",))


def _through(vector: "Tensor", weight: "Tensor") -> "Tensor":
    return weight @ vector


def _times(vector: "Tensor", bias: "Tensor") -> "Tensor":
    return vector * bias
