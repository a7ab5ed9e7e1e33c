"""What a backbone's generation_config asks for: what is served of it, and what is not. Values as transformers' own
``generate`` takes them, which fills in for those that are unset."""

from collections.abc import Callable

from transformers import GenerationConfig, PreTrainedModel

from weft.server.engine.messages import Sampling

# what ``generate`` takes for those that are unset
TEMPERATURE, TOP_K, TOP_P = 1.0, 50, 1.0


def _is_set(value: object) -> bool:
    return bool(value)


def _is_not_one(value: object) -> bool:
    return value != 1


def _is_below_one(value: object) -> bool:
    return isinstance(value, int | float) and value < 1


# settings that change which tokens come, and the values of each that do
UNSERVED: dict[str, Callable[[object], bool]] = {
    "num_beams": _is_not_one,
    "num_beam_groups": _is_not_one,
    "penalty_alpha": _is_set,
    "dola_layers": _is_set,
    "constraints": _is_set,
    "force_words_ids": _is_set,
    "guidance_scale": _is_not_one,
    "sequence_bias": _is_set,
    "repetition_penalty": _is_not_one,
    "no_repeat_ngram_size": _is_set,
    "bad_words_ids": _is_set,
    "min_length": _is_set,
    "min_new_tokens": _is_set,
    "forced_bos_token_id": lambda _: True,
    "forced_eos_token_id": lambda _: True,
    "exponential_decay_length_penalty": _is_set,
    "suppress_tokens": _is_set,
    "begin_suppress_tokens": _is_set,
    "stop_strings": _is_set,
    "watermarking_config": _is_set,
}
# those that do so only where tokens are drawn
UNSERVED_SAMPLING: dict[str, Callable[[object], bool]] = {
    "top_h": lambda _: True,
    "min_p": _is_set,
    "typical_p": _is_below_one,
    "epsilon_cutoff": _is_set,
    "eta_cutoff": _is_set,
}


def eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that end a text, from generation_config, else from the model's own; none where neither names any."""
    generation = model.generation_config
    found = None if generation is None else generation.eos_token_id
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def default_sampling(generation: GenerationConfig | None) -> Sampling:
    """How to pick where a request does not say: greedy unless sampling is asked for."""
    if generation is None or not generation.do_sample:
        return Sampling()
    return Sampling(
        temperature=float(_or(generation.temperature, TEMPERATURE)),
        top_k=int(_or(generation.top_k, TOP_K)),
        top_p=float(_or(generation.top_p, TOP_P)),
    )


def unserved(generation: GenerationConfig | None) -> tuple[str, ...]:
    """A line on every setting that ``generate`` would follow and this engine does not."""
    if generation is None:
        return ()
    rules = UNSERVED | (UNSERVED_SAMPLING if generation.do_sample else {})
    values = {name: getattr(generation, name, None) for name in rules}
    return tuple(
        f"generation_config: {name}={value} is not served"
        for name, value in values.items()
        if value is not None and rules[name](value)
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
