"""Tiny random models, one builder per family: every call gives the same weights, so an oracle can have its own copy."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 101
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**COMMON, num_hidden_layers=2))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**COMMON, num_hidden_layers=2, head_dim=16))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def _gemma3() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**COMMON, num_hidden_layers=3, head_dim=16, sliding_window=8, layer_types=layers)
    return _talkative(Gemma3ForCausalLM(config))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**COMMON, num_hidden_layers=2))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**COMMON, num_hidden_layers=2, sliding_window=8))


def _phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**COMMON, num_hidden_layers=2, original_max_position_embeddings=256))


def _gemma2() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention"]
    config = Gemma2Config(
        **COMMON, num_hidden_layers=2, head_dim=16, sliding_window=8, layer_types=layers, query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
    )  # fmt: skip
    return _talkative(Gemma2ForCausalLM(config))


def _talkative(model: PreTrainedModel) -> PreTrainedModel:
    """More weight on what sublayers add: with their norms near 1 a tied head only repeats the last token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.fill_(3.0)
    return model


def _opt() -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(config)


def _olmo2() -> PreTrainedModel:
    return Olmo2ForCausalLM(Olmo2Config(**COMMON, num_hidden_layers=2))


def _mixtral() -> PreTrainedModel:
    config = MixtralConfig(**COMMON, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "gemma3": _gemma3,
    "qwen2": _qwen2,
    "mistral": _mistral,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "opt": _opt,
    "olmo2": _olmo2,
    "mixtral": _mixtral,
}
# every family is proven against its own ``generate``; the first four carry every adapter there is
ALL_FAMILIES = tuple(BUILDERS)
FAMILIES = ALL_FAMILIES[:4]


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of this family in fp32 and eval mode, with weights large enough that logits are far from uniform."""
    torch.manual_seed(seed)
    model = BUILDERS[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.eval()
    return model
