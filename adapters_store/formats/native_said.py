"""Our own ``X_SAID``: intrinsic dimension, a few numbers that a fixed random projection spreads over any parameters.

    ray = (H G Π H B θ)[:n] / (divisor · √(n / N))      H: Walsh-Hadamard, N: the power of two from n on

Tensors: ``theta_d`` θ [k]; per parameter ``proj.<parameter>.B`` int8 [N] of ±1, ``.Pi`` int32 or int64 [N], a
permutation, ``.G`` [N] and ``.divisor``, one number; where wanted ``lambda`` [parameters], by which rays are
multiplied, in the order of the setting ``order``. Settings: ``variant``, ``tied`` (``native_parameters``), and those of
``native_common``.

    dense         n = the parameter's size: it gains the ray in its shape
    light_rank1   n = the sum of its sides: a matrix, as it is stored, gains ray[:rows] ray[rows:]ᵀ, a vector the ray

θ is padded by zeros to N, or cut off there, as in the light form's source: t-few, ``src/models/intrinsic.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected, quoted
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import Said, read_common
from weft.adapters_store.formats.native_parameters import Parameter, add, parameter_at, read_tied
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.tensors import Roles, require_kind, require_shape
from weft.adapters_store.operators import LowRank, ParsedAdapter
from weft.adapters_store.parts import EmbeddingPair
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, EmbeddingInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "X_SAID"

THETA, LAMBDA, PROJECTION = "theta_d", "lambda", "proj."
SIGNS, ORDER, GAUSSIAN, DIVISOR = "B", "Pi", "G", "divisor"
ROLES = (SIGNS, ORDER, GAUSSIAN, DIVISOR)
INTEGER_ROLES = (SIGNS, ORDER)
DENSE, LIGHT = "dense", "light_rank1"

SERVES = (
    Served(
        "Intrinsic SAID",
        "2012.13255",
        "low_rank (light), dense",
        "weft X_SAID",
        survey=True,
        refuses="projections that are a seed: random generators give other numbers elsewhere",
    ),
)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    variant = settings.text("variant", required=True)
    if variant not in (DENSE, LIGHT):
        raise expected("variant", f"one of {DENSE}, {LIGHT}", show(variant))
    settings.refuse("rng", "generators give other numbers in other versions of a library: store the projection")
    tied, order = read_tied(settings, catalogue), settings.names("order")
    settings.finish(METHOD)
    projections = _projections(header)
    theta, strengths = header.tensors.get(THETA), header.tensors.get(LAMBDA)
    if theta is None or len(theta.shape) != 1:
        raise expected(THETA, "this tensor, with one axis", "none" if theta is None else list(theta.shape))
    places = _places(strengths, order, projections)
    said, cut = Said(), 0
    for path, tensors in projections.items():
        module, _, name = path.rpartition(".")
        parameter = parameter_at(module, name, next(iter(tensors.values())), tied, catalogue)
        count = sum(parameter.shape) if variant == LIGHT else prod(parameter.shape)
        ray = _ray(path, theta, tensors, count)
        cut += theta.elements > _padded(count)
        strong = ray if strengths is None else _times_entry(ray, strengths, places[path])
        if variant == LIGHT and len(parameter.shape) == 2:
            _add_pair(said, parameter, ray, strong)
        else:
            add(said, parameter, _shaped(strong, parameter.shape))
    notes = (f"theta_d is longer than the projections of {cut} parameters, which use its beginning",) if cut else ()
    return said.parsed(METHOD, catalogue, notes)


def _projections(header: Header) -> dict[str, Roles]:
    """Tensors by parameter, then by role."""
    found: dict[str, Roles] = {}
    for name, tensor in header.tensors.items():
        path, _, role = name.removeprefix(PROJECTION).rpartition(".")
        if name not in (THETA, LAMBDA):
            if not name.startswith(PROJECTION) or role not in ROLES:
                wanted = f"{THETA}, {LAMBDA} or {PROJECTION}<parameter>. with {', '.join(ROLES)}"
                raise expected(name, wanted, "another tensor")
            found.setdefault(path, {})[role] = tensor
        require_kind(tensor, name not in (THETA, LAMBDA) and role in INTEGER_ROLES)
    for path, tensors in found.items():
        missing = next((role for role in ROLES if role not in tensors), None)
        if missing is not None:
            raise expected(f"{PROJECTION}{path}.{missing}", "this tensor", "none", f"{path} has another one")
    if not found:
        raise expected(f"{PROJECTION}<parameter>.{SIGNS}", "projections", "none", "the numbers alone say nothing")
    return found


def _places(strengths: TensorRef | None, order: object, projections: Mapping[str, Roles]) -> dict[str, int]:
    """Where a parameter's own number stands in ``lambda``."""
    if strengths is None:
        if order is not None:
            raise expected("order", f"it beside {LAMBDA}", "it alone")
        return {}
    if not isinstance(order, tuple):
        raise expected("order", f"a list of parameters: whose number each in {LAMBDA} is", show(order))
    if sorted(order) != sorted(projections):
        stray = next(iter(sorted(set(order) ^ set(projections))), "one twice")
        raise expected("order", "every projected parameter once", quoted(stray))
    require_shape(strengths, (len(order),), f"order lists {len(order)} parameters")
    return {path: place for place, path in enumerate(order)}


