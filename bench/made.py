"""What every method is made with for the benchmark: noise, peft, weft's own two files, and variants of an adapter."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from weft.adapters_store.files import CONFIG, WEIGHTS, weights_in
from weft.adapters_store.sites import CatalogueInfo, SiteInfo

SPREAD = 0.02
PREFIX = "base_model.model."
# peft's tensors that are drawn once for all adapters of a method; of some, each module has a copy
SHARED = frozenset(f"{method}_{part}" for method in ("vera", "pvera", "randlora") for part in "AB")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """A method as it is measured, and how to make an adapter of it on this backbone.

    name:       as ``weft methods`` calls it
    words:      size and places
    counts_as:  the method of ``weft methods`` that it is of, where its own name is none
    invokes:    tokens that a prompt must have for the adapter to act at all
    """

    name: str
    words: str
    write: Callable[["Ground", Path], None]
    counts_as: str = ""
    invokes: tuple[int, ...] = ()

    @property
    def method(self) -> str:
        """Which of ``weft methods`` it is."""
        return self.counts_as or self.name


@dataclass(frozen=True)
class Ground:
    """What adapters are made for: a fresh copy of the model, and its catalogue."""

    model: Callable[[], PreTrainedModel]
    info: CatalogueInfo

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """Seeded noise."""
        generator = torch.Generator().manual_seed(seed + sum(shape))
        return torch.randn(shape, generator=generator) * SPREAD

    @property
    def body(self) -> list[SiteInfo]:
        """All linears but the output head."""
        return [site for site in self.info.sites if site.kind != "lm_head"]

    def ending(self, *names: str) -> list[SiteInfo]:
        """The linears with these names."""
        return [site for site in self.body if site.path.endswith(names)]

    def divisor(self, most: int) -> int:
        """The largest divisor of ``most`` that every width of the linears is a multiple of."""
        return gcd(most, *(width for site in self.body for width in (site.in_features, site.out_features)))

    def within(self, layers: list[int]) -> "Ground":
        """The same backbone as a member of a union sees it that has only these layers."""
        kept = tuple(self.info.layers[number] for number in layers)
        starts = tuple(f"{layer.path}." for layer in kept)
        hidden = tuple(
            replace(place, layer=layers.index(place.layer)) for place in self.info.hidden if place.layer in layers
        )
        sites = tuple(site for site in self.info.sites if site.path.startswith(starts))
        return replace(self, info=replace(self.info, layers=kept, hidden=hidden, sites=sites))


Config = Callable[[Ground], PeftConfig]
Layers = Callable[[Ground], list[int]]
Member = Callable[[Ground], tuple[dict[str, object], Tensors]]
Said = Mapping[str, object] | Callable[[Ground], Mapping[str, object]]


def by_peft(name: str, words: str, config: Config, counts_as: str = "", invokes: tuple[int, ...] = ()) -> Made:
    """A method that peft makes."""

    def write(ground: Ground, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft comments on every model that it changes
            model = get_peft_model(ground.model(), config(ground))
            with torch.no_grad():
                for number, parameter in enumerate(model.parameters()):
                    if parameter.requires_grad:
                        noise = ground.draw(*parameter.shape, seed=number)
                        parameter.add_(noise.to(parameter.dtype))
            model.save_pretrained(str(folder))

    return Made(name, words, write, counts_as, invokes)


def written(name: str, words: str, settings: Said, tensors: Callable[[Ground], Tensors]) -> Made:
    """A method in a format of somebody else, whose two files are written by hand: tensors by their names there."""

    def write(ground: Ground, folder: Path) -> None:
        put(folder, said(settings, ground), tensors(ground))

    return Made(name, words, write)


def native(name: str, words: str, settings: Said, tensors: Callable[[Ground], Tensors]) -> Made:
    """A method in weft's own format."""

    def write(ground: Ground, folder: Path) -> None:
        found = {named(key, ground): tensor for key, tensor in tensors(ground).items()}
        put(folder, {"format_version": 1, **said(settings, ground)}, found)

    return Made(name, words, write)


def member(settings: Said, tensors: Callable[[Ground], Tensors], layers: Layers | None = None) -> Member:
    """One method of a union, in weft's own format or in peft's; in these layers only, where some are named."""

    def of(ground: Ground) -> tuple[dict[str, object], Tensors]:
        if layers is None:
            return said(settings, ground), tensors(ground)
        chosen = layers(ground)
        seen = ground.within(chosen)
        return {**said(settings, seen), "layers": chosen}, tensors(seen)

    return of


def union(name: str, words: str, *members: Member) -> Made:
    """A method that is several."""

    def write(ground: Ground, folder: Path) -> None:
        made = [of(ground) for of in members]
        config = {"peft_type": "X_UNION", "format_version": 1, "members": [config for config, _ in made]}
        tensors = {
            f"member.{number}.{named(key, ground)}": tensor
            for number, (_, own) in enumerate(made)
            for key, tensor in own.items()
        }
        put(folder, config, tensors)

    return Made(name, words, write)


def said(settings: Said, ground: Ground) -> dict[str, object]:
    """Settings that may depend on the backbone."""
    return dict(settings(ground) if callable(settings) else settings)


def named(key: str, ground: Ground) -> str:
    """A tensor's name in a file: one of a module has a prefix."""
    return f"{PREFIX}{key}" if key.partition(".")[0] in ground.info.modules else key


def put(folder: Path, config: Mapping[str, object], tensors: Tensors) -> None:
    """Both files of an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)


@dataclass(frozen=True)
class Variants:
    """Adapters of one shape: one that was made, and others whose floats are a little larger."""

    config: Mapping[str, object]
    tensors: Tensors

    @classmethod
    def of(cls, folder: Path) -> "Variants":
        """Read the one that was made."""
        return cls(json.loads((folder / CONFIG).read_text()), load_file(weights_in(folder)))

    def write(self, folder: Path, number: int) -> None:
        """Number 0 is the adapter itself. What all adapters of the method share stays as it is."""
        put(folder, self.config, {key: self._changed(key, tensor, number) for key, tensor in self.tensors.items()})

    def _changed(self, key: str, tensor: Tensor, number: int) -> Tensor:
        shared = key.startswith("base_model.") and key.rpartition(".")[2] in SHARED
        if not number or shared or not tensor.is_floating_point():
            return tensor
        return (tensor * (1 + number / 256)).to(tensor.dtype)
