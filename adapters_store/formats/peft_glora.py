"""PEFT ``GLORA``: W + W ⊙ A + B, and where the linear has a bias b, b + b ⊙ D + E + W C. Elementwise, unlike the paper.

Tensors at ``base_model.model.<module>.glora_<A to E>.``: ``Xd`` [·, r] and ``Xu`` [r, ·] for lora, ``X`` for vector
([out, 1], [in, 1] for C, [out] for D and E) and for constant ([1]), ``zeros`` for none. The same setting rules A and
B, another C, a third D and E; without a bias the last three are none. Vectors and constants are a scale, a pair of
rank 1 and a bias. With lora, W ⊙ A has full rank: a dense delta, which then holds B as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import PREFIX, Roles, require_shape
from weft.adapters_store.operators import Bias, Dense, LowRank, Operator, ParsedAdapter, Scale, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "GLORA"
SERVES = (
    Served(
        "GLoRA, vectors and constants", "2306.07967", "scale, low_rank, bias", "PEFT GLORA", True, counts_as="GLoRA"
    ),
    Served("GLoRA, config_A_B=lora", "2306.07967", "dense, bias", "PEFT GLORA", True, counts_as="GLoRA"),
)

LORA, VECTOR, CONSTANT, NONE = "lora", "vector", "constant", "none"
ENDS = {LORA: ("Xd", "Xu"), VECTOR: ("X",), CONSTANT: ("X",), NONE: ("zeros",)}
ROLES = tuple(f"glora_{letter}.{end}" for letter in "ABCDE" for end in ("Xd", "Xu", "X", "zeros"))


@dataclass(frozen=True, slots=True)
class _Paths:
    """What A and B are, what C is, what D and E are, and r."""

    weights: str
    input: str
    biases: str
    rank: int


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights")
    settings.choice("bias", ("none",), "none", "GLoRA's own terms read the bias that it would replace")
    paths = _Paths(
        settings.choice("config_A_B", (LORA, VECTOR, CONSTANT, NONE), LORA),
        settings.choice("config_C", (LORA, VECTOR, NONE), LORA),
        settings.choice("config_D_E", (VECTOR, CONSTANT, NONE), CONSTANT),
        settings.integer("r"),
    )
    targets = read_targets(settings, catalogue, METHOD, "GLoRA", by_layer=False)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, (), optional=ROLES)
    sites: dict[str, SiteOperators] = {}
    zeros: list[TensorRef] = []
    for site in targets.sites:
        forms = _forms(found.by_site[site.path], site, paths)
        zeros += [form.tensors[0] for form in forms.values() if form.kind == NONE]
        sites[site.path] = SiteOperators(tuple(_operators(forms, site)), ("hadamard form",))
    return adapter(METHOD, targets, found, sites, catalogue, tuple(zeros))


@dataclass(frozen=True, slots=True)
class _Form:
    """One of A to E at a site."""

    kind: str
    tensors: tuple[TensorRef, ...]

    def value(self, tensors: "list[Tensor]") -> "Tensor | float":
        """Its matrix, vector or number, taken from the front of ``tensors``; 0 for none."""
        taken = [tensors.pop(0) for _ in self.tensors] if self.kind != NONE else []
        if self.kind == LORA:
            return taken[0] @ taken[1]
        return taken[0] if taken else 0.0


def _forms(tensors: Roles, site: SiteInfo, paths: _Paths) -> dict[str, _Form]:
    """A to E, all shapes judged."""
    wide, tall, rank = site.in_features, site.out_features, paths.rank
    column, biases = (paths.input, paths.biases) if site.has_bias else (NONE, NONE)
    kinds = {"A": paths.weights, "B": paths.weights, "C": column, "D": biases, "E": biases}
    # rows and columns of each; D and E are flat
    full = {"A": (tall, wide), "B": (tall, wide), "C": (wide, 1), "D": (tall,), "E": (tall,)}
    forms: dict[str, _Form] = {}
    for letter, kind in kinds.items():
        shape = full[letter]
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {
            LORA: ((shape[0], rank), (rank, shape[-1])),
            VECTOR: ((shape[0], 1) if letter in "ABC" else shape,),
            CONSTANT: ((1,),),
            NONE: (shape,),
        }
        roles = [f"glora_{letter}.{end}" for end in ENDS[kind]]
        for role, wanted in zip(roles, shapes[kind], strict=True):
            if role not in tensors:
                raise expected(f"{PREFIX}{site.path}.{role}", "this tensor", "none", f"glora_{letter} is {kind} here")
            require_shape(tensors[role], wanted, f"glora_{letter} is {kind} here, r {rank}, {sizes(site)}")
        forms[letter] = _Form(kind, tuple(tensors[role] for role in roles))
    said = {tensor.name for form in forms.values() for tensor in form.tensors}
    stray = next(
        (tensor.name for tensor in tensors.values() if "glora_" in tensor.name and tensor.name not in said), ""
    )
    if stray:
        raise expected(stray, "no such tensor", "one", "the settings say another form")
    return forms


def _operators(forms: dict[str, _Form], site: SiteInfo) -> list[Operator]:
    a, b, tall, wide = forms["A"], forms["B"], site.out_features, site.in_features
    operators: list[Operator] = []
    if a.kind == LORA:
        sources = (*a.tensors, *b.tensors)
        delta = Computed(a.tensors[0].name, (tall, wide), _dense, sources, (f"{site.path}.weight",))
        operators.append(Dense(delta))
    elif a.kind != NONE:
        sigma = Computed(a.tensors[0].name, (tall,), lambda a: 1 + a.reshape(-1).expand(tall), a.tensors)
        ones = Computed(b.tensors[0].name, (1, wide), _ones(wide), ())
        column = Computed(b.tensors[0].name, (tall, 1), lambda b: b.reshape(-1, 1).expand(tall, 1), b.tensors)
        operators += [Scale(sigma, of_input=False), LowRank(ones, column)]
    scaled = a.kind in (VECTOR, CONSTANT)
    if site.has_bias and (scaled or any(forms[letter].kind != NONE for letter in "CDE")):
        operators.append(Bias(_bias(forms, site, scaled)))
    return operators


def _dense(xd: "Tensor", xu: "Tensor", b_xd: "Tensor", b_xu: "Tensor", weight: "Tensor") -> "Tensor":
    return weight * (xd @ xu) + b_xd @ b_xu


def _ones(wide: int) -> "Callable[..., Tensor]":
    def formula() -> "Tensor":
        import torch

        return torch.ones(1, wide)

    return formula


def _bias(forms: dict[str, _Form], site: SiteInfo, scaled: bool) -> Computed:
    """What is added at the end: the scale before it has multiplied the bias too, by 1 + A."""
    parts = [forms[letter] for letter in ("A", "C", "D", "E")]
    used = [form if form.kind != NONE and (form is not parts[0] or scaled) else _Form(NONE, ()) for form in parts]

    def formula(*given: "Tensor") -> "Tensor":
        *tensors, weight, bias = given
        a, c, d, e = (form.value(tensors) for form in used)
        own = bias * (d - (a if isinstance(a, float) else a.reshape(-1))) + e
        return own if isinstance(c, float) else own + (weight @ c).reshape(-1)

    sources = tuple(tensor for form in used for tensor in form.tensors)
    parameters = (f"{site.path}.weight", f"{site.path}.bias")
    return Computed(f"{PREFIX}{site.path}.glora_E", (site.out_features,), formula, sources, parameters)
