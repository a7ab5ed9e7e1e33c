"""The settings of PEFT's ``LORA``: those that change the maths, resolved per module; what is not served, by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats import peft_experts
from weft.adapters_store.formats.peft_beside import Beside, read_beside, tied_head, without_saved
from weft.adapters_store.formats.peft_common import fan_in_fan_out_notes, read_common
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.targets import by_pattern, target_modules
from weft.adapters_store.sites import CatalogueInfo

METHOD = "LORA"

DORA, QALORA, BDLORA, ALORA, KASA = "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "kasa_config"
VELORA, MONTECLORA = "velora_config", "monteclora_config"
PISSA, OLORA = "pissa", "olora"

# starts that leave the backbone as it is, and those whose part in its weights can be computed from these again
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
FOLDED_INITS = (PISSA, OLORA)
CHANGED = "it changed the backbone's weights, by what the files do not say"
AGAIN = "save it again as a plain LoRA, by save_pretrained with path_initial_model_for_weight_conversion"
LOFTQ = "it put quantised weights in the place of the backbone's; serve those, and save with init_lora_weights=true"

REFUSED = {
    "arrow_config": "routing between adapters is not served",
    "layer_replication": "it changes the backbone's layers",
    "megatron_config": "megatron layers are not served",
    "enable_lora": "the merged linears of PEFT before 0.4 are not served",
}
DROPOUT = "lora_dropout"
TRAINING_ONLY = (DROPOUT, "eva_config", "corda_config", "lora_ga_config", "loftq_config", "merge_weights")


@dataclass(frozen=True, slots=True)
class Blocks:
    """``use_bdlora``: the factors that consist of ``count`` blocks, by the sites where A or where B is one."""

    count: int
    of_a: frozenset[str]
    of_b: frozenset[str]


@dataclass(frozen=True, slots=True)
class Config:
    """The settings that change the maths.

    sites:       in the order of the backbone
    embedding:   path of the input embedding where it is targeted, else empty
    ranks:       of the sites and the embedding, as are ``scales``
    variant:     the setting that makes it more than a plain LoRA, empty if none does
    start:       ``pissa`` or ``olora`` where the start was taken out of the backbone's weights
    group:       inputs that QA-LoRA pools
    invocation:  the tokens from which on an activated LoRA acts
    parameters:  full names of those of experts, which have ranks and scales as well
    """

    sites: tuple[str, ...]
    embedding: str
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    fold: str
    lora_bias: bool
    variant: str
    start: str
    group: int
    blocks: Blocks | None
    invocation: tuple[int, ...]
    beside: Beside
    parameters: tuple[str, ...]


def read_settings(settings: Settings, catalogue: CatalogueInfo) -> tuple[Config, tuple[str, ...]]:
    """The settings, judged, and notes for the report."""
    tying = settings.flag("ensure_weight_tying")
    beside = read_beside(settings, catalogue, "lora_only", tying)
    read_common(settings)
    for key, why in REFUSED.items():
        settings.refuse(key, why)
    settings.refuse("megatron_core", "megatron layers are not served", but=("megatron.core",))
    parameters = peft_experts.target_parameters(settings, catalogue)
    if parameters:
        peft_experts.require_alone(parameters, {DROPOUT: settings.optional_number(DROPOUT)})
    settings.ignore(*TRAINING_ONLY)
    sites, embedding = _targets(settings, catalogue, beside, tying, not parameters)
    wrapped = (*sites, *([embedding] if embedding else []), *parameters)
    kinds = {path: catalogue.sites[catalogue.index[path]].kind for path in sites}
    notes = fan_in_fan_out_notes(settings, (kind for kind in kinds.values() if kind != "lm_head"))
    ranks = by_pattern(settings.integer_by_pattern("rank_pattern"), settings.integer("r"), wrapped, "rank_pattern")
    alpha, alphas = settings.number("lora_alpha"), settings.number_by_pattern("alpha_pattern")
    weights = by_pattern(alphas, alpha, wrapped, "alpha_pattern")
    stabilised = settings.flag("use_rslora")
    scales = {path: weights[path] / (sqrt(ranks[path]) if stabilised else ranks[path]) for path in wrapped}
    fold = "alpha/sqrt(r)" if stabilised else "alpha/r"
    variant, blocks, invocation = _variant(settings, catalogue, sites)
    start, lora_bias = _start(settings, variant), settings.flag("lora_bias")
    group = settings.integer("qalora_group_size", 2) if variant == QALORA else 0
    settings.ignore("qalora_group_size")
    settings.finish(METHOD)
    config = Config(
        sites, embedding, ranks, scales, fold, lora_bias, variant, start, group, blocks, invocation, beside, parameters
    )
    _check_together(config, kinds)
    _check_start_of_head(config, catalogue)
    return config, notes


def _targets(
    settings: Settings, catalogue: CatalogueInfo, beside: Beside, tying: bool, needed: bool
) -> tuple[tuple[str, ...], str]:
    """Sites, and the input embedding or nothing."""
    found = without_saved(beside, target_modules(settings, catalogue, needed=needed))
    embedding = catalogue.embedding.path if catalogue.embedding is not None else ""
    strangers = [name for name in found if name not in catalogue.index and name != embedding]
    if strangers:
        why = "weft adapts linear modules of the decoder layers, the output embedding and the input embedding"
        raise expected("target_modules", "linear modules or the input embedding", some(strangers), why)
    head = tied_head(catalogue, tying)
    if head and head in found and embedding not in found:
        raise expected("target_modules", f"{embedding} beside {head}", head, "ensure_weight_tying is true")
    sites = {name for name in found if name in catalogue.index}
    if head and embedding in found:
        sites.add(head)
    return tuple(sorted(sites, key=catalogue.index.__getitem__)), embedding if embedding in found else ""


def _variant(
    settings: Settings, catalogue: CatalogueInfo, sites: tuple[str, ...]
) -> tuple[str, Blocks | None, tuple[int, ...]]:
    """The one setting that makes more of it than a plain LoRA, with what belongs to it."""
    blocks, invocation = settings.nested(BDLORA), settings.integers(ALORA) or ()
    nested = {key: settings.nested(key) is not None for key in (KASA, VELORA, MONTECLORA)}
    said = {DORA: settings.flag(DORA), QALORA: settings.flag(QALORA), BDLORA: blocks is not None, **nested}
    chosen = [key for key, is_said in {**said, ALORA: bool(invocation)}.items() if is_said]
    if len(chosen) > 1:
        raise expected(chosen[1], "null or false", "a value", f"PEFT has no {chosen[1]} together with {chosen[0]}")
    limit = catalogue.embedding.rows if catalogue.embedding is not None else 0
    if invocation and max(invocation) >= limit:
        raise expected(ALORA, f"token ids below {limit}", max(invocation))
    variant = chosen[0] if chosen else ""
    return variant, None if blocks is None else _blocks(blocks, sites), invocation


def _blocks(settings: Settings, sites: Iterable[str]) -> Blocks:
    count, strict = settings.integer("nblocks"), settings.flag("match_strict")
    parts: list[frozenset[str]] = []
    for key in ("target_modules_bd_a", "target_modules_bd_b"):
        named = settings.names(key) or ()
        if isinstance(named, str):
            raise expected(key, "a list of names", show(named))
        # any part of a path will do, as in PEFT
        parts.append(frozenset(path for path in sites if any(name in path for name in named)))
    settings.finish(BDLORA)
    both, either = parts[0] & parts[1], parts[0] | parts[1]
    if both:
        raise expected("target_modules_bd_a", "other modules than target_modules_bd_b", some(sorted(both)))
    left = [path for path in sites if path not in either]
    if strict and left:
        raise expected("target_modules_bd_a", "every module here or in target_modules_bd_b", some(left), "match_strict")
    return Blocks(count, *parts)


def _start(settings: Settings, variant: str) -> str:
    """``init_lora_weights``, where it changed the backbone and can be folded."""
    key = "init_lora_weights"
    init = settings.flag_or_text(key, True)
    start = init.lower() if isinstance(init, str) else ""
    if init in HARMLESS_INITS:
        return ""
    if start not in FOLDED_INITS:
        options = ", ".join(show(init).strip('"') for init in (*HARMLESS_INITS, *FOLDED_INITS))
        raise expected(key, f"one of {options}", show(init), LOFTQ if start == "loftq" else f"{CHANGED}; {AGAIN}")
    if variant not in ("", DORA, VELORA, MONTECLORA):
        raise expected(
            key, "true or false", show(init), f"it changed the backbone's weights, beside {variant}; {AGAIN}"
        )
    return start


def _check_together(config: Config, kinds: Mapping[str, str]) -> None:
    """Settings that PEFT has no meaning for together, or that cannot be told apart here."""
    plain = {config.variant: config.variant, "init_lora_weights": config.start, "lora_bias": config.lora_bias}
    peft_experts.require_alone(config.parameters, plain)
    variant, transposed = config.variant, [path for path, kind in kinds.items() if kind == "conv1d"]
    if config.embedding and (config.lora_bias or config.start or variant not in ("", DORA)):
        why = f"PEFT has no {variant or config.start or 'lora_bias'} for embeddings"
        raise expected("target_modules", "linear modules only", config.embedding, why)
    if config.lora_bias and (config.start or variant not in ("", ALORA, VELORA, MONTECLORA)):
        raise expected("lora_bias", "false", "true", f"PEFT has none with {variant or config.start}")
    if transposed and (config.start == OLORA or variant in (BDLORA, KASA)):
        why = f"PEFT has no {variant or config.start} for Conv1D"
        raise expected("target_modules", "nn.Linear modules", some(transposed), why)
    if variant == ALORA and not config.beside.nothing:
        why = "biases, tokens and copies of modules act before the invocation too, and nothing else of it does"
        raise expected(ALORA, "it without bias, modules_to_save and trainable_token_indices", "both", why)
    rows = config.embedding and config.embedding in config.beside.tokens
    if rows:
        raise expected("trainable_token_indices", "an embedding without LoRA", config.embedding)


def _check_start_of_head(config: Config, catalogue: CatalogueInfo) -> None:
    """What a start takes out of a weight that two modules share is missing in both of them."""
    head = catalogue.embedding.tied_head if catalogue.embedding is not None else ""
    start = config.start or (config.variant if config.variant == KASA else "")
    if start and head in config.sites:
        why = f"{start} changed the weight of the input embedding as well, which is the same one"
        raise expected("target_modules", "modules that share no weight", head, why)
