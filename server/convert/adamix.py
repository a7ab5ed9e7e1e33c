"""``weft convert adamix``: a mixture of adapters, averaged to the one that it is at inference.

Down and up are averaged apart from each other, with softmax(expert_score_weight); a sum of products this is not.
Bottlenecks, ``<mlp>.ExpertSoup.MoA_{A,B}.deepspeed_experts.<i>.{weight,bias}``, become an X_BOTTLENECK; LoRA's,
``<c_attn>.experts_lora_{A,B}.<i>`` with A [2r, in] and B [2·out/3, r] for q and v of a fused q, k, v, become a PEFT
LORA of rank 2r, whose B is zero outside of the two blocks. Source: microsoft/AdaMix d361e9d6, in ``NLG``:
``src/expert_soup.py``, ``loralib/layers.py``.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.server.convert.pickled_folder import Converted
from weft.server.convert.problems import expected
from weft.server.convert.research import bottleneck, lora, place_of, read_research, with_base, write_adapter

_SOUP = re.compile(r"(.+)\.ExpertSoup\.MoA_([AB])\.(?:deepspeed_experts\.(\d+)\.(weight|bias)|(expert_score_weight))")
_LORA = re.compile(r"(.+)\.(?:experts_lora_([AB])\.(\d+)|(lora_expert_score_weight))")
# of q, k, v
FUSED, ADAPTED = 3, (0, 2)


def convert_adamix(
    file: Path, out: Path, act: str = "gelu_new", tap: str = "h", alpha: float | None = None
) -> Converted:
    """Write ``out``. CannotConvert says what stands against it.

    act, tap:  of the bottlenecks, which the file does not say; the defaults are those of the GPT-2 that AdaMix trained
    alpha:     of LoRA, likewise; the scale is alpha / r
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_research(file).items()}
    soups = {name: found for name in tensors if (found := _SOUP.fullmatch(name))}
    loras = {name: found for name in tensors if (found := _LORA.fullmatch(name))}
    if bool(soups) == bool(loras):
        got = "both" if soups else "neither"
        raise expected(file.name, "experts of bottlenecks, or experts of LoRA", got)
    rest = len(tensors) - len(soups) - len(loras)
    notes = [f"{rest} tensors of the backbone are left out"] if rest else []
    if soups:
        made = _bottlenecks({found: tensors[name] for name, found in soups.items()})
        return write_adapter(made, bottleneck(act, 1.0, tap), out, file, notes)
    if alpha is None:
        raise expected("alpha", "the number that LoRA was trained with (--alpha)", "none", "the file does not say it")
    made = _low_ranks({found: tensors[name] for name, found in loras.items()})
    return write_adapter(made, lora(made, alpha * len(ADAPTED), fan_in_fan_out=True), out, file, notes)


def averaged(experts: Mapping[int, Tensor], score: Tensor | None, name: str) -> Tensor:
    """The experts' mean with the weights softmax(score); a score of zeros, or none, weighs all alike."""
    if sorted(experts) != list(range(len(experts))):
        raise expected(name, f"experts 0 to {len(experts) - 1}", f"{sorted(experts)}")
    if len({tuple(tensor.shape) for tensor in experts.values()}) != 1:
        raise expected(name, "experts of one shape", "several")
    score = torch.zeros(len(experts)) if score is None else score
    # a part that all experts share is there once, beside a score for each of them
    if len(experts) > 1 and tuple(score.shape) != (len(experts),):
        raise expected(name, f"a score for each of {len(experts)} experts", list(score.shape))
    weights = torch.softmax(score.double(), dim=-1) if len(experts) > 1 else torch.ones(1, dtype=torch.float64)
    mean = sum((weights[i] * tensor.double() for i, tensor in experts.items()), torch.zeros((), dtype=torch.float64))
    return mean.float()


def _bottlenecks(found: Mapping["re.Match[str]", Tensor]) -> dict[str, Tensor]:
    experts: dict[tuple[str, str, str], dict[int, Tensor]] = defaultdict(dict)
    scores: dict[tuple[str, str], Tensor] = {}
    for match, tensor in found.items():
        module, side, number, role, score = match.groups()
        if score:
            scores[module, side] = tensor
        else:
            experts[module, side, role][int(number)] = tensor
    made = {}
    for (module, side, role), each in experts.items():
        name = f"{place_of(with_base(module))}.{'down' if side == 'A' else 'up'}.{role}"
        made[name] = averaged(each, scores.get((module, side)), name)
    for module in {module for module, _, _ in experts}:
        for side in "AB":
            if (module, side, "weight") not in experts:
                raise expected(f"{module}.ExpertSoup.MoA_{side}", "the weights of its experts", "none")
    return made


def _low_ranks(found: Mapping["re.Match[str]", Tensor]) -> dict[str, Tensor]:
    experts: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    scores: dict[str, Tensor] = {}
    for match, tensor in found.items():
        module, side, number, score = match.groups()
        if score:
            scores[module] = tensor
        else:
            experts[module, side][int(number)] = tensor
    made = {}
    for module in sorted({module for module, _ in experts}):
        missing = next((side for side in "AB" if (module, side) not in experts), None)
        if missing:
            raise expected(f"{module}.experts_lora_{missing}", "the matrices of its experts", "none")
        a, b = (averaged(experts[module, side], scores.get(module), f"{module}.lora_{side}") for side in "AB")
        path = with_base(module)
        made[f"{path}.lora_A.weight"], made[f"{path}.lora_B.weight"] = a, _spread(a, b, module)
    return made


def _spread(a: Tensor, b: Tensor, module: str) -> Tensor:
    """B [2·out/3, r] of two groups as [out, 2r]: each group's rows in its place, for its own ranks alone."""
    groups = len(ADAPTED)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != groups * b.shape[1] or b.shape[0] % groups:
        raise expected(module, "A [2r, in] and B [2·out/3, r]", f"{list(a.shape)} and {list(b.shape)}")
    rank, tall = b.shape[1], b.shape[0] // groups
    whole: Any = b.new_zeros(FUSED * tall, groups * rank)
    for group, place in enumerate(ADAPTED):
        rows = b[group * tall : (group + 1) * tall]
        whole[place * tall : (place + 1) * tall, group * rank : (group + 1) * rank] = rows
    result: Tensor = whole
    return result
