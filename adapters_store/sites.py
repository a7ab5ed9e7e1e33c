"""Where adapters attach: the modules of a backbone that operators can change, as seen from the adapters' side.

Imports no torch: the front process reads catalogues too. The backbone implements ``SiteCatalogue``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """One linear module. ``kind`` is ``linear``, ``conv1d`` (weight stored [in, out]) or ``lm_head``."""

    path: str
    in_features: int
    out_features: int
    has_bias: bool
    kind: str


@dataclass(frozen=True, slots=True)
class NormInfo:
    """One norm module with a weight [features], and a bias or none."""

    path: str
    features: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class HiddenInfo:
    """A place behind a sublayer of a decoder layer, before its output joins the residual stream.

    after:  ``attention`` or ``mlp``
    taps:   which of ``parts.TAPS`` there are here
    """

    layer: int
    after: str
    features: int
    taps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One decoder layer: its path, that of its attention, the shape of its keys and values, its input's width."""

    path: str
    attention: str
    kv_heads: int
    key_size: int
    value_size: int
    features: int


@dataclass(frozen=True, slots=True)
class EmbeddingInfo:
    """The input embedding; ``tied_head`` is the site that shares its weight, empty if none does.

    scale:  what the module multiplies its rows by, as a number of the serving dtype
    """

    path: str
    rows: int
    features: int
    tied_head: str = ""
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class SideInfo:
    """A network beside the backbone, of its own kind of layers but so many times narrower.

    features:  its width
    block:     name and shape of each parameter of a layer, as the backbone's modules name and store them
    norm:      those of the norm behind the last layer
    """

    reduction: int
    features: int
    block: tuple[tuple[str, tuple[int, ...]], ...]
    norm: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class ExpertsInfo:
    """A module that holds several experts' weights, each of its parameters those of all of them.

    parameters:  name of each and (out, in) of one expert's part, in the order in which the module declares them
    """

    path: str
    experts: int
    parameters: tuple[tuple[str, tuple[int, int]], ...]


@dataclass(frozen=True)
class CatalogueInfo:
    """Everything about a backbone's sites that can be said without its weights; crosses process boundaries.

    digest:     sha256 in hexadecimal over what the backbone is; an adapter may demand it (``base_fingerprint``)
    sites:      in index order; the sites of a group are neighbours
    groups:     sizes of the runs of sites that share an input, in order; they sum to len(sites)
    modules:    paths of all modules, so that an error can tell "no such module" from "not a linear"
    dtype:      serving dtype, e.g. ``bfloat16``
    family:     ``model_type`` of the backbone's config, e.g. ``llama``
    norms:      in the order in which they run
    hidden:     in order of layers; empty where the family's layers do not add up as x + attention, x + mlp
    layers:     decoder layers in order
    declared:   paths of the sites in the order in which the model's modules stand; empty if that is theirs here
    sides:      networks that can run beside the backbone, by ascending reduction
    experts:    modules of experts, in the order in which they run
    """

    digest: str
    dtype: str
    sites: tuple[SiteInfo, ...]
    groups: tuple[int, ...]
    modules: frozenset[str]
    family: str = ""
    norms: tuple[NormInfo, ...] = ()
    hidden: tuple[HiddenInfo, ...] = ()
    layers: tuple[LayerInfo, ...] = ()
    embedding: EmbeddingInfo | None = None
    declared: tuple[str, ...] = ()
    sides: tuple[SideInfo, ...] = ()
    experts: tuple[ExpertsInfo, ...] = ()

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Site index by module path."""
        return {site.path: i for i, site in enumerate(self.sites)}

    @cached_property
    def norm_index(self) -> Mapping[str, int]:
        """Norm index by module path."""
        return {norm.path: i for i, norm in enumerate(self.norms)}

    @cached_property
    def experts_index(self) -> Mapping[str, int]:
        """Index of a module of experts by its path."""
        return {experts.path: i for i, experts in enumerate(self.experts)}

    @cached_property
    def hidden_index(self) -> Mapping[tuple[int, str], int]:
        """Hidden place by (layer, after). In a geometry they follow the sites, each a group of its own."""
        return {(place.layer, place.after): i for i, place in enumerate(self.hidden)}


class SiteCatalogue(Protocol):
    """What folding asks of the backbone; implemented where the weights live."""

    @property
    def info(self) -> CatalogueInfo: ...

    def parameter(self, path: str) -> "torch.Tensor | None":
        """The frozen parameter at this full path (``model.embed_tokens.weight``), HF orientation, or None."""
        ...


def weight_of(catalogue: SiteCatalogue, path: str) -> "torch.Tensor":
    """A frozen parameter in fp32 on the host; a site's weight as [out, in] whatever the module stores."""
    parameter = catalogue.parameter(path)
    assert parameter is not None, f"the catalogue says that there is {path}"
    module, _, name = path.rpartition(".")
    info = catalogue.info
    value = parameter.detach().float().cpu()
    if name == "weight" and module in info.index and info.sites[info.index[module]].kind == "conv1d":
        return value.t()
    return value
