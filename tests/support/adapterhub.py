"""Golden adapters of AdapterHub and what it answers with them, as ``tests/golden/make_adapterhub.py`` wrote them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from tests.support.backbones import BUILDERS, COMMON

GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub"
FAMILIES = tuple(sorted(path.name for path in GOLDEN.iterdir()))


def kinds(family: str) -> tuple[str, ...]:
    """The names of the golden adapters of a family."""
    return tuple(sorted(path.name for path in (GOLDEN / family).iterdir() if path.is_dir()))


ALL = tuple((family, kind) for family in FAMILIES for kind in kinds(family))


def backbone(family: str) -> PreTrainedModel:
    """A copy of the model that the answers are of, in fp32 and eval mode."""
    if family == "mistral":
        model: PreTrainedModel = MistralForCausalLM(MistralConfig(**COMMON, num_hidden_layers=2, sliding_window=None))
    else:
        model = BUILDERS[family]()
    weights = load_file(GOLDEN / family / "backbone.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    # a head that shares the embedding's weight is not stored
    assert set(missing) <= {"lm_head.weight"}, missing
    model.eval()
    return model


def folder(family: str, kind: str) -> Path:
    """As the library saved it."""
    return GOLDEN / family / kind


def config(family: str, kind: str) -> dict[str, Any]:
    """Its ``adapter_config.json``."""
    found: dict[str, Any] = json.loads((folder(family, kind) / "adapter_config.json").read_text())
    return found


def tensors(family: str, kind: str) -> dict[str, Tensor]:
    """Its tensors."""
    return dict(load_file(folder(family, kind) / "adapter.safetensors"))


@cache
def _answers(family: str) -> dict[str, Tensor]:
    return dict(load_file(GOLDEN / family / "answers.safetensors"))


def answer(family: str, kind: str) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    """(prompt, greedy continuation, the logits before each of its tokens [n, vocabulary])."""
    prompt, tokens, logits = (_answers(family)[f"{kind}.{part}"] for part in ("prompt", "tokens", "logits"))
    return tuple(prompt.tolist()), tuple(tokens.tolist()), logits


def is_gated(family: str, kind: str) -> bool:
    """Whether what it computes depends on which tokens run in one call."""
    said = config(family, kind)["config"]
    return any(member.get("use_gating", False) for member in said.get("configs", [said]))


def greedy(logits: Tensor) -> list[int]:
    """The first choices."""
    picked: list[int] = torch.argmax(logits, dim=-1).tolist()
    return picked