def _padded(count: int) -> int:
    """The power of two from a count on."""
    return 1 << (count - 1).bit_length()


def _ray(path: str, theta: TensorRef, tensors: Roles, count: int) -> Computed:
    """What the projection of one parameter makes of θ, [count]."""
    size = _padded(count)
    for role in (SIGNS, ORDER, GAUSSIAN):
        require_shape(tensors[role], (size,), f"{path} takes {count} numbers")
    if tensors[DIVISOR].elements != 1:
        raise expected(tensors[DIVISOR].name, "one number", list(tensors[DIVISOR].shape))
    sources = tuple(tensors[role] for role in ROLES)
    return Computed(
        tensors[GAUSSIAN].name, (count,), _Fastfood(sources[0].name, sources[1].name, count), (theta, *sources)
    )


@dataclass(frozen=True, slots=True)
class _Fastfood:
    """The projection; the names are for messages."""

    signs: str
    order: str
    count: int

    def __call__(
        self, theta: "Tensor", signs: "Tensor", order: "Tensor", gaussian: "Tensor", divisor: "Tensor"
    ) -> "Tensor":
        if not bool((signs.abs() == 1).all()):
            raise expected(self.signs, "1 and -1", "others")
        places = order.long()
        size = len(places)
        if not bool((places.sort().values == places.new_ones(size).cumsum(0) - 1).all()):
            raise expected(self.order, f"every number from 0 to {size - 1} once", "others")
        padded = theta.new_zeros(size)
        used = min(size, len(theta))
        padded[:used] = theta[:used]
        mixed = _hadamard(padded * signs)[places] * gaussian
        return _hadamard(mixed)[: self.count] / (divisor.reshape(()) * sqrt(self.count / size))


def _hadamard(x: "Tensor") -> "Tensor":
    """The Walsh-Hadamard transform of x [a power of two], not normalised."""
    import torch

    width = 1
    while width < len(x):
        pairs = x.view(-1, 2, width)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).view(-1)
        width *= 2
    return x


def _times_entry(value: Value, numbers: TensorRef, place: int) -> Computed:
    def formula(value: "Tensor", numbers: "Tensor") -> "Tensor":
        return value * numbers[place]

    return Computed(value.name, value.shape, formula, (value, numbers))


def _shaped(value: Value, shape: tuple[int, ...]) -> Computed:
    return Computed(value.name, shape, lambda t: t.view(shape), (value,))


def _add_pair(said: Said, parameter: Parameter, ray: Value, strong: Value) -> None:
    """A matrix plus strong[:rows] ray[rows:]ᵀ, rows and columns as it is stored."""
    rows, columns = parameter.shape

    def part(value: Value, start: int, length: int, shape: tuple[int, int]) -> Computed:
        return Computed(value.name, shape, _cut(start, length, shape), (value,))

    def pair(of_columns: bool) -> tuple[Computed, Computed]:
        """a [1, in] and b [out, 1], where out are the columns or the rows."""
        left, right = (strong, 0, rows), (ray, rows, columns)
        wide, tall = (left, right) if of_columns else (right, left)
        return part(*wide, (1, wide[2])), part(*tall, (tall[2], 1))

    if isinstance(parameter.place, EmbeddingInfo):
        said.parts.append(EmbeddingPair(*pair(of_columns=True), 1.0))
        if parameter.follows:
            said.at(parameter.follows, LowRank(*pair(of_columns=False)), "follows the input embedding")
    else:
        said.at(parameter.module, LowRank(*pair(of_columns=parameter.transposed)))


def _cut(start: int, length: int, shape: tuple[int, int]) -> "Callable[[Tensor], Tensor]":
    return lambda t: t[start : start + length].view(shape)
