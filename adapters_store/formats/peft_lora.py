"""PEFT ``LORA``: y += s·(x Aᵀ) Bᵀ with s = alpha/r or, with rsLoRA, alpha/√r; its variants; its input embeddings.

Tensors at ``base_model.model.<module>.``: ``lora_A.weight`` [r, in], ``lora_B.weight`` [out, r], with ``lora_bias``
``lora_B.bias`` [out], which s scales too, with DoRA ``lora_magnitude_vector`` [out]; at the input embedding
``lora_embedding_A`` [r, vocabulary] and ``lora_embedding_B`` [d, r]. A and B lie the same way for Conv1D, whose own
weight is stored [in, out]. What else the files may bring is in ``peft_beside``.
"""

from weft.adapters_store.errors import expected
from weft.adapters_store.formats import peft_dora, peft_experts
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_beside import ROLES, gather
from weft.adapters_store.formats.peft_common import COPY_ROLES, DIALECT, copies
from weft.adapters_store.formats.peft_dora import MAGNITUDE
from weft.adapters_store.formats.peft_lora_factors import DIAGONAL, A, B, Pair, pair
from weft.adapters_store.formats.peft_lora_settings import (
    DORA,
    KASA,
    METHOD,
    MONTECLORA,
    VELORA,
    Config,
    read_settings,
)
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, by_module, require_exactly, require_shape
from weft.adapters_store.operators import Bias, LowRank, Operator, ParsedAdapter, SiteOperators
from weft.adapters_store.parts import EmbeddingPair, Part, TokenMask
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo

__all__ = ["METHOD", "SERVES", "parse"]

B_BIAS = "lora_B.bias"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
VELORA_ROLES = ("lora_velora_embed",)
MONTECLORA_ROLES = tuple(
    f"lora_monteclora_sampler.{name}"
    for name in ("expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior")
)
# what a tensor may be there for, and the setting that says so
BECAUSE = {
    B_BIAS: "lora_bias is false",
    MAGNITUDE: "use_dora is false",
    DIAGONAL: "kasa_config is null",
    EMBEDDING_A: "target_modules names no input embedding",
    EMBEDDING_B: "target_modules names no input embedding",
    **dict.fromkeys(VELORA_ROLES, "velora_config is null"),
    **dict.fromkeys(MONTECLORA_ROLES, "monteclora_config is null"),
}

SERVES = (
    Served(
        "LoRA",
        "arXiv 2106.09685",
        "low_rank",
        "PEFT LORA, pissa and olora starts among them",
        survey=True,
        refuses="starts that no file holds: pissa_niter, corda, lora_ga, loftq",
    ),
    Served("rsLoRA", "arXiv 2312.03732", "low_rank", "PEFT LORA, use_rslora", counts_as="LoRA"),
    Served("DoRA", "arXiv 2402.09353", "scale, low_rank, bias", "PEFT LORA, use_dora", survey=True),
    Served("QA-LoRA", "arXiv 2309.14717", "low_rank", "PEFT LORA, use_qalora", survey=True),
    Served(
        "QLoRA",
        "arXiv 2305.14314",
        "low_rank",
        "PEFT LORA",
        survey=True,
        refuses="quantised backbones: the served one is in full precision",
        counts_as="LoRA",
    ),
    Served("BD-LoRA", "PEFT 0.21", "low_rank", "PEFT LORA, use_bdlora"),
    Served("aLoRA", "arXiv 2504.12397", "low_rank, token_mask", "PEFT LORA, alora_invocation_tokens"),
    Served("KaSA", "arXiv 2412.06071", "low_rank", "PEFT LORA, kasa_config", counts_as="LoRA"),
    Served(
        "LoRA of experts",
        "PEFT 0.21",
        "expert_pair",
        "PEFT LORA, target_parameters",
        refuses="parameters other than gate_up_proj and down_proj of experts that are proven at load",
        counts_as="LoRA",
    ),
    Served("LoRA of embeddings", "PEFT 0.21", "embedding_pair", "PEFT LORA, lora_embedding_A", counts_as="LoRA"),
    Served("Trainable tokens", "PEFT 0.21", "row_override, rows", "PEFT LORA, trainable_token_indices"),
    Served(
        "whole modules",
        "PEFT 0.21",
        "dense, row_override, norm_override",
        "PEFT LORA, modules_to_save",
        refuses="modules other than the output head, the input embedding and norms",
        counts_as="LoRA",
    ),
    Served("BitFit", "arXiv 2106.10199", "bias, norm_override", "PEFT LORA, bias", survey=True),
)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    config, notes = read_settings(settings, catalogue)
    inner = [peft_experts.INNER_A, peft_experts.INNER_B]
    found = by_module(header, [A, B, *inner, *BECAUSE, *ROLES, *COPY_ROLES], catalogue)
    _check_roles(found, config)
    brought = gather(found, config.beside, config.sites, catalogue)
    sites: dict[str, SiteOperators] = {}
    for path in sorted({*config.sites, *brought.operators}, key=catalogue.index.__getitem__):
        before = brought.operators.get(path, [])
        bias = next((said for said in before if isinstance(said, Bias)), None)
        folds: tuple[str, ...] = ("bias value - base",) if bias is not None else ()
        operators: list[Operator] = list(before)
        if path in config.ranks:
            said, done = _adapted(found[path], catalogue.sites[catalogue.index[path]], config, bias)
            operators, folds = operators + said, folds + done
        sites[path] = SiteOperators(tuple(operators), folds)
    inside = peft_experts.parts(found, config.parameters, config.ranks, config.scales, catalogue)
    parts = (*_embedding(found, config, catalogue), *inside, *brought.parts(catalogue))
    if config.invocation:
        parts = (*parts, TokenMask(config.invocation))
    along = copies({module: tensors for module, tensors in found.items() if module not in config.beside.saved})
    return ParsedAdapter(METHOD, DIALECT, sites, along, notes, parts=parts)


