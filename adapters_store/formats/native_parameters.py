"""Changes of whole parameters, as formats speak of them that know no modules: which operator each of them becomes.

A parameter is the weight or bias of a linear, of a norm, or the weight of the input embedding; what changes it lies as
the backbone stores it, [in, out] for a Conv1D. Where the output embedding shares the weight of the input embedding,
the setting ``tied`` says whether it follows a change of that (``shared``) or keeps its own (``independent``).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected, quoted
from weft.adapters_store.formats.native_common import Said, raised
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.operators import Bias, Dense
from weft.adapters_store.parts import RowOverride
from weft.adapters_store.sites import CatalogueInfo, EmbeddingInfo, NormInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

SHARED, INDEPENDENT = "shared", "independent"
WEIGHT, BIAS = "weight", "bias"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One frozen parameter.

    shape:    as the module stores it
    follows:  the site whose weight is the same and changes with it, empty if there is none
    """

    module: str
    name: str
    place: SiteInfo | NormInfo | EmbeddingInfo
    shape: tuple[int, ...]
    follows: str = ""

    @property
    def path(self) -> str:
        """Of the parameter itself."""
        return f"{self.module}.{self.name}"

    @property
    def transposed(self) -> bool:
        """Whether it is a matrix that lies as [in, out]."""
        return isinstance(self.place, SiteInfo) and self.name == WEIGHT and self.place.kind == "conv1d"


def read_tied(settings: Settings, catalogue: CatalogueInfo) -> str | None:
    """The setting ``tied``, as far as it describes this backbone."""
    tied: str | None = settings.choice("tied", (SHARED, INDEPENDENT), None)
    head = catalogue.embedding is not None and catalogue.embedding.tied_head
    if tied == SHARED and not head:
        why = "the output embedding of this backbone has a weight of its own"
        raise expected("tied", f"{INDEPENDENT}, or nothing", tied, why)
    return tied


def parameter_at(module: str, name: str, tensor: TensorRef, tied: str | None, catalogue: CatalogueInfo) -> Parameter:
    """The parameter that a tensor changes. AdapterInvalid if there is none, or if it is not clear what follows it."""
    embedding = catalogue.embedding
    if (
        embedding is not None
        and name == WEIGHT
        and embedding.tied_head
        and module in (embedding.path, embedding.tied_head)
    ):
        _require_said(tensor, tied, module == embedding.path, embedding)
    if embedding is not None and (module, name) == (embedding.path, WEIGHT):
        follows = embedding.tied_head if tied == SHARED else ""
        return Parameter(module, name, embedding, (embedding.rows, embedding.features), follows)
    place = _linear_or_norm(module, catalogue)
    if place is None:
        wanted = "a parameter of a linear module, a norm or the input embedding"
        raise expected(tensor.name, wanted, f"{quoted(f'{module}.{name}')}, which weft does not adapt")
    if name == BIAS and not place.has_bias:
        raise expected(tensor.name, "a parameter of this backbone", f"{quoted(module)}, which has no bias")
    if isinstance(place, NormInfo):
        return Parameter(module, name, place, (place.features,))
    matrix = (place.out_features, place.in_features)
    stored = matrix[::-1] if place.kind == "conv1d" else matrix
    return Parameter(module, name, place, stored if name == WEIGHT else (place.out_features,))


def add(said: Said, parameter: Parameter, delta: Value) -> None:
    """The parameter plus a tensor of its shape."""
    module = parameter.module
    if isinstance(parameter.place, NormInfo):
        new = raised(delta, parameter.path)
        said.norm(module, **{parameter.name: new})
    elif isinstance(parameter.place, EmbeddingInfo):
        said.parts.append(RowOverride(tuple(range(parameter.shape[0])), raised(delta, parameter.path)))
        if parameter.follows:
            said.at(parameter.follows, Dense(delta), "follows the input embedding")
    elif parameter.name == BIAS:
        said.at(module, Bias(delta))
    else:
        said.at(module, Dense(turned(delta) if parameter.transposed else delta))


def put(said: Said, parameter: Parameter, value: Value) -> None:
    """A tensor of its shape in the parameter's place."""
    module = parameter.module
    if isinstance(parameter.place, NormInfo):
        said.norm(module, **{parameter.name: value})
    elif isinstance(parameter.place, EmbeddingInfo):
        said.parts.append(RowOverride(tuple(range(parameter.shape[0])), value))
        if parameter.follows:
            lowered = _lowered(value, f"{parameter.follows}.weight")
            said.at(parameter.follows, Dense(lowered, replaces=True), "value - base")
    elif parameter.name == BIAS:
        said.at(module, Bias(value, absolute=True), "bias value - base")
    else:
        stored = turned(value) if parameter.transposed else value
        said.at(module, Dense(_lowered(stored, parameter.path), replaces=True), "value - base")


def turned(value: Value) -> Computed:
    """A matrix the other way round."""
    rows, columns = value.shape
    return Computed(value.name, (columns, rows), lambda matrix: matrix.T, (value,))


def checked_index(field: str, index: "Tensor", below: int, ascending: bool = True) -> "Tensor":
    """Indices that a formula was given, judged before it uses them: each in [0, below) and once, in order if asked."""
    index = index.long().reshape(-1)
    wrong = index[(index < 0) | (index >= below)]
    if len(wrong):
        raise expected(field, f"indices from 0 to {below - 1}", int(wrong[0]))
    steps = index.diff() if ascending else index.sort().values.diff()
    if bool((steps <= 0).any()):
        wanted = "indices in ascending order, each once" if ascending else "indices that stand once each"
        raise expected(field, wanted, "others")
    return index


def spread(index: TensorRef, values: TensorRef, length: int, ascending: bool = True) -> Computed:
    """The vector [length] that is zero but for ``values`` [n] at ``index`` [n]."""

    def formula(index: "Tensor", values: "Tensor") -> "Tensor":
        return values.new_zeros(length).index_copy(0, checked_index(name, index, length, ascending), values)

    name = index.name
    return Computed(values.name, (length,), formula, (index, values))


def _lowered(value: Value, parameter: str) -> Computed:
    def formula(value: "Tensor", old: "Tensor") -> "Tensor":
        return value - old

    return Computed(value.name, value.shape, formula, (value,), (parameter,))


def _linear_or_norm(module: str, catalogue: CatalogueInfo) -> SiteInfo | NormInfo | None:
    if module in catalogue.index:
        return catalogue.sites[catalogue.index[module]]
    return catalogue.norms[catalogue.norm_index[module]] if module in catalogue.norm_index else None


def _require_said(tensor: TensorRef, tied: str | None, of_input: bool, embedding: EmbeddingInfo) -> None:
    """Where two embeddings share a weight, the file must say what becomes of the other one."""
    other = embedding.tied_head if of_input else embedding.path
    if tied is None:
        why = f"{tensor.name} changes a weight that {other} shares"
        raise expected("tied", f"{SHARED} or {INDEPENDENT}", "none", why)
    if tied == SHARED and not of_input:
        raise expected(tensor.name, f"a change of {other}, which shares its weight", "this one", f"tied is {SHARED}")
