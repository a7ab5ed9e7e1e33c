"""Our own ``X_DIFFFIT``: DiffFit's scales of sublayers, with biases, norms and embedding rows.

Tensors at ``base_model.model.<decoder layer>.``: ``gamma_attn`` and ``gamma_mlp``, [d] or [1], by which what the
sublayer adds to the residual stream is multiplied: x + γ ⊙ attention(..), x + γ ⊙ mlp(..). At linears and norms those
of ``X_BITFIT`` and ``X_NORM``. At the input embedding ``embed_rows`` [n, d] in the place of its rows ``embed_ids`` [n]
int32 or int64, ascending; without ids, of all rows. Settings: ``tied`` (``native_parameters``) and those of
``native_common``.

γ becomes a scale of the linear that ends the sublayer, its bias included, or, where a norm ends it, part of the weight
and bias of that norm.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected, quoted
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_bitfit import DELTA, VALUE, add_bias
from weft.adapters_store.formats.native_common import Said, read_common
from weft.adapters_store.formats.native_norm import BIAS, WEIGHT, add_norm
from weft.adapters_store.formats.native_parameters import Parameter, checked_index, parameter_at, put, read_tied
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, by_module, require_shape
from weft.adapters_store.operators import ParsedAdapter, Rows, Scale
from weft.adapters_store.parts import ATTENTION, MLP, RowOverride
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, EmbeddingInfo, LayerInfo, NormInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "X_DIFFFIT"

GAMMAS = {"gamma_attn": ATTENTION, "gamma_mlp": MLP}
ROWS, IDS = "embed_rows", "embed_ids"

# names of the norms that end a layer's sublayers, in families that have any
_ENDING_NORMS = {ATTENTION: "post_attention_layernorm", MLP: "post_feedforward_layernorm"}
# of other families, whose layers have a norm in front of each sublayer and no more
_NORMS = 2
# families that store the weights of norms around 0, and multiply by 1 + weight
_AROUND_ZERO = "gemma"

SERVES = (Served("DiffFit", "2304.06648", "scale, bias, norm_override, row_override", "weft X_DIFFFIT", survey=True),)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    tied = read_tied(settings, catalogue)
    settings.finish(METHOD)
    found = by_module(header, [DELTA, VALUE, WEIGHT, BIAS, ROWS, IDS, *GAMMAS], catalogue, [IDS])
    said = Said()
    for module, tensors in found.items():
        add_norm(said, module, tensors, catalogue)
        add_bias(said, module, tensors, catalogue)
        if ROWS in tensors or IDS in tensors:
            _add_rows(said, module, tensors, tied, catalogue)
    # behind the biases, which they scale as well
    for module, tensors in found.items():
        for role, after in GAMMAS.items():
            if role in tensors:
                _add_gamma(said, module, after, tensors[role], catalogue)
    return said.parsed(METHOD, catalogue)


def _add_gamma(said: Said, module: str, after: str, gamma: TensorRef, catalogue: CatalogueInfo) -> None:
    index = next((i for i, layer in enumerate(catalogue.layers) if layer.path == module), None)
    if index is None or (index, after) not in catalogue.hidden_index:
        why = "" if index is None else f"what its {after} adds to the residual stream is not known"
        raise expected(gamma.name, "a decoder layer", f"{quoted(module)}, which is none that weft adapts", why)
    width = catalogue.hidden[catalogue.hidden_index[index, after]].features
    if gamma.shape not in ((width,), (1,)):
        raise expected(gamma.name, f"shape [{width}] or [1]", list(gamma.shape), f"{module} is {width} wide")
    end = _ending(catalogue.layers[index], after, width, gamma, catalogue)
    if isinstance(end, SiteInfo):
        said.at(end.path, Scale(_wide(gamma, width), of_input=False), "gamma of the sublayer")
    else:
        _scale_norm(said, end, gamma, catalogue)


def _ending(
    layer: LayerInfo, after: str, width: int, gamma: TensorRef, catalogue: CatalogueInfo
) -> SiteInfo | NormInfo:
    """The module whose output the sublayer adds to the residual stream, or which alone decides on that."""
    if f"{layer.path}.{_ENDING_NORMS[MLP]}" in catalogue.norm_index:
        return catalogue.norms[catalogue.norm_index[f"{layer.path}.{_ENDING_NORMS[after]}"]]
    of_layer = [norm for norm in catalogue.norms if norm.path.rpartition(".")[0] == layer.path]
    inside = [site for site in catalogue.sites if site.path.startswith(f"{layer.path}.")]
    own = [s for s in inside if s.path.startswith(f"{layer.attention}.") == (after == ATTENTION)]
    if len(of_layer) != _NORMS or not own or own[-1].out_features != width:
        why = "weft does not know which module ends it"
        raise expected(gamma.name, f"an {after} that ends in a linear or a norm", f"that of {layer.path}", why)
    return own[-1]


def _wide(gamma: TensorRef, width: int) -> Value:
    return gamma if gamma.shape == (width,) else Computed(gamma.name, (width,), lambda g: g.expand(width), (gamma,))


def _scale_norm(said: Said, norm: NormInfo, gamma: TensorRef, catalogue: CatalogueInfo) -> None:
    """γ ⊙ (x̂ ⊙ (offset + w) + b), with what was said of w and b before."""
    offset = 1.0 if catalogue.family.startswith(_AROUND_ZERO) else 0.0
    before = said.norms.get(norm.path)

    def weight(gamma: "Tensor", old: "Tensor") -> "Tensor":
        return gamma * (offset + old) - offset

    def bias(gamma: "Tensor", old: "Tensor") -> "Tensor":
        return gamma * old

    shape = (norm.features,)

    def scaled(name: str, formula: "Callable[[Tensor, Tensor], Tensor]", own: Value | None) -> Computed:
        if own is None:
            return Computed(gamma.name, shape, formula, (gamma,), (f"{norm.path}.{name}",))
        return Computed(gamma.name, shape, formula, (gamma, own))

    new_bias = scaled("bias", bias, before.bias if before else None) if norm.has_bias else None
    said.norm(norm.path, scaled("weight", weight, before.weight if before else None), new_bias)


def _add_rows(said: Said, module: str, tensors: Roles, tied: str | None, catalogue: CatalogueInfo) -> None:
    ids, rows = tensors.get(IDS), tensors.get(ROWS)
    if rows is None:
        assert ids is not None
        raise expected(ids.name, f"{ROWS} beside it", "none")
    parameter = parameter_at(module, "weight", rows, tied, catalogue)
    if not isinstance(parameter.place, EmbeddingInfo):
        raise expected(rows.name, "the input embedding", quoted(module))
    if ids is None:
        require_shape(rows, parameter.shape, f"without {IDS}, all rows of {module}")
        put(said, parameter, rows)
        return
    if len(ids.shape) != 1 or ids.elements > parameter.shape[0]:
        raise expected(ids.name, f"one axis of at most {parameter.shape[0]} ids", list(ids.shape))
    require_shape(
        rows, (ids.elements, parameter.shape[1]), f"{ids.elements} ids, {module} is {parameter.shape[1]} wide"
    )
    said.parts.append(RowOverride(ids, rows))
    if parameter.follows:
        said.at(
            parameter.follows, Rows(ids, _minus_old(ids, rows, parameter), replaces=True), "follows the input embedding"
        )


def _minus_old(ids: TensorRef, rows: TensorRef, parameter: Parameter) -> Computed:
    """What the rows add to those of the backbone."""

    def formula(ids: "Tensor", rows: "Tensor", old: "Tensor") -> "Tensor":
        return rows - old[checked_index(name, ids, len(old))]

    name = ids.name
    return Computed(rows.name, rows.shape, formula, (ids, rows), (parameter.path,))