def _check_roles(found: dict[str, Roles], config: Config) -> None:
    """The sites have what the settings promise, and nothing else of a LoRA is there."""
    roles = [A, B]
    roles += [B_BIAS] if config.lora_bias else []
    roles += [MAGNITUDE] if config.variant == DORA else []
    roles += [DIAGONAL] if config.variant == KASA else []
    of_embedding = [EMBEDDING_A, EMBEDDING_B] if config.embedding else []
    known = {*roles, *of_embedding}
    known.update(VELORA_ROLES if config.variant == VELORA else ())
    known.update(MONTECLORA_ROLES if config.variant == MONTECLORA else ())
    for tensors in found.values():
        for role, tensor in tensors.items():
            if role in BECAUSE and role not in known:
                raise expected(tensor.name, "no such tensor", "one", BECAUSE[role])
    others = {config.embedding, *(name.rpartition(".")[0] for name in config.parameters)}
    of_linears = {module: tensors for module, tensors in found.items() if module not in others}
    require_exactly(of_linears, config.sites, roles)
    require_exactly(found, [config.embedding] if config.embedding else [], of_embedding)
    if config.embedding and config.variant == DORA:
        require_exactly({config.embedding: found[config.embedding]}, [config.embedding], [MAGNITUDE])


def _adapted(
    tensors: Roles, site: SiteInfo, config: Config, bias: Bias | None
) -> tuple[list[Operator], tuple[str, ...]]:
    """What LoRA says at a site, and what was folded."""
    both = pair(tensors, site, config)
    if config.variant == DORA:
        return peft_dora.operators(site, both, tensors[MAGNITUDE], bias), (*both.folds, "m/‖W + sBA‖")
    said: list[Operator] = [LowRank(both.a, both.b, both.scale)]
    if config.lora_bias:
        require_shape(tensors[B_BIAS], (site.out_features,), f"{site.path} has {site.out_features} outputs")
        said.append(Bias(tensors[B_BIAS], both.scale))
    return said, both.folds


def _embedding(found: dict[str, Roles], config: Config, catalogue: CatalogueInfo) -> tuple[Part, ...]:
    """LoRA of the input embedding, if it is a target."""
    embedding = catalogue.embedding
    if not config.embedding or embedding is None:
        return ()
    tensors, rank = found[config.embedding], config.ranks[config.embedding]
    a, b = tensors[EMBEDDING_A], tensors[EMBEDDING_B]
    why = f"r is {rank} here, {config.embedding} has {embedding.rows} rows of {embedding.features}"
    require_shape(a, (rank, embedding.rows), why)
    require_shape(b, (embedding.features, rank), why)
    if config.variant == DORA:
        both = Pair(a, b, config.scales[config.embedding], ())
        return (peft_dora.of_embedding(embedding, both, tensors[MAGNITUDE]),)
    return (EmbeddingPair(a, b, config.scales[config.embedding]),)
