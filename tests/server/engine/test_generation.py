"""What is taken from a generation_config, against transformers' own reading of it."""

from typing import Any

import pytest
from transformers import GenerationConfig

from tests.support.backbones import build
from weft.server.engine.generation import TEMPERATURE, TOP_K, TOP_P, default_sampling, eos_ids, unserved
from weft.server.engine.messages import Sampling


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, Sampling()),
        (GenerationConfig(), Sampling()),
        (GenerationConfig(do_sample=False), Sampling()),
        (GenerationConfig(do_sample=True), Sampling(1.0, 50, 1.0)),
        (GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9), Sampling(0.6, 50, 0.9)),
        (GenerationConfig(do_sample=True, top_k=0), Sampling(1.0, 0, 1.0)),
        (GenerationConfig(do_sample=True, top_k=20, temperature=0.7, top_p=0.8), Sampling(0.7, 20, 0.8)),
    ],
)
def test_the_default_is_what_generate_would_do(generation, expected):
    assert default_sampling(generation) == expected


def test_what_is_filled_in_is_what_transformers_fills_in():
    theirs = GenerationConfig._get_default_generation_params()
    assert (theirs["temperature"], theirs["top_k"], theirs["top_p"]) == (TEMPERATURE, TOP_K, TOP_P)
    assert theirs["do_sample"] is False


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repetition_penalty": 1.1}, ["repetition_penalty=1.1"]),
        ({"do_sample": True, "min_p": 0.05, "typical_p": 0.9}, ["min_p=0.05", "typical_p=0.9"]),
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, ["num_beams=4", "no_repeat_ngram_size=3"]),
        ({"suppress_tokens": [1, 2], "forced_eos_token_id": 0}, ["forced_eos_token_id=0", "suppress_tokens=[1, 2]"]),
        ({"do_sample": True, "top_k": 20, "temperature": 0.7, "top_p": 0.8, "eos_token_id": [1, 2]}, []),
        ({"repetition_penalty": 1.0, "do_sample": True, "typical_p": 1.0, "min_p": 0.0, "num_beams": 1}, []),
        ({"max_length": 99, "pad_token_id": 3, "bos_token_id": 1}, []),
        ({"typical_p": 0.9}, []),
    ],
)
def test_every_setting_that_would_change_tokens_and_is_not_served_is_named(settings, expected):
    found = unserved(GenerationConfig(**settings))
    assert found == tuple(f"generation_config: {each} is not served" for each in expected)


def test_what_transformers_fills_in_needs_no_line():
    generation = GenerationConfig(**(GenerationConfig._get_default_generation_params() | {"do_sample": True}))
    assert unserved(generation) == ()
    assert unserved(None) == ()


@pytest.mark.parametrize(
    ("said", "of_model", "expected"),
    [([7, 9], 3, (7, 9)), (7, 3, (7,)), (None, 3, (3,)), (None, [3, 4], (3, 4)), (0, 3, (0,))],
)
def test_tokens_that_end_a_text_may_be_several(said, of_model, expected):
    model: Any = build("llama")
    model.config.eos_token_id = of_model
    model.generation_config = GenerationConfig(eos_token_id=said)
    assert eos_ids(model) == expected
    model.generation_config = None
    assert eos_ids(model) == ((of_model,) if isinstance(of_model, int) else tuple(of_model))


def test_a_model_that_ends_nothing_has_none():
    model = build("llama")
    model.config.eos_token_id, model.generation_config = None, GenerationConfig()
    assert eos_ids(model) == ()
