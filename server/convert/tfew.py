"""``weft convert t-few``: ``finish.pt`` of t-few, the trained parameters of a model by their names.

    <linear>.multi_lora_b [out, 1], multi_lora_a [1, in]    (IA)³: y = b ⊙ (W (a ⊙ x) + bias); PEFT IA3
    <linear>.lora_a [r, in], lora_b [out, r]                LoRA of scale 1/r; PEFT LORA
    <linear>.bias                                           BitFit: a bias from 0 in the place of the linear's; X_BITFIT
    <norm>.weight, <norm>.bias                              X_NORM

A file of biases and norms, which t-few trains together, becomes an X_UNION. Source: r-three/t-few 114deced,
``src/models/lora.py``, ``src/models/bitfit.py``, ``src/models/EncoderDecoder.py``.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.server.convert.checkpoints import Checkpoint
from weft.server.convert.pickled_folder import Converted
from weft.server.convert.problems import expected
from weft.server.convert.research import lora, read_research, with_base, write_members

Tensors = dict[str, Tensor]
IA3_IN, IA3_OUT = "multi_lora_a", "multi_lora_b"
LORA_A, LORA_B = "lora_a", "lora_b"
SCALES, PAIRS, VECTORS = {IA3_IN, IA3_OUT}, {LORA_A, LORA_B}, {"weight", "bias"}
NATIVE = {"format_version": 1}


def convert_tfew(file: Path, out: Path, base: Path | None = None) -> Converted:
    """Write ``out``. CannotConvert says what stands against it.

    base:  the backbone, of which names and shapes are read; needed for biases, which replace the linear's if it has one
    """
    modules: dict[str, Tensors] = defaultdict(dict)
    for name, tensor in read_research(file).items():
        module, _, role = name.removeprefix("module.").rpartition(".")
        if not module or role not in SCALES | PAIRS | VECTORS:
            raise expected(name, f"a name that ends in {', '.join(sorted(SCALES | PAIRS | VECTORS))}", "another")
        modules[with_base(module)][role] = tensor
    kinds = {tuple(sorted(own.keys() & SCALES)) for own in modules.values()}
    if any(own.keys() & SCALES and own.keys() & PAIRS for own in modules.values()):
        raise expected(
            file.name, "(IA)³ or LoRA at a linear", "both", "t-few multiplies the weight by the vectors then"
        )
    if (IA3_IN, IA3_OUT) in kinds:
        raise expected(file.name, f"{IA3_IN} or {IA3_OUT} at a linear", "both", "PEFT's IA3 has one vector per linear")
    found = [_scales(modules), _pairs(modules), _biases(modules, base), _norms(modules)]
    return write_members([each for each in found if each is not None], out, file)


def _scales(modules: Mapping[str, Tensors]) -> tuple[Tensors, dict[str, Any]] | None:
    made: Tensors = {}
    into: list[str] = []
    for module, own in modules.items():
        for role in own.keys() & SCALES:
            made[f"{module}.ia3_l"] = _vector(own[role], module, role)
            into += [module] if role == IA3_IN else []
    config = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "inference_mode": True}
    targets = [name.removesuffix(".ia3_l") for name in made]
    return (made, config | {"target_modules": targets, "feedforward_modules": into}) if made else None


def _vector(tensor: Tensor, module: str, role: str) -> Tensor:
    """One vector; of several t-few makes a product of matrices, which multiplies the weight."""
    axis = 1 if role == IA3_OUT else 0
    if tensor.dim() != 2 or tensor.shape[axis] != 1:
        raise expected(f"{module}.{role}", "a vector: lora_scaling_rank 1", f"shape {list(tensor.shape)}")
    return tensor


def _pairs(modules: Mapping[str, Tensors]) -> tuple[Tensors, dict[str, Any]] | None:
    made: Tensors = {}
    for module, own in modules.items():
        there = own.keys() & PAIRS
        if len(there) == 1:
            raise expected(f"{module}.{(PAIRS - there).pop()}", "this tensor", "none", f"{there.pop()} is there")
        for role, name in ((LORA_A, "lora_A"), (LORA_B, "lora_B")):
            if there:
                made[f"{module}.{name}.weight"] = own[role]
    # the scale alpha / r is 1 / r
    return (made, lora(made, 1.0)) if made else None


def _biases(modules: Mapping[str, Tensors], base: Path | None) -> tuple[Tensors, dict[str, Any]] | None:
    """Those of linears: modules without a trained weight, which norms have."""
    found = {module: own["bias"] for module, own in modules.items() if "bias" in own and "weight" not in own}
    if not found:
        return None
    if base is None:
        why = "a bias replaces that of the linear, if it has one"
        raise expected("base", "the folder of the backbone (--base)", "none", why)
    with Checkpoint(base) as checkpoint:
        made = {f"{m}.bias_{'value' if f'{m}.bias' in checkpoint else 'delta'}": tensor for m, tensor in found.items()}
    return made, {"peft_type": "X_BITFIT", **NATIVE}


def _norms(modules: Mapping[str, Tensors]) -> tuple[Tensors, dict[str, Any]] | None:
    made: Tensors = {}
    for module, own in modules.items():
        if "weight" not in own:
            continue
        if own["weight"].dim() != 1:
            why = "`weft convert diff` makes an adapter of a model that was trained whole"
            raise expected(f"{module}.weight", "a norm's weight", f"shape {list(own['weight'].shape)}", why)
        made |= {f"{module}.norm_{role}": own[role] for role in sorted(own.keys() & VECTORS)}
    return (made, {"peft_type": "X_NORM", **NATIVE}) if made else None
