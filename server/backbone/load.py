"""Load a backbone from a local folder or a hub name: safetensors only, never code that comes with a model."""

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from weft.server.backbone.errors import BackboneDamaged, BackboneNotFound, BackboneTooLarge, UnsupportedBackbone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# what building a model from numbers that make no sense ends in
CONFIG_ERRORS = (RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError, StrictDataclassError)
NAMED_MAX = 4


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU where there is none."""
    found = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if found else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda, cuda:N or auto, got {name!r}")
    if kind == "cuda" and not found:
        raise ValueError(f"device: expected a CUDA device for {name!r}, got none on this machine")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda, cuda:N or auto, got {name!r}") from None
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if device.index is not None and device.index >= count:
        raise ValueError(f"device: expected {kind}:N with N below {count}, got {name!r}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it in hardware, else float32."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype: expected {', '.join(DTYPES)} or auto, got {name!r}")
    if name != "auto":
        return DTYPES[name]
    has_bfloat16 = _cuda_has_bfloat16(device) if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _cuda_has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the causal language model at ``name``, frozen, in ``dtype`` on ``device``.

    Raises BackboneNotFound, BackboneDamaged, BackboneTooLarge or UnsupportedBackbone with what to do about it.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        read: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            # judged below, by name
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except OSError as error:
        wanted = "a folder with config.json and *.safetensors, or a hub name"
        raise BackboneNotFound(f"no backbone at {name!r}: expected {wanted} ({_first_line(error)})") from error
    except SafetensorError as error:
        wanted = "whole *.safetensors, got one that is cut or damaged"
        raise BackboneDamaged(f"{name!r}: expected {wanted} ({_first_line(error)})") from error
    except ValueError as error:
        raise UnsupportedBackbone(
            f"{name!r} is not a causal language model of transformers: {_first_line(error)}"
        ) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise BackboneTooLarge(f"{name!r}: expected host memory to load it, got too little") from error
    except CONFIG_ERRORS as error:
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise BackboneDamaged(f"{name!r}: expected a config.json that its family can be built from ({said})") from error
    model, loaded = read
    _require_whole(name, loaded)
    return moved(model, device)


def _require_whole(name: str, loaded: dict[str, Any]) -> None:
    """Refuse what transformers would fill in with random numbers."""
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise BackboneDamaged(f"{name!r}: expected every parameter in *.safetensors, got none for {_some(missing)}")
    wrong = [f"{key} {list(got)} where its config wants {list(want)}" for key, got, want in loaded["mismatched_keys"]]
    if wrong:
        raise BackboneDamaged(f"{name!r}: expected the shapes of its config.json, got {_some(sorted(wrong))}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" * (len(names) > NAMED_MAX)
    return ", ".join(names[:NAMED_MAX]) + more


def moved(model: nn.Module, device: torch.device) -> PreTrainedModel:
    """The same model on another device; raises BackboneTooLarge where that has no room."""
    try:
        found = model.to(device)
    except torch.OutOfMemoryError as error:
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        wanted = f"room for {size} bytes of parameters on {device}"
        raise BackboneTooLarge(f"device: expected {wanted}, got too little: a smaller dtype needs less") from error
    assert isinstance(found, PreTrainedModel)
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]
