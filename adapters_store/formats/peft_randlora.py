"""PEFT ``RANDLORA``: a sum of random low-rank matrices of full rank together, weighted by what was trained.

Tensors: ``base_model.randlora_A`` [r, 1, s] and ``base_model.randlora_B`` [l, n, r], shared by all modules, which
repeat them, with s the largest of the modules' smaller sizes; and at ``base_model.model.<module>.``
``randlora_lambda`` [r, m] and ``randlora_gamma`` [m, smaller size] with m = ⌈smaller size / r⌉. The bases λ ⊙ A ⊙ γ,
flattened to [r·m, small], meet the flattened B [large, m·r]. Together they are as large as the weight, so what is
served is their product.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import Dense, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "RANDLORA"
NOT_SAVED = "the random bases are not in the file then, and other machines may draw others"
SERVES = (Served("RandLoRA", "2502.00987", "dense", "PEFT RANDLORA", refuses=f"save_projection=false: {NOT_SAVED}"),)

A, B, LAMBDA, GAMMA = "randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma"

TRAINING_ONLY = ("projection_prng_key", "sparse", "very_sparse", "randlora_dropout", "init_weights")


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore(*TRAINING_ONLY)
    settings.choice("save_projection", (True,), True, NOT_SAVED)
    rank, alpha = settings.integer("r"), settings.number("randlora_alpha")
    targets = read_targets(settings, catalogue, METHOD, "RandLoRA", conv1d=True)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [LAMBDA, GAMMA], optional=[A, B], shared=[A, B])
    small = max(min(s.in_features, s.out_features) for s in targets.sites)
    large = max(max(s.in_features, s.out_features) for s in targets.sites)
    why = f"r is {rank}, the largest module is {small} by {large}"
    shared = found.shared[A], found.shared[B]
    for tensor, shape in zip(shared, ((rank, 1, small), (large, _bases(small, rank), rank)), strict=True):
        if len(tensor.shape) != 3 or any(has < least for has, least in zip(tensor.shape, shape, strict=True)):
            raise expected(tensor.name, f"shape {list(shape)} or more", list(tensor.shape), why)
    require_shape(shared[0], (rank, 1, shared[0].shape[2]), why)
    require_shape(shared[1], (*shared[1].shape[:2], rank), why)
    sites = {s.path: _operators(found.by_site[s.path], shared, s, rank, alpha / rank) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _bases(small: int, rank: int) -> int:
    return -(-small // rank)


def _operators(
    tensors: Roles, shared: tuple[TensorRef, TensorRef], site: SiteInfo, rank: int, scale: float
) -> SiteOperators:
    small, large = sorted((site.in_features, site.out_features))
    bases = _bases(small, rank)
    require_shape(tensors[LAMBDA], (rank, bases), f"r is {rank}, {sizes(site)}")
    require_shape(tensors[GAMMA], (bases, small), f"r is {rank}, {sizes(site)}")
    repeated = [tensors[role] for role in (A, B) if role in tensors]
    for tensor, its in zip(repeated, [shared[(A, B).index(role)] for role in (A, B) if role in tensors], strict=True):
        require_shape(tensor, its.shape, f"{its.name} is {list(its.shape)}")
    again = [(A, B).index(role) for role in (A, B) if role in tensors]

    def product(a: "Tensor", b: "Tensor", factors: "Tensor", gamma: "Tensor", *copies: "Tensor") -> "Tensor":
        for copy, which, ref in zip(copies, again, repeated, strict=True):
            if not copy.equal((a, b)[which]):
                raise expected(ref.name, f"a copy of {shared[which].name}", "other values", "all modules share them")
        scaled = (factors[:, :, None] * a[:, :, :small] * gamma[None]).flatten(0, 1)
        delta = b[:large, :bases].flatten(1) @ scaled * scale
        return delta if small == site.in_features else delta.T

    sources = (*shared, tensors[LAMBDA], tensors[GAMMA], *repeated)
    delta = Computed(tensors[LAMBDA].name, (site.out_features, site.in_features), product, sources)
    return SiteOperators((Dense(delta),), ("alpha/r", "bases multiplied out"))
