"""Requests that name two adapters of every kind that adds up, or of which one scales what the other did: logits.

The oracle is a plain model whose weights were changed by one member after the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from tests.support.backbones import build
from tests.support.families import CASES, CHANGE, TOLERANCE, Asked, Family, Members, prompts
from tests.support.methods.case import ALL, GEMMA, LLAMA, Oracle, WholePass
from tests.support.methods.native_files import linears, read
from tests.support.methods.native_hooks import change_sublayer, layer_paths
from tests.support.methods.native_places import bottleneck

# (family, its model, folder of the adapter, who says what that adapter computes alone, weight)
Change = Callable[[str, nn.Module, Path, Oracle, float], None]


def added(family: str, model: nn.Module, folder: Path, oracle: Oracle, weight: float) -> None:
    """Everything that the adapter changes in weights, times the member's."""
    assert isinstance(oracle, WholePass)
    own = oracle.model.merge_and_unload() if isinstance(oracle.model, PeftModel) else oracle.model
    frozen, mine = dict(build(family).named_parameters()), dict(model.named_parameters())
    for name, changed in own.named_parameters():
        if name not in mine:
            # a bias that only the adapter has
            model.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(weight * changed)
        else:
            mine[name].add_(weight * (changed - frozen.get(name, 0.0)))


def scaled(family: str, model: nn.Module, folder: Path, oracle: Oracle, weight: float) -> None:
    """IA3: rows of what is there by now, their biases too, or its columns."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for linear in linears(model):
        vector = tensors.get(f"base_model.model.{linear.path}.ia3_l")
        if vector is not None:
            linear.weight.mul_(vector)
            if linear.bias is not None and vector.shape[1] == 1:
                linear.bias.mul_(vector[:, 0])


def behind(family: str, model: nn.Module, folder: Path, oracle: Oracle, weight: float) -> None:
    """A bottleneck beside those that are there: its tap sees none of them."""
    config, tensors = read(folder)
    for layer in layer_paths(family, model):
        own = {role: tensors[n] for n in tensors if (role := n.removeprefix(f"{layer}.mlp.")) != n}
        change_sublayer(family, model, layer, "mlp", bottleneck({**config, "scale": weight * config["scale"]}, own))


@dataclass(frozen=True)
class Composition:
    """Two members: (case, twin, weight, what it changes)."""

    one: tuple[str, int, float, Change]
    two: tuple[str, int, float, Change]
    families: tuple[str, ...] = ALL


# on gpt2 some of peft's methods have the tied output embedding only, which peft cannot merge alone
APART = (LLAMA, GEMMA)

COMPOSED: Mapping[str, Composition] = {
    "kron": Composition(("krona", 0, 0.75, added), ("krona_terms", 0, -0.5, added)),
    "kron_of_two_formats": Composition(("lokr_full", 0, 0.5, added), ("krona_narrow", 0, 1.0, added), APART),
    "kron_and_low_rank": Composition(("krona", 1, 1.0, added), ("lora", 0, -0.5, added)),
    "sparse": Composition(("shira", 0, 0.75, added), ("shira", 1, -0.5, added), APART),
    "rows_and_columns": Composition(("rows", 0, 0.75, added), ("columns", 0, -0.5, added)),
    "dense": Composition(("loha", 0, 0.75, added), ("loha", 1, -0.5, added), APART),
    "bottleneck": Composition(("bottleneck_parallel", 0, 0.75, behind), ("bottleneck_parallel", 1, -0.5, behind)),
    "scaled_then_added": Composition(("ia3", 0, 1.0, scaled), ("lora", 0, 0.5, added)),
    "added_then_scaled": Composition(("lora", 0, 0.5, added), ("ia3", 0, 1.0, scaled)),
    "bank_and_scaled_input": Composition(("vera", 0, 1.0, added), ("ia3", 1, 1.0, scaled)),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made: dict[str, Family] = {}

    def family(name: str) -> Family:
        return made.setdefault(name, made.get(name) or Family(name, tmp_path_factory.mktemp(name)))

    return family


def members(family: Family, name: str) -> Members:
    composed = COMPOSED[name]
    return [(family.digest(case, twin), weight) for case, twin, weight, _ in (composed.one, composed.two)]


def oracle(family: Family, name: str) -> Oracle:
    model = build(family.name)
    for case, twin, weight, change in (COMPOSED[name].one, COMPOSED[name].two):
        folder = family.folder_of(case, twin)
        with torch.no_grad():
            change(family.name, model, folder, CASES[case].oracle(family.name, folder), weight)
    return WholePass(model)


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in ALL for name, of in COMPOSED.items() if family in of.families]
)
def test_two_compute_what_they_say_alone_and_beside_each_of_them(families, family, name):
    family = families(family)
    both = members(family, name)
    said = prompts(4, len(name))
    asked: Asked = {
        "base": (None, said[0]), "one": (both[0][0], said[1]), "both": (both, said[2]), "two": (both[1][0], said[3])
    }  # fmt: skip
    want = oracle(family, name)
    answer = family.run({"both": (both, said[2])})["both"]
    assert answer.distance(want) <= TOLERANCE
    mixed = family.run(asked)
    assert mixed["both"].distance(want) <= TOLERANCE
    assert mixed["base"].distance(family.base) <= TOLERANCE
    # the control: each member shows
    for case, twin, _, _ in (COMPOSED[name].one, COMPOSED[name].two):
        assert mixed["both"].distance(family.oracle(case, twin)) >= CHANGE


@pytest.mark.parametrize("family", ALL)
def test_the_order_of_a_batch_changes_no_answer(families, family):
    family = families(family)
    composed = [name for name, of in COMPOSED.items() if family.name in of.families]
    said = prompts(len(composed), 3)
    asked: Asked = {
        **{name: (members(family, name), prompt) for name, prompt in zip(composed, said, strict=True)},
        "base": (None, (5, 6, 7)),
        "lora": (family.digest("lora"), (8, 9, 10, 11)),
    }
    names = list(asked)
    first = family.run(asked)
    for order in (names[::-1], names[1::2] + names[::2]):
        again = family.run({name: asked[name] for name in order})
        for name in names:
            assert again[name].tokens == first[name].tokens
            off = (again[name].logits - first[name].logits).abs().max()
            assert off <= TOLERANCE / 10 * first[name].logits.abs().max()
