"""PEFT's soft prompts ``PROMPT_TUNING``, ``P_TUNING``, ``CPT`` and, with one task, ``MULTITASK_PROMPT_TUNING``.

Tensor ``prompt_embeddings`` [v, d]: rows that stand in front of the text's embeddings, whose positions begin at v.
P-tuning's encoder and CPT's projection are evaluated when PEFT saves, so neither is in the file. Multitask tuning
multiplies the rows by ``prefix_task_cols`` [tasks, v, k] times ``prefix_task_rows`` [tasks, k, d] of the task.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_common import DIALECT, TASK_TYPE, read_common
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_kind, require_shape
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import SoftPrompt
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.tensor_refs import Computed, Value

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_TUNING, P_TUNING, CPT, MULTITASK = "PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING"

SERVES = (
    Served("Prompt tuning", "2104.08691", "soft_prompt", "PEFT PROMPT_TUNING", survey=True),
    Served("P-tuning", "2103.10385", "soft_prompt", "PEFT P_TUNING"),
    Served("CPT", "2410.17222", "soft_prompt", "PEFT CPT"),
    Served(
        "Multitask prompt tuning",
        "2303.02861",
        "soft_prompt",
        "PEFT MULTITASK_PROMPT_TUNING",
        refuses="several tasks: which one is said by no file",
    ),
)

ROWS, COLUMN_FACTORS, ROW_FACTORS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"

# how rows were made and trained: none of it changes what the saved ones do
TRAINING_ONLY = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "prompt_tuning_init_state_dict_path",
    "prompt_tuning_init_task",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
    "cpt_token_ids",
    "cpt_mask",
    "cpt_tokens_type_mask",
    "opt_weighted_loss_type",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    # of the model that it was trained on; rows of a fitting width are all that matters here
    "num_attention_heads",
    "num_layers",
)


def prompt_tuning(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    return _parse(PROMPT_TUNING, settings, header, catalogue)


def p_tuning(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    return _parse(P_TUNING, settings, header, catalogue)


def cpt(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    return _parse(CPT, settings, header, catalogue)


def multitask(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    tasks, rank = settings.integer("num_tasks"), settings.integer("num_ranks")
    if tasks != 1:
        raise expected("num_tasks", "1", tasks, "which task a request is about is said by no file")
    return _parse(MULTITASK, settings, header, catalogue, rank)


def read_prompt_settings(settings: Settings) -> tuple[int, int]:
    """What all of PEFT's prompts say, prefixes among them: (number of virtual tokens, width)."""
    task = settings.choice("task_type", (TASK_TYPE,), None, "the backbone is a causal language model")
    if task is None:
        raise expected("task_type", TASK_TYPE, "null", "without it PEFT itself never puts a prompt in front")
    read_common(settings)
    submodules = settings.choice("num_transformer_submodules", (1,), 1, "encoder-decoder models have two")
    assert submodules == 1
    return settings.integer("num_virtual_tokens"), settings.integer("token_dim")


def only(header: Header, names: tuple[str, ...]) -> Roles:
    """The tensors of these names, all floats; AdapterInvalid if one is missing or another is there."""
    stray = next((name for name in header.tensors if name not in names), None)
    if stray is not None:
        raise expected(stray, f"no tensor but {', '.join(names)}", "one")
    for name in names:
        if name not in header.tensors:
            raise expected(name, "this tensor", "none")
        require_kind(header.tensors[name])
    return dict(header.tensors)


def _parse(
    method: str, settings: Settings, header: Header, catalogue: CatalogueInfo, task_rank: int = 0
) -> ParsedAdapter:
    count, width = read_prompt_settings(settings)
    settings.ignore(*TRAINING_ONLY)
    settings.finish(method)
    if catalogue.embedding is None or catalogue.embedding.features != width:
        has = "none" if catalogue.embedding is None else f"{catalogue.embedding.features} wide"
        raise expected("token_dim", f"the width of this backbone's input embedding, which is {has}", width)
    found = only(header, (ROWS, COLUMN_FACTORS, ROW_FACTORS) if task_rank else (ROWS,))
    why = f"num_virtual_tokens is {count}, token_dim {width}"
    require_shape(found[ROWS], (count, width), why)
    rows: Value = found[ROWS]
    if task_rank:
        why = f"{why}, num_ranks {task_rank}"
        require_shape(found[COLUMN_FACTORS], (1, count, task_rank), why)
        require_shape(found[ROW_FACTORS], (1, task_rank, width), why)
        sources = (found[ROWS], found[COLUMN_FACTORS], found[ROW_FACTORS])
        rows = Computed(ROWS, (count, width), _of_the_task, sources)
    return ParsedAdapter(method, DIALECT, {}, parts=(SoftPrompt(rows),))


def _of_the_task(rows: "Tensor", columns: "Tensor", factors: "Tensor") -> "Tensor":
    return rows * (columns[0] @ factors[0])
