"""Load a backbone from a local folder or a hub name: safetensors only, never code that comes with a model."""

import logging
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from weft.server.backbone.errors import BackboneNotFound, UnsupportedBackbone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


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
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it in hardware, else float32."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype: expected {', '.join(DTYPES)} or auto, got {name!r}")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the causal language model at ``name``, frozen, in ``dtype`` on ``device``.

    Raises BackboneNotFound or UnsupportedBackbone with what to do about it.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        wanted = "a folder with config.json and *.safetensors, or a hub name"
        raise BackboneNotFound(f"no backbone at {name!r}: expected {wanted} ({_first_line(error)})") from error
    except ValueError as error:
        raise UnsupportedBackbone(
            f"{name!r} is not a causal language model of transformers: {_first_line(error)}"
        ) from error
    return moved(model, device)


def moved(model: nn.Module, device: torch.device) -> PreTrainedModel:
    """The same model on another device."""
    found = model.to(device)
    assert isinstance(found, PreTrainedModel)
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
