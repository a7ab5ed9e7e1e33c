"""PEFT ``LOKR``, the public carrier of KronA: y += (alpha/r)·x kron(w1, w2)ᵀ.

Tensors at ``base_model.model.<module>.``: ``lokr_w1`` [o1, i1] or the product ``lokr_w1_a`` [o1, r] · ``lokr_w1_b``
[r, i1], and the same for ``lokr_w2`` [o2, i2]; o1·o2 = out and i1·i2 = in. The scale is alpha/r whatever the form.
The shapes say how out and in were split, so PEFT's own rule for splitting is not needed here.
"""

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_common import COPY_ROLES, DIALECT, copies, read_common
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import by_pattern, target_sites
from weft.adapters_store.formats.tensors import Roles, by_module, missing_tensor, require_exactly
from weft.adapters_store.operators import Factor, Kron, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import TensorRef

METHOD = "LOKR"

SERVES = (
    Served("KronA", "2212.10650", "kron", "PEFT LOKR, factors in one piece", survey=True),
    Served("LoKr", "2309.14859", "kron", "PEFT LOKR, decompose_both", refuses="convolutions"),
)

TRAINING_ONLY = (
    "rank_dropout",
    "module_dropout",
    "rank_dropout_scale",
    "init_weights",
    # how PEFT splits a module's sizes and convolutions: the tensors' shapes say what came of it
    "decompose_factor",
    "use_effective_conv2d",
)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings)
    settings.ignore(*TRAINING_ONLY)
    both = settings.flag("decompose_both")
    sites = target_sites(settings, catalogue)
    ranks = by_pattern(settings.integer_by_pattern("rank_pattern"), settings.integer("r"), sites, "rank_pattern")
    alphas = by_pattern(settings.number_by_pattern("alpha_pattern"), settings.number("alpha"), sites, "alpha_pattern")
    settings.finish(METHOD)
    transposed = [path for path in sites if catalogue.sites[catalogue.index[path]].kind == "conv1d"]
    if transposed:
        raise expected("target_modules", "nn.Linear modules", some(transposed), "PEFT has no LoKr for Conv1D")
    factors = [f"lokr_{w}{part}" for w in ("w1", "w2") for part in ("", "_a", "_b")]
    found = by_module(header, [*factors, *COPY_ROLES], catalogue)
    parsed: dict[str, SiteOperators] = {}
    for path in sites:
        site, tensors = catalogue.sites[catalogue.index[path]], found.get(path, {})
        w1, w2 = (_factor(tensors, w, ranks[path], path) for w in ("lokr_w1", "lokr_w2"))
        if w1.right is not None and not both:
            raise expected(w1.left.name, "lokr_w1 in one piece", "a product", "decompose_both is false")
        _check_split(w1, w2, site)
        parsed[path] = SiteOperators((Kron(w1, w2, alphas[path] / ranks[path]),), ("alpha/r",))
    require_exactly({m: t for m, t in found.items() if m not in parsed}, (), factors)
    return ParsedAdapter(METHOD, DIALECT, parsed, copies(found))


def _factor(tensors: Roles, name: str, rank: int, path: str) -> Factor:
    """A factor that is in the file in one piece or as a product, not both."""
    whole, left, right = tensors.get(name), tensors.get(f"{name}_a"), tensors.get(f"{name}_b")
    if whole is not None:
        stray = left or right
        if stray is not None:
            raise expected(stray.name, f"{name} or its two factors", "both")
        return Factor(_matrix(whole))
    if left is None:
        raise missing_tensor(path, name if right is None else f"{name}_a", "target_modules names its module")
    if right is None:
        raise missing_tensor(path, f"{name}_b", f"{name}_a is there")
    if _matrix(left).shape[1] != rank:
        raise expected(left.name, f"shape [rows, {rank}]", list(left.shape), f"r is {rank} for {path}")
    if _matrix(right).shape[0] != rank:
        raise expected(right.name, f"shape [{rank}, columns]", list(right.shape), f"r is {rank} for {path}")
    return Factor(left, right)


def _matrix(tensor: TensorRef) -> TensorRef:
    if len(tensor.shape) != 2:
        raise expected(tensor.name, "a matrix", list(tensor.shape))
    return tensor


def _check_split(w1: Factor, w2: Factor, site: SiteInfo) -> None:
    (o1, i1), (o2, i2) = w1.shape, w2.shape
    if (o1 * o2, i1 * i2) != (site.out_features, site.in_features):
        wanted = f"factors of a [{site.out_features}, {site.in_features}] matrix"
        raise expected(w1.left.name, wanted, f"[{o1}, {i1}] and [{o2}, {i2}]")
