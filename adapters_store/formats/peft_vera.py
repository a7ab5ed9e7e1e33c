"""PEFT ``VERA`` and ``PVERA``: y += λ_b ⊙ (B (λ_d ⊙ (A x))), where all modules share two random matrices.

Tensors: ``base_model.vera_A`` [r, widest in] and ``base_model.vera_B`` [tallest out, r], of which a module uses the
first columns and rows, and at ``base_model.model.<module>.`` the trained ``vera_lambda_d`` [r] and ``vera_lambda_b``
[out]. PVeRA's ``pvera_A`` and ``pvera_lambda_d`` have 2r rows, the second half for a variance that is not sampled at
inference. Without ``save_projection`` the random matrices are not in the file: both are drawn from
``projection_prng_key``, A before B, as large as the largest targets ask (``drawn``).
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.drawn import REDRAWN, kaiming
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import require_shape
from weft.adapters_store.operators import Bank, ParsedAdapter, Shared, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

VERA, PVERA = "VERA", "PVERA"
SERVES = (
    Served("VeRA", "2310.11454", "shared low_rank", f"PEFT VERA, {REDRAWN}"),
    Served("PVeRA", "2512.07703", "shared low_rank", f"PEFT PVERA, {REDRAWN}", refuses="sample_at_inference"),
)


def vera(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    return _parse(VERA, "VeRA", 1, settings, header, catalogue)


def pvera(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.refuse("sample_at_inference", "an answer that is drawn anew each time is no adapter's")
    settings.ignore("generator_seed")
    return _parse(PVERA, "PVeRA", 2, settings, header, catalogue)


def _parse(
    method: str, name: str, halves: int, settings: Settings, header: Header, catalogue: CatalogueInfo
) -> ParsedAdapter:
    prefix = method.lower()
    settings.ignore(f"{prefix}_dropout", "d_initial", "init_weights")
    saved = settings.choice("save_projection", (True, False), True)
    seed = settings.optional_integer("projection_prng_key", 0) if saved else settings.integer("projection_prng_key", 0)
    rank = settings.integer("r")
    targets = read_targets(settings, catalogue, method, name, conv1d=True)
    settings.finish(method)
    inner, outer, a, b = (f"{prefix}_{end}" for end in ("lambda_d", "lambda_b", "A", "B"))
    found = read_tensors(header, catalogue, targets, [inner, outer], shared=[a, b] if saved else [])
    wide, tall = max(s.in_features for s in targets.sites), max(s.out_features for s in targets.sites)
    whole: tuple[Value, Value]
    if seed is None or saved:
        whole = found.shared[a], found.shared[b]
        _check_shared(found.shared[a], halves * rank, wide, 1, "inputs")
        _check_shared(found.shared[b], rank, tall, 0, "outputs")
    else:
        drawn = kaiming(seed, (halves * rank, wide), (tall, rank))
        whole = drawn.value(0, f"base_model.{a}"), drawn.value(1, f"base_model.{b}")
    bank = Bank(_first(whole[0], rank), whole[1])
    sites: dict[str, SiteOperators] = {}
    for site in targets.sites:
        tensors = found.by_site[site.path]
        require_shape(tensors[inner], (halves * rank,), f"r is {rank}")
        require_shape(tensors[outer], (site.out_features,), sizes(site))
        sites[site.path] = SiteOperators((Shared(bank, _first(tensors[inner], rank), tensors[outer]),))
    return adapter(method, targets, found, sites, catalogue)


def _check_shared(tensor: TensorRef, rank: int, least: int, axis: int, what: str) -> None:
    """A matrix with r on one axis, and on the other at least what the largest module needs."""
    shape = tensor.shape
    if len(shape) != 2 or shape[1 - axis] != rank or shape[axis] < least:
        wanted = f"shape [{rank}, {least} or more]" if axis else f"shape [{least} or more, {rank}]"
        raise expected(tensor.name, wanted, list(shape), f"a module has {least} {what}")


def _first(tensor: Value, rank: int) -> Value:
    """The first rows of a tensor; the tensor itself where there are no more."""
    if tensor.shape[0] == rank:
        return tensor

    def formula(whole: "Tensor") -> "Tensor":
        return whole[:rank]

    return Computed(tensor.name, (rank, *tensor.shape[1:]), formula, (tensor,))
