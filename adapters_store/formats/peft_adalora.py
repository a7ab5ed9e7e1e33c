"""PEFT ``ADALORA``: y += s·(x (A ⊙ E)ᵀ) Bᵀ with s = alpha / (init_r + 1e-5), whatever rank pruning has left.

Tensors at ``base_model.model.<module>.``, without ``.weight``: ``lora_A`` [r, in], ``lora_B`` [out, r], ``lora_E``
[r, 1], cut to the rank that is left of each module. ``rank_pattern`` says which ranks these were; a module of rank 0
stays as it is in the backbone.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_beside import ROLES, gather, read_beside, without_saved
from weft.adapters_store.formats.peft_common import (
    COPY_ROLES,
    DIALECT,
    copies,
    fan_in_fan_out_notes,
    read_common,
)
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import target_sites
from weft.adapters_store.formats.tensors import Roles, by_module, require_exactly, require_shape
from weft.adapters_store.operators import LowRank, Operator, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "ADALORA"
A, B, E = "lora_A", "lora_B", "lora_E"
EPSILON = 1e-5
SUFFIX = f".{E}"

SERVES = (
    Served(
        "AdaLoRA",
        "arXiv 2303.10512",
        "low_rank",
        "PEFT ADALORA",
        survey=True,
        refuses="sites other than linear modules",
    ),
)

# the schedule of pruning, and what AdaLoRA has from LoRA but does not look at
TRAINING_ONLY = (
    "lora_dropout",
    "target_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
    "r",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "qalora_group_size",
    "use_qalora",
    "lora_bias",
)
REFUSED = (
    "use_dora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "arrow_config",
    "alora_invocation_tokens",
    "target_parameters",
    "layer_replication",
    "megatron_config",
)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    beside = read_beside(settings, catalogue, "lora_only", settings.flag("ensure_weight_tying"))
    read_common(settings)
    for key in REFUSED:
        settings.refuse(key, "PEFT has no AdaLoRA with it")
    settings.refuse("megatron_core", "megatron layers are not served", but=("megatron.core",))
    settings.ignore(*TRAINING_ONLY)
    sites = tuple(without_saved(beside, target_sites(settings, catalogue)))
    kinds = (catalogue.sites[catalogue.index[path]].kind for path in sites)
    notes = fan_in_fan_out_notes(settings, (kind for kind in kinds if kind != "lm_head"))
    first, pattern = settings.integer("init_r"), settings.flags_by_name("rank_pattern")
    scale = _scale(settings.number("lora_alpha"), first, bool(pattern))
    settings.finish(METHOD)
    ranks = _ranks(pattern, first, sites)
    found = by_module(header, [A, B, E, *ROLES, *COPY_ROLES], catalogue)
    require_exactly(found, sites, [A, B, E])
    brought = gather(found, beside, sites, catalogue)
    operators: dict[str, list[Operator]] = {path: list(said) for path, said in brought.operators.items()}
    dropped = []
    for path in sites:
        site = catalogue.sites[catalogue.index[path]]
        _check(found[path], site, ranks[path])
        if ranks[path]:
            operators.setdefault(path, []).append(_pair(found[path], scale))
        else:
            dropped.append(path)
    if dropped:
        notes = (*notes, f"pruned to rank 0, so left as they are: {some(dropped)}")
    parsed = {
        path: SiteOperators(tuple(operators[path]), ("alpha/init_r", "E into A") if ranks.get(path) else ())
        for path in sorted(operators, key=catalogue.index.__getitem__)
    }
    along = copies({module: tensors for module, tensors in found.items() if module not in beside.saved})
    return ParsedAdapter(METHOD, DIALECT, parsed, along, notes, parts=brought.parts(catalogue))


def _scale(alpha: float, first: int, pruned: bool) -> float:
    if alpha:
        return alpha / (first + EPSILON)
    if pruned:
        why = "without one PEFT scales a pruned adapter differently in training and after loading"
        raise expected("lora_alpha", "a number above 0", 0, why)
    return first / (first + EPSILON)


def _ranks(pattern: dict[str, tuple[bool, ...]], first: int, sites: tuple[str, ...]) -> dict[str, int]:
    """The rank that is left at each site."""
    ranks = dict.fromkeys(sites, first)
    for name, kept in pattern.items():
        path = name.removesuffix(SUFFIX)
        if path == name or path not in ranks:
            raise expected("rank_pattern", f"names of targeted modules that end in {SUFFIX}", some([name]))
        if len(kept) != first:
            raise expected("rank_pattern", f"{first} ranks, as init_r says", len(kept), some([name]))
        ranks[path] = sum(kept)
    return ranks


def _check(tensors: Roles, site: SiteInfo, rank: int) -> None:
    why = f"rank {rank} is left here, {site.path} is {site.in_features} -> {site.out_features}"
    require_shape(tensors[A], (rank, site.in_features), why)
    require_shape(tensors[B], (site.out_features, rank), why)
    require_shape(tensors[E], (rank, 1), why)


def _pair(tensors: Roles, scale: float) -> LowRank:
    def weighted(a: "Tensor", e: "Tensor") -> "Tensor":
        return a * e

    a = tensors[A]
    return LowRank(Computed(a.name, a.shape, weighted, (a, tensors[E])), tensors[B], scale)
