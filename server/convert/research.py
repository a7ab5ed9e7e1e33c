"""What converters of research checkpoints share: state dicts with masks or experts, and the files they become."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.adapters_store.errors import quoted
from weft.adapters_store.files import WEIGHTS
from weft.adapters_store.formats.tensors import PREFIX
from weft.server.convert.folders import new_folder, write_config
from weft.server.convert.pickled_folder import Converted, save_tensors, writable
from weft.server.convert.pickles import read_pickle, tensors_by_name
from weft.server.convert.problems import expected

# where training scripts put the state dict
WRAPPERS = ("model_state_dict", "state_dict", "model")
# how paths begin without the name of the base model, and that name
BASES = {"h.": "transformer.", "layers.": "model."}
_LAYER = re.compile(r"^(.*\.(?:h|layers|layer|blocks)\.\d+)\.(.+)$")


def read_research(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, also where they lie beside other things under the usual names."""
    found = read_pickle(path)
    if isinstance(found, dict):
        found = next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), found)
    return tensors_by_name(found, path.name)


def place_of(module: str) -> str:
    """The sublayer, as weft's own formats name it, that a module of this path is a part of.

    ``transformer.h.0.mlp`` is ``transformer.h.0.mlp``, ``….self_attn`` and ``….attention`` are ``….attention``.
    """
    found = _LAYER.match(module)
    if found is None:
        raise expected(quoted(module), "a module of a numbered layer", "another")
    layer, inside = found.groups()
    attends = any(word in inside.lower() for word in ("attn", "attention"))
    return f"{layer}.{'attention' if attends else 'mlp'}"


def with_base(path: str) -> str:
    """A path as the causal language model has it: training code often saves the base model without its name."""
    begins = next((base for start, base in BASES.items() if path.startswith(start)), "")
    return begins + path


def write_adapter(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], out: Path, source: Path, notes: Iterable[str]
) -> Converted:
    """Write the folder of an adapter whose tensors are named without PEFT's prefix."""
    return _write({PREFIX + name: tensor for name, tensor in tensors.items()}, config, out, source, notes)


def write_members(
    members: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]], out: Path, source: Path
) -> Converted:
    """The same for several adapters that act together, each with its config: as an X_UNION where there is not one."""
    if len(members) == 1:
        return write_adapter(*members[0], out, source, ())
    tensors = {
        f"member.{number}.{PREFIX}{name}": tensor
        for number, (own, _) in enumerate(members)
        for name, tensor in own.items()
    }
    config = {"peft_type": "X_UNION", "format_version": 1, "members": [dict(config) for _, config in members]}
    return _write(tensors, config, out, source, ())


def _write(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], out: Path, source: Path, notes: Iterable[str]
) -> Converted:
    made, more = writable(tensors, source.name)
    with new_folder(out) as folder:
        write_config(folder, config)
        save_tensors(made, folder / WEIGHTS)
    return Converted(str(out), source.name, len(made), (out / WEIGHTS).stat().st_size, (*notes, *more))


def bottleneck(act: str, scale: float, tap: str) -> dict[str, Any]:
    """The config of an X_BOTTLENECK."""
    return {"peft_type": "X_BOTTLENECK", "format_version": 1, "act": act, "scale": scale, "tap": tap}


def lora(tensors: Mapping[str, Tensor], alpha: float, fan_in_fan_out: bool = False) -> dict[str, Any]:
    """The config of a PEFT LORA for these tensors, the scale being alpha / r at each module."""
    ends = ".lora_A.weight"
    ranks = {name.removesuffix(ends): tensor.shape[0] for name, tensor in tensors.items() if name.endswith(ends)}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": usual,
        "lora_alpha": alpha,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != usual},
        "alpha_pattern": {},
        "target_modules": list(ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": fan_in_fan_out,
    }
