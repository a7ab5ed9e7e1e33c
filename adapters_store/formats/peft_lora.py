"""PEFT ``LORA``: y += s·(x Aᵀ) Bᵀ with s = alpha/r or, with rsLoRA, alpha/√r; also biases, scaled or absolute.

Tensors at ``base_model.model.<module>.``: ``lora_A.weight`` [r, in], ``lora_B.weight`` [out, r], with ``lora_bias``
``lora_B.bias`` [out], which s scales too. ``bias="all"`` and ``"lora_only"`` bring absolute biases of the linears.
A and B lie the same way for Conv1D, whose own weight is stored [in, out].
"""

from dataclasses import dataclass
from math import sqrt

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.peft_common import (
    COPY_ROLES,
    DIALECT,
    copies,
    fan_in_fan_out_notes,
    read_common,
)
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import by_pattern, target_sites
from weft.adapters_store.formats.tensors import (
    Roles,
    by_module,
    missing_tensor,
    require_exactly,
    require_shape,
    require_site,
)
from weft.adapters_store.operators import Bias, LowRank, Operator, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo

METHOD = "LORA"

A, B, B_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
# of a module that LoRA wraps, and of any other
BASE_BIAS, BIAS = "base_layer.bias", "bias"

HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
BASE_CHANGING = "it changes the backbone's weights, which are shared here; re-save it as a plain LoRA"
REFUSED = {
    "use_dora": "DoRA is not served",
    "use_qalora": "QALoRA is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "trainable_token_indices": "trainable tokens are not served",
    "target_parameters": "LoRA of bare parameters (experts) is not served",
    "alora_invocation_tokens": "activated LoRA is not served",
    "kasa_config": BASE_CHANGING,
    "arrow_config": "routing between adapters is not served",
    "layer_replication": "it changes the backbone's layers",
    "megatron_config": "megatron layers are not served",
    "enable_lora": "the merged linears of PEFT before 0.4 are not served",
}
TRAINING_ONLY = (
    "lora_dropout",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "velora_config",
    "monteclora_config",
    "qalora_group_size",
    "merge_weights",
)


@dataclass(frozen=True, slots=True)
class _Config:
    """The settings that change the maths, each resolved per site."""

    sites: tuple[str, ...]
    ranks: dict[str, int]
    scales: dict[str, float]
    fold: str
    bias: str
    lora_bias: bool


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    config, notes = _read(settings, catalogue)
    roles = [A, B, *([B_BIAS] if config.lora_bias else [])]
    found = by_module(header, [A, B, B_BIAS, BASE_BIAS, BIAS, *COPY_ROLES], catalogue)
    _check_stray_bias(found, config)
    require_exactly(found, config.sites, roles)
    biases = _absolute_biases(found, config, catalogue)
    sites: dict[str, SiteOperators] = {}
    for path in sorted({*config.sites, *biases}, key=catalogue.index.__getitem__):
        site = catalogue.sites[catalogue.index[path]]
        operators: list[Operator] = []
        folds: list[str] = []
        if path in config.ranks:
            operators += _low_rank(found[path], site, config)
            folds.append(config.fold)
        if path in biases:
            operators.append(biases[path])
            folds.append("bias value - base")
        sites[path] = SiteOperators(tuple(operators), tuple(folds))
    return ParsedAdapter(METHOD, DIALECT, sites, copies(found), notes)


def _read(settings: Settings, catalogue: CatalogueInfo) -> tuple[_Config, tuple[str, ...]]:
    read_common(settings)
    for key, why in REFUSED.items():
        settings.refuse(key, why)
    settings.refuse("megatron_core", "megatron layers are not served", but=("megatron.core",))
    settings.choice("init_lora_weights", HARMLESS_INITS, True, BASE_CHANGING)
    settings.ignore(*TRAINING_ONLY)
    sites = target_sites(settings, catalogue)
    kinds = {path: catalogue.sites[catalogue.index[path]].kind for path in sites}
    if settings.flag("ensure_weight_tying") and "lm_head" in kinds.values():
        raise expected("ensure_weight_tying", "false", "true", "LoRA of input embeddings is not served")
    notes = fan_in_fan_out_notes(settings, (kind for kind in kinds.values() if kind != "lm_head"))
    ranks = by_pattern(settings.integer_by_pattern("rank_pattern"), settings.integer("r"), sites, "rank_pattern")
    alphas = by_pattern(
        settings.number_by_pattern("alpha_pattern"), settings.number("lora_alpha"), sites, "alpha_pattern"
    )
    stabilised = settings.flag("use_rslora")
    scales = {path: alphas[path] / (sqrt(ranks[path]) if stabilised else ranks[path]) for path in sites}
    bias = settings.choice("bias", ("none", "all", "lora_only"), "none")
    config = _Config(
        sites, ranks, scales, "alpha/sqrt(r)" if stabilised else "alpha/r", bias, settings.flag("lora_bias")
    )
    settings.finish(METHOD)
    return config, notes


def _low_rank(tensors: Roles, site: SiteInfo, config: _Config) -> list[Operator]:
    rank, scale = config.ranks[site.path], config.scales[site.path]
    why = f"r is {rank} here, {site.path} is {site.in_features} -> {site.out_features}"
    require_shape(tensors[A], (rank, site.in_features), why)
    require_shape(tensors[B], (site.out_features, rank), why)
    operators: list[Operator] = [LowRank(tensors[A], tensors[B], scale)]
    if config.lora_bias:
        require_shape(tensors[B_BIAS], (site.out_features,), why)
        operators.append(Bias(tensors[B_BIAS], scale))
    return operators


def _check_stray_bias(found: dict[str, Roles], config: _Config) -> None:
    for tensors in found.values():
        if B_BIAS in tensors and not config.lora_bias:
            raise expected(tensors[B_BIAS].name, "no such tensor", "one", "lora_bias is false")
        stray = tensors.get(BASE_BIAS) or tensors.get(BIAS)
        if stray is not None and config.bias == "none":
            raise expected(stray.name, "no such tensor", "one", "bias is none")


def _absolute_biases(found: dict[str, Roles], config: _Config, catalogue: CatalogueInfo) -> dict[str, Bias]:
    """Biases that replace those of the backbone, by site."""
    if config.bias == "none":
        return {}
    wrapped = set(config.sites)
    biases: dict[str, Bias] = {}
    for module, tensors in found.items():
        for role in (BASE_BIAS, BIAS):
            tensor = tensors.get(role)
            if tensor is None:
                continue
            if module not in catalogue.index:
                raise expected(tensor.name, "biases of linear modules", "one of a norm, which is not served")
            if (role == BASE_BIAS) != (module in wrapped) or (role == BIAS and config.bias == "lora_only"):
                raise expected(tensor.name, f"the biases that bias={config.bias} saves", "another")
            site = require_site(module, tensor, catalogue)
            if not site.has_bias:
                raise expected(tensor.name, "a bias of the backbone to replace", "a module without one")
            require_shape(tensor, (site.out_features,), f"{module} has {site.out_features} outputs")
            biases[module] = Bias(tensor, absolute=True)
    due = [site.path for site in catalogue.sites if site.has_bias]
    asked = [path for path in due if config.bias == "all" or path in wrapped]
    missing = [path for path in asked if path not in biases]
    if missing:
        role = BASE_BIAS if missing[0] in wrapped else BIAS
        raise missing_tensor(missing[0], role, f"bias is {config.bias}", len(missing) - 1)
    return biases
