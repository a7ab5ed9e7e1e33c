"""``weft convert sparse-adapter``: adapters with masks over their weights, the masks multiplied in once.

Bottlenecks ``<module>.ef_{attn,ffn}_adapter.{down_proj,up_proj}.{weight,bias}`` with ``down_mask`` and ``up_mask``
become an X_BOTTLENECK; LoRA's ``<linear>.ef_lora_{A,B}`` with ``A_mask`` and ``B_mask`` become a PEFT LORA. They stay
dense: masks of this size save no memory. Source: Shwai-He/SparseAdapter b190084, ``petl/petl_factory.py``.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from weft.server.convert.pickled_folder import Converted
from weft.server.convert.problems import expected
from weft.server.convert.research import bottleneck, lora, place_of, read_research, with_base, write_adapter

_BOTTLENECK = re.compile(r"(.+)\.ef_(attn|ffn)_adapter\.(.+)")
_LORA = re.compile(r"(.+)\.(ef_lora_A|ef_lora_B|A_mask|B_mask)")
MAPS = (("down_proj", "down_mask", "down"), ("up_proj", "up_mask", "up"))
NORM = "adapter_layer_norm_before"
NORM_PLACES = ("none", "in")


def convert_sparse_adapter(
    file: Path,
    out: Path,
    scale: float = 1.0,
    tap: str = "h",
    act: str = "relu",
    norm: str = "none",
    alpha: float | None = None,
) -> Converted:
    """Write ``out``. CannotConvert says what stands against it. What the options say is not in the file.

    scale:  of bottlenecks, where it is no parameter
    norm:   ``in`` where the layer norm of each adapter stands before its first map
    alpha:  of LoRA, whose scale is alpha / r
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_research(file).items()}
    adapters: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    linears: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if found := _BOTTLENECK.fullmatch(name):
            adapters[found[1], found[2]][found[3]] = tensor
        elif found := _LORA.fullmatch(name):
            linears[found[1]][found[2]] = tensor
    if bool(adapters) == bool(linears):
        raise expected(file.name, "masked bottlenecks, or masked LoRA", "both" if adapters else "neither")
    rest = len(tensors) - sum(map(len, adapters.values())) - sum(map(len, linears.values()))
    notes = [f"{rest} tensors of the backbone are left out"] if rest else []
    if adapters:
        made: dict[str, Tensor] = {}
        for (module, sublayer), own in adapters.items():
            made |= _bottleneck(module, sublayer, own, scale, norm)
        return write_adapter(made, bottleneck(act, 1.0, tap), out, file, notes)
    if alpha is None:
        raise expected("alpha", "the number that LoRA was trained with (--alpha)", "none", "the file does not say it")
    made = _low_ranks(linears)
    return write_adapter(made, lora(made, alpha), out, file, notes)


def _bottleneck(module: str, sublayer: str, own: Mapping[str, Tensor], scale: float, norm: str) -> dict[str, Tensor]:
    name = f"{module}.ef_{sublayer}_adapter"
    place = place_of(f"{with_base(module)}.{'attention' if sublayer == 'attn' else 'mlp'}")
    factor = own["scale"].double() if "scale" in own else scale
    left = dict(own)
    left.pop("scale", None)
    made = {}
    for linear, mask, role in MAPS:
        weight = _masked(name, left, f"{linear}.weight", mask)
        # the scale is the output's
        times = factor if role == "up" else 1.0
        made[f"{place}.{role}.weight"] = (weight * times).float()
        bias = left.pop(f"{linear}.bias", None)
        if bias is not None:
            made[f"{place}.{role}.bias"] = (bias.double() * times).float()
    for end in ("weight", "bias"):
        tensor = left.pop(f"{NORM}.{end}", None)
        if tensor is None:
            continue
        if norm != "in":
            wanted = "no layer norm, or --norm in where it stands before the first map"
            raise expected(f"{name}.{NORM}", wanted, "one", "behind the last map it is not served")
        made[f"{place}.norm_before.{end}"] = tensor
    if left:
        raise expected(f"{name}.{next(iter(left))}", "tensors of a masked bottleneck", "another")
    return made


def _low_ranks(linears: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    made = {}
    for module, own in linears.items():
        left = dict(own)
        path = with_base(module)
        for side in "AB":
            made[f"{path}.lora_{side}.weight"] = _masked(module, left, f"ef_lora_{side}", f"{side}_mask").float()
    return made


def _masked(name: str, own: dict[str, Tensor], weight: str, mask: str) -> Tensor:
    """A weight times its mask, in fp64; both are taken out of ``own``."""
    for role in (weight, mask):
        if role not in own:
            raise expected(f"{name}.{role}", "this tensor", "none", "masks and weights come in pairs")
    values, chosen = own.pop(weight), own.pop(mask)
    if values.shape != chosen.shape:
        raise expected(f"{name}.{mask}", f"shape {list(values.shape)}", list(chosen.shape))
    return values.double() * chosen.double()
