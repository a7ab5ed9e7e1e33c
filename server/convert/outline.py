"""What a backbone's parameters are called and what each of them is, found out from its config alone, without weights.

The names are those of the model class that the server loads. Checkpoints may leave out the name of the base model in
front (``h.0.…`` for ``transformer.h.0.…``); both are understood.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from weft.adapters_store.errors import quoted
from weft.server.convert.problems import CannotConvert, expected


class Kind(StrEnum):
    """What adapters can do about a parameter: ``other`` means nothing."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"
    VECTOR = "vector"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the backbone; ``shape`` as its module stores it, which for a Conv1D is [in, out]."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def module(self) -> str:
        """The path of its module."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Outline:
    """All parameters of a backbone by name, in the order of the model.

    embedding:  path of the input embedding
    head:       path of the output embedding, empty if there is none
    tied:       whether the config says that both share one weight; the head's name is listed all the same
    prefix:     what checkpoints may leave out in front of names
    buffers:    tensors that the model makes from its config; old checkpoints hold some of them
    """

    parameters: dict[str, Parameter]
    embedding: str
    head: str
    tied: bool
    prefix: str
    buffers: frozenset[str] = frozenset()

    def resolve(self, name: str) -> str | None:
        """The parameter that a checkpoint calls by this name, None if it is none of the backbone's."""
        return next((found for found in self._names_of(name) if found in self.parameters), None)

    def is_buffer(self, name: str) -> bool:
        """Whether a checkpoint calls a buffer by this name."""
        return any(found in self.buffers for found in self._names_of(name))

    def _names_of(self, name: str) -> tuple[str, ...]:
        return name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")

    @property
    def head_weight(self) -> str:
        """The name of the output embedding's weight."""
        return f"{self.head}.weight"

    @property
    def embedding_weight(self) -> str:
        """The name of the input embedding's weight."""
        return f"{self.embedding}.weight"


def outline_of(folder: Path) -> Outline:
    """The outline of the causal language model in a folder. CannotConvert if it holds none."""
    if not (folder / "config.json").is_file():
        raise expected(str(folder), "a transformers folder with config.json", "one without it")
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = quoted(str(error).strip().splitlines()[0])
        raise CannotConvert(f"{folder}: expected a causal language model of transformers ({first})") from None
    return outline(model)


def outline(model: PreTrainedModel) -> Outline:
    """The outline of a model, whose weights may be nowhere."""
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): name for name, module in modules.items()}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, role = name.rpartition(".")
        kind = _kind(modules[path], role, parameter, modules[path] is embedding)
        parameters[name] = Parameter(name, tuple(parameter.shape), kind)
    tied = head is not None and head.weight is embedding.weight
    buffers = frozenset(name for name, _ in model.named_buffers())
    return Outline(parameters, paths[id(embedding)], paths.get(id(head), ""), tied, model.base_model_prefix, buffers)


def _kind(module: nn.Module, role: str, parameter: Tensor, embeds: bool) -> Kind:
    if embeds and role == "weight":
        return Kind.EMBEDDING
    if isinstance(module, nn.Linear | Conv1D) and role in ("weight", "bias"):
        matrix = Kind.CONV1D if isinstance(module, Conv1D) else Kind.LINEAR
        return Kind.VECTOR if role == "bias" else matrix
    if "norm" in type(module).__name__.lower() and parameter.dim() == 1 and role in ("weight", "bias"):
        return Kind.VECTOR
    return Kind.OTHER
