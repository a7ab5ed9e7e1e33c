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


@dataclass(frozen=True)
class CatalogueInfo:
    """Everything about a backbone's sites that can be said without its weights; crosses process boundaries.

    digest:     sha256 in hexadecimal over what the backbone is; an adapter may demand it (``base_fingerprint``)
    sites:      in index order; the sites of a group are neighbours
    groups:     sizes of the runs of sites that share an input, in order; they sum to len(sites)
    modules:    paths of all modules, so that an error can tell "no such module" from "not a linear"
    dtype:      serving dtype, e.g. ``bfloat16``
    """

    digest: str
    dtype: str
    sites: tuple[SiteInfo, ...]
    groups: tuple[int, ...]
    modules: frozenset[str]

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Site index by module path."""
        return {site.path: i for i, site in enumerate(self.sites)}


class SiteCatalogue(Protocol):
    """What folding asks of the backbone; implemented where the weights live."""

    @property
    def info(self) -> CatalogueInfo: ...

    def parameter(self, path: str) -> "torch.Tensor | None":
        """The frozen parameter at this full path (``model.embed_tokens.weight``), HF orientation, or None."""
        ...
