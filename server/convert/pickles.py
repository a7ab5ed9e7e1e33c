"""Reads what ``torch.save`` wrote without running any of it: torch's own unpickler of weights, and nothing else.

A pickle is a program. ``weights_only=True`` interprets the few instructions that build tensors and refuses the first
other one before it does anything; there is no option to trust a file.
"""

import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.adapters_store.errors import quoted
from weft.server.convert.problems import CannotConvert, expected

# a class or function by itself, or with the name under which pickles know it
Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]

_GLOBAL = re.compile(r"(?:GLOBAL |global )'?([A-Za-z_][\w.]*)")
_MAGIC = (
    (b"version https://git-lfs", "a git-lfs pointer: fetch the file that it points to"),
    (b"<", "a web page"),
    (b"GGUF", "a GGUF file"),
)
_SAFETENSORS_START = 8
# all that torch raises on bytes that are no checkpoint
_BROKEN = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, MemoryError,
)  # fmt: skip


def read_pickle(path: Path, allowed: Sequence[Allowed] = ()) -> Any:
    """What a file holds, on the host. CannotConvert if it is missing, broken, or wants anything run.

    allowed:  functions beyond torch's own that a format needs to build its numbers
    """
    if not path.is_file():
        raise expected(path.name, "a file", "nothing there" if not path.exists() else "something else", str(path))
    _refuse_foreign(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allowed)):
            # torch wonders aloud about dialects of pickle; whatever it does not know it refuses
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except _BROKEN as error:
        raise expected(path.name, "a file that torch.save wrote whole", f"a damaged one: {_first(error)}") from None


def read_state_dict(path: Path, allowed: Sequence[Allowed] = ()) -> dict[str, Tensor]:
    """A file that holds tensors by name, as ``state_dict()`` gives them. CannotConvert if it holds anything else."""
    return tensors_by_name(read_pickle(path, allowed), path.name)


def tensors_by_name(found: Any, subject: str) -> dict[str, Tensor]:
    """The same value, known to be plain tensors by name."""
    if not isinstance(found, dict) or not found:
        raise expected(subject, "tensors by name", f"an empty {_kind(found)}" if found == {} else f"a {_kind(found)}")
    for name, tensor in found.items():
        if not isinstance(name, str):
            raise expected(subject, "tensors by name", f"a {_kind(name)} as a name")
        if not isinstance(tensor, Tensor):
            raise expected(subject, f"a tensor at {quoted(name)}", f"a {_kind(tensor)}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise expected(subject, f"a plain tensor at {quoted(name)}", "a sparse, quantised or empty one")
    return {name: tensor.detach() for name, tensor in found.items()}


def _refuse_foreign(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise expected(path.name, "a file that torch.save wrote", "an empty file")
    what = next((what for magic, what in _MAGIC if start.startswith(magic)), None)
    if start[_SAFETENSORS_START:].startswith(b"{"):
        what = "a safetensors file: rename it, it needs no conversion"
    if what is not None:
        raise expected(path.name, "a file that torch.save wrote", what)


def _refusal(path: Path, message: str) -> CannotConvert:
    wanted = _GLOBAL.search(message)
    if wanted is None and "invalid load key" in message:
        return expected(path.name, "a file that torch.save wrote", "other bytes")
    got = f"a pickle that wants to run {quoted(wanted[1])}" if wanted else "a pickle of something else"
    return expected(path.name, "a pickle of tensors only", got, "nothing of it was run; weft runs no code of a file")


def _kind(value: object) -> str:
    return quoted(type(value).__name__)


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return quoted(lines[0]) if lines else type(error).__name__
