"""``weft convert pissa``: a LoRA that began as a part of the backbone's weights, as a plain LoRA of twice the rank.

PiSSA, OLoRA, CorDA and LoRA-GA take s B₀ A₀ out of the backbone before they train, and their files do not say what
that was. Where the adapter was also saved before training, W - s B₀ A₀ + s B A is W + s [B, -B₀] [A; A₀]: exact, up to
how PEFT rounded the backbone when it took its part out. LoftQ put quantised weights in the backbone's place, KaSA cut
its singular values off: neither is undone by this. Source: peft 0.21.2, ``LoraModel.subtract_mutated_init`` and
``PeftModel.save_pretrained(path_initial_model_for_weight_conversion=…)``; that refuses rsLoRA with patterns because it
scales ``alpha_pattern`` by 2 there and not by √2.
"""

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.adapters_store.errors import quoted, some
from weft.adapters_store.files import WEIGHTS
from weft.adapters_store.formats.settings import show
from weft.server.convert.folders import new_folder, read_config, read_safetensors, write_config
from weft.server.convert.pickled_folder import Converted, save_tensors, writable
from weft.server.convert.problems import expected

INIT = "init_lora_weights"
UNDONE = ("pissa", "olora", "corda", "lora_ga")
LOFTQ_WHY = "its backbone became quantised weights, which no LoRA turns back"
A, B = ".lora_A.weight", ".lora_B.weight"
# both folders say the same of these, or they are no two states of one adapter
SAME = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
FALSE: tuple[Any, ...] = (None, False, "", [], {})
REFUSED = ("use_dora", "lora_bias", "kasa_config", "use_qalora", "use_bdlora", "alora_invocation_tokens")


def convert_pissa(adapter: Path, initial: Path, out: Path) -> Converted:
    """Write ``out``. CannotConvert says what stands against it."""
    config, first = (_read(folder) for folder in (adapter, initial))
    for key in SAME:
        if config.get(key) != first.get(key):
            raise expected(
                f"{initial.name}: {key}", f"{show(config.get(key))}, as after training", show(first.get(key))
            )
    trained, began = (read_safetensors(folder / WEIGHTS) for folder in (adapter, initial))
    joined = _joined(trained, began, initial.name)
    tensors, notes = writable(joined, adapter.name)
    with new_folder(out) as folder:
        write_config(folder, _doubled(config))
        save_tensors(tensors, folder / WEIGHTS)
    notes.append("exact up to how the backbone was rounded when its part was taken out before training")
    return Converted(str(out), WEIGHTS, len(tensors), (out / WEIGHTS).stat().st_size, tuple(notes))


def _read(folder: Path) -> dict[str, Any]:
    _, config = read_config(folder)
    if config.get("peft_type") != "LORA":
        raise expected(f"{folder.name}: peft_type", "LORA", show(config.get("peft_type")))
    init = str(config.get(INIT, True)).lower()
    # the folder that PEFT's own conversion reads says true, whatever the beginning was
    if init != "true" and not init.startswith(UNDONE):
        why = LOFTQ_WHY if init == "loftq" else "such an adapter left the backbone as it is and needs no conversion"
        raise expected(f"{folder.name}: {INIT}", ", ".join(UNDONE), show(config.get(INIT)), why)
    for key in REFUSED:
        if config.get(key) not in FALSE:
            raise expected(
                f"{folder.name}: {key}", "null or false", show(config[key]), "PEFT's own conversion drops it"
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise expected(f"{folder.name}: {key}", "a number", show(config.get(key)))
    return config


def _joined(trained: Mapping[str, Tensor], began: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    strangers = [name for name in trained if not name.endswith((A, B))]
    if strangers:
        wanted = "lora_A and lora_B alone"
        raise expected(some(strangers), wanted, "other tensors", "PEFT's own conversion drops them")
    different = sorted(trained.keys() ^ began.keys())
    if different:
        raise expected(f"{label}: {quoted(different[0])}", "the tensors that the trained adapter has", "others")
    joined = {}
    for name, after in trained.items():
        before = began[name]
        if after.shape != before.shape:
            raise expected(f"{label}: {quoted(name)}", f"shape {list(after.shape)}", list(before.shape))
        of_a = name.endswith(A)
        joined[name] = torch.cat([after, before if of_a else -before], dim=0 if of_a else 1)
    return joined


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same scale at twice the rank: alpha / r, or with rsLoRA alpha / √r."""
    factor = sqrt(2) if config.get("use_rslora") else 2
    changed = dict(config)
    changed[INIT] = True
    changed["r"], changed["lora_alpha"] = config["r"] * 2, config["lora_alpha"] * factor
    changed["rank_pattern"] = {key: rank * 2 for key, rank in (config.get("rank_pattern") or {}).items()}
    changed["alpha_pattern"] = {key: alpha * factor for key, alpha in (config.get("alpha_pattern") or {}).items()}
    for key in ("corda_config", "lora_ga_config", "loftq_config"):
        changed.pop(key, None)
    return changed
