"""PEFT ``PEANUT``: y += s·x Δᵀ with Δ = B h(W)ᵀ, where a small network h reads the rows of Wᵀ: a pair of rank r.

Tensors at ``base_model.model.<module>.``: ``peanut_A.weight`` [r, out], ``peanut_B.weight`` [out, r], and for each of
``depth`` layers ``peanut_encoders.<i>.weight`` and ``peanut_decoders.<i>.weight`` [r, r]. With f the function: h₀ =
f(Wᵀ Aᵀ), then through the encoders h ← f(h Eᵀ), then through the decoders h ← f(h Dᵀ) + what the encoder of the same
level was given.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "PEANUT"
SERVES = (
    Served("PEANuT", "2410.01870", "low_rank", "PEFT PEANUT", refuses="act_fn other than those listed in its refusal"),
)

A, B = "peanut_A.weight", "peanut_B.weight"
# by their names in transformers
ACTS = ("relu", "silu", "swish", "gelu", "tanh", "sigmoid")
DEPTH_MAX = 64


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights")
    rank, depth, scale = settings.integer("r"), settings.integer("depth", 0), settings.signed_number("scaling")
    if depth > DEPTH_MAX:
        raise expected("depth", f"at most {DEPTH_MAX}", depth)
    act = settings.choice("act_fn", ACTS, "relu")
    targets = read_targets(settings, catalogue, METHOD, "PEANuT")
    settings.finish(METHOD)
    inner = [f"peanut_{side}.{i}.weight" for side in ("encoders", "decoders") for i in range(depth)]
    found = read_tensors(header, catalogue, targets, [A, B, *inner])
    sites = {s.path: _operators(found.by_site[s.path], inner, s, rank, scale, act) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, inner: list[str], site: SiteInfo, rank: int, scale: float, act: str) -> SiteOperators:
    require_shape(tensors[A], (rank, site.out_features), f"r is {rank}, {sizes(site)}")
    require_shape(tensors[B], (site.out_features, rank), f"r is {rank}, {sizes(site)}")
    for role in inner:
        require_shape(tensors[role], (rank, rank), f"r is {rank}")

    def network(a: "Tensor", *rest: "Tensor") -> "Tensor":
        *layers, weight = rest
        function, half = _function(act), len(layers) // 2
        hidden, given = function(weight.T @ a.T), []
        for encoder in layers[:half]:
            given.append(hidden)
            hidden = function(hidden @ encoder.T)
        for decoder in layers[half:]:
            hidden = function(hidden @ decoder.T) + given.pop()
        return hidden.T

    sources = (tensors[A], *(tensors[role] for role in inner))
    rows = Computed(tensors[A].name, (rank, site.in_features), network, sources, (f"{site.path}.weight",))
    return SiteOperators((LowRank(rows, tensors[B], scale),), ("network of W as a",))


def _function(act: str) -> "Callable[[Tensor], Tensor]":
    import torch

    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    table = {"relu": torch.relu, "silu": silu, "swish": silu, "gelu": gelu, "tanh": torch.tanh}
    return table.get(act, torch.sigmoid)
