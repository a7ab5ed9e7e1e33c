"""Builds the demonstration backbone: a character tokenizer and a small llama trained on tagged tasks.

Run as ``python -m weft.server.demo.train_backbone [--out DIR]``; about twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weft.server.demo import tasks
from weft.server.demo.training import CONSOLE, Example, Schedule, batches, train

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
)

HIDDEN_WIDTH = 128
MLP_WIDTH = 384
LAYERS = 4
QUERY_HEADS = 4
KEY_VALUE_HEADS = 2
CONTEXT_TOKENS = 512

STEPS = 2400
BATCH_SIZE = 256
LEARNING_RATE_MAX = 2e-3
WEIGHT_DECAY = 0.01
SEED = 20


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; a prompt encoded as text gets ``<bos>`` in front."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *tasks.ALPHABET))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    # Without Fuse the decoder would put a space between the characters.
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, vocabulary[BOS_TOKEN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained llama of about 0.8 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def tagged_examples(seed: int) -> Iterator[Example]:
    """Training words under a randomly chosen tag each, for ever."""
    rng = random.Random(seed)
    names = sorted(tasks.TASKS)
    for word in tasks.words(seed, held_out=False):
        name = rng.choice(names)
        yield Example(tasks.tagged_prompt(name, word), tasks.TASKS[name](word))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write an ordinary transformers folder."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(out_dir)
    # The chat template stays inside tokenizer_config.json: one file fewer to lose.
    tokenizer.save_pretrained(out_dir, save_jinja_files=False)


def main() -> None:
    """Train the backbone and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=tasks.ASSETS_DIR / "backbone", help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the weights and the words")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    schedule = Schedule(options.steps, BATCH_SIZE, LEARNING_RATE_MAX, WEIGHT_DECAY)
    CONSOLE.print(f"backbone: {model.num_parameters():,} parameters, {len(tasks.TASKS)} tasks")
    train(model, batches(tokenizer, tagged_examples(options.seed), BATCH_SIZE), schedule, "backbone")
    save(model, tokenizer, options.out)
    CONSOLE.print(f"backbone: saved in {options.out}")


if __name__ == "__main__":
    main()
