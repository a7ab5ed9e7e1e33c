"""PEFT ``SUPERTUNING``: the largest elements of a weight, each moved by a number, and with ``r`` a low-rank pair too.

Tensors at ``base_model.model.<module>.``: ``supertuning_values`` [n], ``supertuning_indices`` [n] int32 into the flat
[out, in]; with ``r`` also ``supertuning_lora_A.weight`` [r, in], ``supertuning_lora_B.weight`` [out, r], scaled by
lora_alpha/r.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import LowRank, Operator, ParsedAdapter, SiteOperators, Sparse
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "SUPERTUNING"
SERVES = (
    Served(
        "Super-tuning, Supra",
        "2607.09287",
        "sparse, low_rank",
        "PEFT SUPERTUNING",
        refuses="save_precomputed_indices=false: the places are not in the file",
    ),
)

VALUES, INDICES = "supertuning_values", "supertuning_indices"
A, B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights", "sparsity", "select_top", "lora_dropout")
    settings.choice("save_precomputed_indices", (True,), True, "the places of the values are not in the file then")
    rank = settings.optional_integer("r")
    alpha = settings.number("lora_alpha") if rank is not None else 0.0
    settings.ignore("lora_alpha")
    targets = read_targets(settings, catalogue, METHOD, "super-tuning", by_layer=False)
    settings.finish(METHOD)
    roles = [VALUES, INDICES, *([A, B] if rank is not None else [])]
    found = read_tensors(header, catalogue, targets, roles, integers=[INDICES])
    sites = {s.path: _operators(found.by_site[s.path], s, rank, alpha) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, rank: int | None, alpha: float) -> SiteOperators:
    values, index = tensors[VALUES], tensors[INDICES]
    if len(values.shape) != 1:
        raise expected(values.name, "a vector", list(values.shape))
    require_shape(index, values.shape, f"{VALUES} is {list(values.shape)}")
    operators: list[Operator] = [
        Sparse(
            Computed(index.name, values.shape, _ascending, (index,)),
            Computed(values.name, values.shape, _in_that_order, (values, index)),
        )
    ]
    if rank is not None:
        require_shape(tensors[A], (rank, site.in_features), f"r is {rank}, {sizes(site)}")
        require_shape(tensors[B], (site.out_features, rank), f"r is {rank}, {sizes(site)}")
        operators.append(LowRank(tensors[A], tensors[B], alpha / rank))
    return SiteOperators(tuple(operators), ("alpha/r",) if rank is not None else ())


def _ascending(index: "Tensor") -> "Tensor":
    return index.long().sort().values


def _in_that_order(values: "Tensor", index: "Tensor") -> "Tensor":
    return values[index.long().argsort()]
