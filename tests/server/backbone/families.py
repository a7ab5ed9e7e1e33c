"""What is known of each family beforehand, written down from its code: the tests' own word on where places are."""

from weft.adapters_store.parts import TAPS

RMS, GEMMA_RMS, LAYER_NORM = (False, 0.0), (False, 1.0), (True, 0.0)
GEMMA_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
PLAIN = (("input_layernorm", "post_attention_layernorm"), RMS, 1e-6, ("self_attn", "mlp"), TAPS)
NO_LN = tuple(tap for tap in TAPS if tap != "ln_x")
# per family: norms of a layer in the order in which they run, (centred, offset), epsilon, ends of sublayers, taps
EXPECTED: dict[str, tuple[tuple[str, ...], tuple[bool, float], float, tuple[str, str], tuple[str, ...]]] = {
    "llama": PLAIN,
    "qwen2": PLAIN,
    "mistral": PLAIN,
    "mixtral": (*PLAIN[:2], 1e-5, *PLAIN[3:]),
    "phi3": (*PLAIN[:2], 1e-5, ("resid_attn_dropout", "resid_mlp_dropout"), TAPS),
    "qwen3": (
        ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"), *PLAIN[1:]
    ),
    "gpt2": (("ln_1", "ln_2"), LAYER_NORM, 1e-5, ("attn", "mlp"), TAPS),
    "opt": (("self_attn_layer_norm", "final_layer_norm"), LAYER_NORM, 1e-5, ("self_attn", "fc2"), TAPS),
    "gemma2": (GEMMA_NORMS, GEMMA_RMS, 1e-6, (GEMMA_NORMS[1], GEMMA_NORMS[3]), TAPS),
    "gemma3": (
        (GEMMA_NORMS[0], "self_attn.q_norm", "self_attn.k_norm", *GEMMA_NORMS[1:]),
        GEMMA_RMS, 1e-6, (GEMMA_NORMS[1], GEMMA_NORMS[3]), TAPS,
    ),
    "olmo2": (
        ("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "post_feedforward_layernorm"),
        RMS, 1e-5, ("post_attention_layernorm", "post_feedforward_layernorm"), NO_LN,
    ),
}  # fmt: skip
LAYERS = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}
LAST_NORM = {"gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm"}
# the norms between the residual stream and either sublayer, empty where there is none
BETWEEN = {
    "gpt2": ("ln_1", "ln_2"),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "gemma2": (GEMMA_NORMS[0], GEMMA_NORMS[2]),
    "gemma3": (GEMMA_NORMS[0], GEMMA_NORMS[2]),
    "olmo2": ("", ""),
}
EMBEDDINGS = {"gpt2": "transformer.wte", "opt": "model.decoder.embed_tokens"}


def layers_of(family: str, count: int) -> list[str]:
    """Paths of the decoder layers."""
    return [f"{LAYERS.get(family, 'model.layers')}.{i}" for i in range(count)]


def norms_of(family: str, count: int) -> list[str]:
    """Paths of all norms in the order in which they run."""
    paths = [f"{layer}.{name}" for layer in layers_of(family, count) for name in EXPECTED[family][0]]
    return [*paths, LAST_NORM.get(family, "model.norm")]


def attention_of(family: str, layer: str) -> str:
    """Path of a layer's attention."""
    return f"{layer}.{'attn' if family == 'gpt2' else 'self_attn'}"


def embedding_of(family: str) -> str:
    """Path of the input embedding."""
    return EMBEDDINGS.get(family, "model.embed_tokens")


def between_of(family: str) -> tuple[str, str]:
    """The norms between the residual stream and either sublayer, by name; empty where there is none."""
    return BETWEEN.get(family, ("input_layernorm", "post_attention_layernorm"))
