"""PEFT ``RANDLORA``: a sum of random low-rank matrices of full rank together, weighted by what was trained.

Tensors: ``base_model.randlora_A`` [r, 1, s] and ``base_model.randlora_B`` [l, n, r], shared by all modules, which
repeat them, with s the largest of the modules' smaller sizes; and at ``base_model.model.<module>.``
``randlora_lambda`` [r, m] and ``randlora_gamma`` [m, smaller size] with m = ⌈smaller size / r⌉. The bases λ ⊙ A ⊙ γ,
flattened to [r·m, small], meet the flattened B [large, m·r]. Together they are as large as the weight, so what is
served is their product.

Without ``save_projection`` the two are not in the file but drawn from ``projection_prng_key`` (``drawn``): uniform in
bfloat16, in which PEFT draws wherever the machine has it, or with ``sparse`` and ``very_sparse`` -1, 0 and 1; each
divided by its deviation.
"""

from math import sqrt
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.drawn import REDRAWN, Drawn
from weft.adapters_store.formats.peft_linears import Targets, adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import Dense, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Generator, Tensor

METHOD = "RANDLORA"
SERVES = (Served("RandLoRA", "2502.00987", "dense", f"PEFT RANDLORA, {REDRAWN}"),)

A, B, LAMBDA, GAMMA = "randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma"

TRAINING_ONLY = ("randlora_dropout", "init_weights")
# with ``sparse``, one entry of three is not 0
SPARSITY = 3.0


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore(*TRAINING_ONLY)
    saved = settings.choice("save_projection", (True, False), True)
    seed = settings.optional_integer("projection_prng_key", 0) if saved else settings.integer("projection_prng_key", 0)
    sparse, very_sparse = settings.flag("sparse"), settings.flag("very_sparse")
    rank, alpha = settings.integer("r"), settings.number("randlora_alpha")
    targets = read_targets(settings, catalogue, METHOD, "RandLoRA", conv1d=True)
    settings.finish(METHOD)
    roles = [A, B] if saved else []
    found = read_tensors(header, catalogue, targets, [LAMBDA, GAMMA], optional=roles, shared=roles)
    shared: tuple[Value, Value]
    if seed is None or saved:
        shared = _checked(found.shared, targets, rank)
    else:
        small, large = sorted(max(each) for each in zip(*_shapes(targets), strict=True))
        sparsity = sqrt(small) if very_sparse else SPARSITY if sparse else None
        drawn = _drawn(seed, rank, small, large, sparsity)
        shared = drawn.value(0, f"base_model.{A}"), drawn.value(1, f"base_model.{B}")
    sites = {s.path: _operators(found.by_site[s.path], shared, s, rank, alpha / rank) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _shapes(targets: Targets) -> list[tuple[int, int]]:
    return [(site.in_features, site.out_features) for site in targets.sites]


def _checked(shared: Roles, targets: Targets, rank: int) -> tuple[TensorRef, TensorRef]:
    """The bases of the file, which must be as large as the largest module asks."""
    small, large = max(map(min, _shapes(targets))), max(map(max, _shapes(targets)))
    why = f"r is {rank}, the largest module is {small} by {large}"
    a, b = shared[A], shared[B]
    for tensor, shape in ((a, (rank, 1, small)), (b, (large, _bases(small, rank), rank))):
        if len(tensor.shape) != 3 or any(has < least for has, least in zip(tensor.shape, shape, strict=True)):
            raise expected(tensor.name, f"shape {list(shape)} or more", list(tensor.shape), why)
    require_shape(a, (rank, 1, a.shape[2]), why)
    require_shape(b, (*b.shape[:2], rank), why)
    return a, b


def _drawn(seed: int, rank: int, small: int, large: int, sparsity: float | None) -> Drawn:
    """Both bases as PEFT draws them: B by columns of one base each where they are not sparse."""
    bases = _bases(small, rank)
    shapes = (rank, 1, small), (large, bases, rank)

    def uniform(random: "Generator") -> "tuple[Tensor, ...]":
        import torch

        def draw(*shape: int) -> "Tensor":
            empty = torch.empty(shape, dtype=torch.bfloat16)
            return torch.nn.init.kaiming_uniform_(empty, a=sqrt(5), generator=random)

        return draw(*shapes[0]), torch.cat([draw(large, 1, rank) for _ in range(bases)], dim=1)

    def signs(random: "Generator") -> "tuple[Tensor, ...]":
        import torch

        assert sparsity is not None
        edge = 1 / (2 * sparsity)
        numbers = [torch.rand(shape, generator=random) for shape in shapes]
        return tuple((n > 1 - edge).float() - (n < edge).float() for n in numbers)

    def scaled(random: "Generator") -> "tuple[Tensor, ...]":
        return tuple(t / t.std() for t in (uniform if sparsity is None else signs)(random))

    return Drawn(seed, shapes, scaled)


def _bases(small: int, rank: int) -> int:
    return -(-small // rank)


def _operators(tensors: Roles, shared: tuple[Value, Value], site: SiteInfo, rank: int, scale: float) -> SiteOperators:
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
