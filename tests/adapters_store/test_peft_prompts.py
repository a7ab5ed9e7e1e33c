"""Soft prompts and prefixes that peft made are read as peft reads them, and refused where they do not fit."""

import pytest
import torch

from tests.adapters_store.conftest import sites
from tests.adapters_store.files import HIDDEN, KV, LAYERS, Files, filled, noise
from tests.support.methods.case import ALL, Case, WholePass
from tests.support.methods.peft_prompts import CASES, _OneTask
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats import read_adapter
from weft.kernels.extras import Extra, Kind
from weft.kernels.layout import unpack_records

TOKENS, WIDTH = 5, 2 * LAYERS * KV


def records(folder, family: str) -> tuple[Extra, ...]:
    """What an adapter's block holds beyond the normal form."""
    model = sites(family)
    parsed = read_adapter(folder, model.info)
    image, report = compile_adapter(parsed, model, model.geometry(), 1 << 30)
    assert report.device_bytes == image.numel() == block_bytes(parsed, model.geometry(), model)
    return unpack_records(model.geometry(), image)


def of_peft(case: Case, family: str, folder):
    """What peft puts in front: rows, or a cache."""
    oracle = case.oracle(family, folder)
    passes = oracle.oracle if isinstance(oracle, _OneTask) else oracle
    assert isinstance(passes, WholePass)
    with torch.inference_mode():
        return passes.model.get_prompt(1)  # type: ignore[operator]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_block_holds_what_peft_puts_in_front(case, family, tmp_path):
    folder = case.make(family, tmp_path, 3)
    found, wanted = records(folder, family), of_peft(case, family, folder)
    if isinstance(wanted, torch.Tensor):
        (soft,) = found
        assert soft.kind == Kind.SOFT
        assert soft.tensors[0] is not None
        torch.testing.assert_close(soft.tensors[0], wanted[0], rtol=0, atol=2e-6)
        return
    assert [record.place for record in found] == list(range(len(wanted.layers)))
    for record, layer in zip(found, wanted.layers, strict=True):
        count, shifts, *_ = record.options
        assert record.kind == Kind.PREFIX
        assert shifts == 1
        for ours, theirs in zip(record.tensors[:2], (layer.keys, layer.values), strict=True):
            assert ours is not None
            heads = ours.view(-1, count, ours.shape[1])
            # a layer with a window forgets what is beyond it
            kept = theirs.shape[2]
            assert torch.equal(heads[:, count - kept :], theirs[0])
            assert float(theirs.std()) > 0.2


def test_the_scheduler_hears_of_rows_and_positions(tmp_path):
    by_name = {case.name: case for case in CASES}
    llama = sites("llama")

    def traits(name: str):
        folder = by_name[name].make("llama", tmp_path / name, 0)
        parsed = read_adapter(folder, llama.info)
        return compile_adapter(parsed, llama, llama.geometry(), 1 << 30)[1].traits

    assert (traits("prompt_tuning").extra_rows, traits("prompt_tuning").position_offset) == (TOKENS, 0)
    assert (traits("prefix_tuning").extra_rows, traits("prefix_tuning").position_offset) == (0, TOKENS)


def soft(**settings) -> Files:
    """PROMPT_TUNING for the tiny llama."""
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": TOKENS,
        "token_dim": HIDDEN,
        "num_transformer_submodules": 1,
        "num_layers": LAYERS,
        "num_attention_heads": 4,
        "prompt_tuning_init": "RANDOM",
    }
    return Files(config, {"prompt_embeddings": noise((TOKENS, HIDDEN))}).configured(**settings)


def prefix(**settings) -> Files:
    """PREFIX_TUNING for the tiny llama."""
    changed = {"peft_type": "PREFIX_TUNING", "token_dim": KV, "num_attention_heads": 2, "prompt_tuning_init": ...}
    files = soft(**changed).configured(**settings)
    return files.with_tensor("prompt_embeddings", noise((TOKENS, WIDTH)))


def multitask(**settings) -> Files:
    """MULTITASK_PROMPT_TUNING with one task."""
    files = soft(peft_type="MULTITASK_PROMPT_TUNING", num_tasks=1, num_ranks=2).configured(**settings)
    files = files.with_tensor("prefix_task_cols", noise((1, TOKENS, 2)))
    return files.with_tensor("prefix_task_rows", noise((1, 2, HIDDEN)))


ROWS = "prompt_embeddings"
REFUSED = {
    "no_task": (soft(task_type=...), "task_type", "never puts a prompt in front"),
    "other_task": (soft(task_type="SEQ_CLS"), "task_type", "expected one of CAUSAL_LM"),
    "seq2seq": (soft(num_transformer_submodules=2), "num_transformer_submodules", "encoder-decoder"),
    "rows": (soft(num_virtual_tokens=4), ROWS, "expected shape [4, 32], got [5, 32]"),
    "no_tokens": (soft(num_virtual_tokens=0), "num_virtual_tokens", "at least 1"),
    "width": (soft(token_dim=16), "token_dim", "which is 32 wide, got 16"),
    "unknown": (soft(soft_scale=2), "soft_scale", "settings of PROMPT_TUNING"),
    "saved_modules": (soft(modules_to_save=["lm_head"]), "modules_to_save", "full copies"),
    "two_submodules": (soft().with_tensor(ROWS, noise((2 * TOKENS, HIDDEN))), ROWS, "got [10, 32]"),
    "stray": (soft().with_tensor("prompt_encoder.weight", noise((2, 2))), "prompt_encoder.weight", "no tensor but"),
    "missing": (soft().renamed(ROWS, "prompts"), "prompts", "no tensor but prompt_embeddings"),
    "nan": (soft().with_tensor(ROWS, filled((TOKENS, HIDDEN), float("nan"))), ROWS, "finite values"),
    "prefix_layers": (prefix(num_layers=3), "num_layers", "this backbone's 2 that take a prefix, got 3"),
    "prefix_heads": (prefix(num_attention_heads=4), "num_attention_heads", "this backbone's 2 heads"),
    "prefix_width": (prefix(token_dim=HIDDEN), "token_dim", "2 heads times this backbone's 8 of keys"),
    "prefix_rows": (prefix(num_virtual_tokens=6), ROWS, "expected shape [6, 64], got [5, 64]"),
    "prefix_unknown": (prefix(prefix_gate=True), "prefix_gate", "settings of PREFIX_TUNING"),
    "prefix_inf": (prefix().with_tensor(ROWS, filled((TOKENS, WIDTH), float("inf"))), ROWS, "finite values"),
    "tasks": (multitask(num_tasks=3), "num_tasks", "expected 1, got 3"),
    "task_rank": (multitask(num_ranks=3), "prefix_task_cols", "num_ranks 3"),
    "task_factor": (multitask().with_tensor("prefix_task_rows", None), "prefix_task_rows", "got none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, llama, tmp_path):
    files, field, words = REFUSED[name]
    with pytest.raises(AdapterInvalid) as refusal:
        compile_adapter(read_adapter(files.write(tmp_path), llama.info), llama, llama.geometry(), 1 << 30)
    assert refusal.value.field == field
    assert words in refusal.value.message


@pytest.mark.parametrize("files", [soft(), prefix(), multitask()], ids=["soft", "prefix", "multitask"])
def test_what_the_refusals_break_is_valid_to_begin_with(files, tmp_path):
    assert records(files.write(tmp_path), "llama")
