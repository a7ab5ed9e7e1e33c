"""The parsers of PEFT's methods other than LoRA and its nearest kin: ``peft_type`` → parser. Imports no torch."""

from collections.abc import Callable, Mapping

from weft.adapters_store.formats import (
    peft_beft,
    peft_boft,
    peft_c3a,
    peft_deft,
    peft_delora,
    peft_fourierft,
    peft_glora,
    peft_gralora,
    peft_hira,
    peft_hra,
    peft_ln_tuning,
    peft_loha,
    peft_miss,
    peft_oft,
    peft_prefixes,
    peft_prompts,
    peft_randlora,
    peft_shira,
    peft_supertuning,
    peft_tinylora,
    peft_trainable_tokens,
    peft_unilora,
    peft_vblora,
    peft_vera,
    peft_waveft,
)
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo

PARSERS: Mapping[str, Callable[[Settings, Header, CatalogueInfo], ParsedAdapter]] = {
    peft_prompts.PROMPT_TUNING: peft_prompts.prompt_tuning,
    peft_prompts.P_TUNING: peft_prompts.p_tuning,
    peft_prompts.CPT: peft_prompts.cpt,
    peft_prompts.MULTITASK: peft_prompts.multitask,
    peft_prefixes.PREFIX_TUNING: peft_prefixes.prefix_tuning,
    peft_prefixes.CARTRIDGE: peft_prefixes.cartridge,
    peft_ln_tuning.METHOD: peft_ln_tuning.parse,
    peft_beft.METHOD: peft_beft.parse,
    peft_shira.METHOD: peft_shira.parse,
    peft_supertuning.METHOD: peft_supertuning.parse,
    peft_loha.METHOD: peft_loha.parse,
    peft_hra.METHOD: peft_hra.parse,
    peft_delora.METHOD: peft_delora.parse,
    peft_miss.METHOD: peft_miss.parse,
    peft_gralora.METHOD: peft_gralora.parse,
    peft_vblora.METHOD: peft_vblora.parse,
    peft_tinylora.METHOD: peft_tinylora.parse,
    peft_unilora.METHOD: peft_unilora.parse,
    peft_glora.METHOD: peft_glora.parse,
    peft_deft.METHOD: peft_deft.parse,
    peft_trainable_tokens.METHOD: peft_trainable_tokens.parse,
    peft_vera.VERA: peft_vera.vera,
    peft_vera.PVERA: peft_vera.pvera,
    peft_randlora.METHOD: peft_randlora.parse,
    peft_c3a.METHOD: peft_c3a.parse,
    peft_fourierft.METHOD: peft_fourierft.parse,
    peft_waveft.METHOD: peft_waveft.parse,
    peft_oft.METHOD: peft_oft.parse,
    peft_boft.METHOD: peft_boft.parse,
    peft_hira.METHOD: peft_hira.parse,
}
