"""Our own ``X_SPARSE``: deltas of a few entries of any parameters, as DiffPruning, FishMask and LT-SFT train them.

Tensors at ``base_model.model.<parameter>.``: ``sparse_indices`` [nnz] int32 or int64 into the flat parameter, row by
row as the backbone stores it, ascending, each once, with ``sparse_values`` [nnz], what is added there; or ``abs``, a
tensor of the parameter's shape in its place. Settings: ``density``, which informs only; ``tied``
(``native_parameters``); ``embedding_rows``, how many rows of the input embedding its indices touch, where somebody
counted them; those of ``native_common``.

Entries of an embedding become the rows that they are in if those are known to take less memory, which they do where a
few tokens were trained; else they stay entries.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import Said, only_one_of, read_common
from weft.adapters_store.formats.native_parameters import (
    BIAS,
    WEIGHT,
    Parameter,
    add,
    checked_index,
    parameter_at,
    put,
    read_tied,
    spread,
)
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, by_module, missing_tensor, require_shape
from weft.adapters_store.operators import ParsedAdapter, Sparse
from weft.adapters_store.parts import EmbeddingEntries, RowOverride
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, EmbeddingInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "X_SPARSE"

INDICES, VALUES, ABS = "sparse_indices", "sparse_values", "abs"
# above this a dense delta takes less memory in any dtype
DENSITY_MAX = 0.5

INDEX_BYTES = 4
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_OPERATORS = "sparse, bias, norm_override, row_override, embedding_entries"
SERVES = (
    Served("DiffPruning", "2012.07463", _OPERATORS, "weft X_SPARSE", survey=True),
    Served("FishMask", "2111.09839", _OPERATORS, "weft X_SPARSE", survey=True),
    Served("LT-SFT", "2110.07560", _OPERATORS, "weft X_SPARSE", survey=True),
)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    settings.ignore("density")
    tied = read_tied(settings, catalogue)
    rows = settings.optional_integer("embedding_rows")
    settings.finish(METHOD)
    roles = [f"{name}.{role}" for name in (WEIGHT, BIAS) for role in (INDICES, VALUES, ABS)]
    found = by_module(header, roles, catalogue, [role for role in roles if role.endswith(INDICES)])
    said = Said()
    for module, tensors in found.items():
        for name in (WEIGHT, BIAS):
            own = {role: tensors[full] for role in (INDICES, VALUES, ABS) if (full := f"{name}.{role}") in tensors}
            if own:
                first = next(iter(own.values()))
                _change(said, parameter_at(module, name, first, tied, catalogue), own, rows, catalogue)
    if rows and not any(isinstance(part, EmbeddingEntries | RowOverride) for part in said.parts):
        raise expected("embedding_rows", "it beside entries of the input embedding", "it alone")
    return said.parsed(METHOD, catalogue)


def _change(said: Said, parameter: Parameter, own: Roles, rows: int | None, catalogue: CatalogueInfo) -> None:
    """One parameter's tensors: ``abs``, or indices with values."""
    only_one_of(own, ABS, INDICES)
    whole = only_one_of(own, ABS, VALUES) if ABS in own else None
    if whole is not None:
        require_shape(whole, parameter.shape, f"{parameter.path} is {list(parameter.shape)}")
        put(said, parameter, whole)
        return
    for role, other in ((INDICES, VALUES), (VALUES, INDICES)):
        if role not in own:
            raise missing_tensor(parameter.path, role, f"{other} is there")
    index, values = own[INDICES], own[VALUES]
    _check_entries(index, values, parameter)
    if isinstance(parameter.place, EmbeddingInfo):
        said.parts.append(_of_embedding(parameter, parameter.place, index, values, rows, catalogue.dtype))
        if parameter.follows:
            said.at(parameter.follows, Sparse(index, values), "follows the input embedding")
    elif isinstance(parameter.place, SiteInfo) and parameter.name == WEIGHT:
        turned = _turned(index, values, parameter) if parameter.transposed else (index, values)
        said.at(parameter.module, Sparse(*turned))
    else:
        add(said, parameter, spread(index, values, parameter.shape[0]))


def _check_entries(index: TensorRef, values: TensorRef, parameter: Parameter) -> None:
    if len(index.shape) != 1:
        raise expected(index.name, "one axis", list(index.shape))
    require_shape(values, index.shape, f"as many as {INDICES}")
    size = prod(parameter.shape)
    if index.elements > DENSITY_MAX * size and len(parameter.shape) > 1:
        wanted = f"at most {DENSITY_MAX:.0%} of the {size} entries of {parameter.path}"
        raise expected(index.name, wanted, index.elements, "X_DENSE takes less memory for more")


def _turned(index: TensorRef, values: TensorRef, parameter: Parameter) -> tuple[Computed, Computed]:
    """Entries of a matrix that is stored [in, out], in the order of [out, in]."""
    wide, tall = parameter.shape

    def flat(index: "Tensor") -> "Tensor":
        place = checked_index(index_name, index, wide * tall)
        return place % tall * wide + place // tall

    def places(index: "Tensor") -> "Tensor":
        return flat(index).sort().values

    def ordered(index: "Tensor", values: "Tensor") -> "Tensor":
        return values[flat(index).argsort()]

    index_name, shape = index.name, index.shape
    return (
        Computed(index.name, shape, places, (index,)),
        Computed(values.name, shape, ordered, (index, values)),
    )


def _of_embedding(
    parameter: Parameter, embedding: EmbeddingInfo, index: TensorRef, values: TensorRef, rows: int | None, dtype: str
) -> EmbeddingEntries | RowOverride:
    """Entries of the input embedding, or the whole rows that they are in; ``rows``: how many those are, if known."""
    if rows is None:
        return EmbeddingEntries(index, values)
    most = min(index.elements, embedding.rows)
    if rows > most:
        raise expected("embedding_rows", f"1 to {most}", rows)
    touched = _Touched(index.name, rows, embedding.features, embedding.rows)
    size = ITEM_BYTES[dtype]
    if index.elements * (INDEX_BYTES + size) <= rows * (INDEX_BYTES + embedding.features * size):
        return EmbeddingEntries(Computed(index.name, index.shape, touched.counted, (index,)), values)
    ids = Computed(index.name, (rows,), touched.ids, (index,))
    shape = (rows, embedding.features)
    return RowOverride(ids, Computed(values.name, shape, touched.changed, (index, values), (parameter.path,)))


@dataclass(frozen=True, slots=True)
class _Touched:
    """The rows of a table [rows, width] that entries are in: ``count`` of them; ``name`` is that of the indices."""

    name: str
    count: int
    width: int
    rows: int

    def ids(self, index: "Tensor") -> "Tensor":
        """Their numbers, ascending."""
        import torch

        found: Tensor = torch.unique(checked_index(self.name, index, self.rows * self.width) // self.width)
        if len(found) != self.count:
            raise expected("embedding_rows", f"{len(found)}, as many as {INDICES} touch", self.count)
        return found

    def counted(self, index: "Tensor") -> "Tensor":
        """The indices themselves, whose rows have been counted."""
        self.ids(index)
        return index

    def changed(self, index: "Tensor", values: "Tensor", old: "Tensor") -> "Tensor":
        """What they become, [count, width]."""
        import torch

        ids, flat = self.ids(index), index.long()
        # indexing by a tensor copies
        new = old[ids]
        new[torch.searchsorted(ids, flat // self.width), flat % self.width] += values
        return new
