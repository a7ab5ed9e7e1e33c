"""PEFT ``ROAD``: pairs of outputs, bias included, are rotated and scaled; served as what that adds to the weight.

Tensors at ``base_model.model.<module>.``: ``road_theta`` and ``road_alpha`` [n · out/2], n = 1, 2 or 4 by ``variant``.
Output i of the first half of a group of ``group_size`` makes a pair with output i of the second half:

    y₁ ← c₁ y₁ − s₁ y₂,  y₂ ← c₂ y₂ + s₂ y₁      c = α cos θ, s = α sin θ

road_1 has one θ and α per pair, road_2 one per output, road_4 one per output for c and, behind those of the group,
another for s. A rotated weight has full rank: (R − I) W is a dense delta, (R − I) b a bias.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import Bias, Dense, Operator, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "ROAD"
SERVES = (Served("RoAd", "2409.00119", "dense, bias", "PEFT ROAD, road_1, road_2, road_4"),)

THETA, ALPHA = "road_theta", "road_alpha"
# numbers of each kind per pair of outputs
PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights")
    settings.choice("bias", ("none",), "none", "RoAd rotates the bias that it would replace")
    per_pair, group = PER_PAIR[settings.choice("variant", tuple(PER_PAIR), "road_1")], settings.integer("group_size", 2)
    if group % 2:
        raise expected("group_size", "an even number", group)
    targets = read_targets(settings, catalogue, METHOD, "RoAd", by_layer=False)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [THETA, ALPHA])
    sites = {site.path: _operators(found.by_site[site.path], site, per_pair, group) for site in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, per_pair: int, group: int) -> SiteOperators:
    tall = site.out_features
    if tall % group:
        raise expected("group_size", f"a divisor of the {tall} outputs of {site.path}", group)
    sources = tensors[THETA], tensors[ALPHA]
    for tensor in sources:
        require_shape(tensor, (per_pair * tall // 2,), f"{per_pair} numbers per pair of outputs, {sizes(site)}")

    def change(theta: "Tensor", alpha: "Tensor", rows: "Tensor") -> "Tensor":
        import torch

        cosines, sines = _columns(theta, alpha, group, per_pair)
        # [groups, 2, group_size / 2, in], or 1 in the place of in for a bias
        halves = rows.reshape(-1, 2, group // 2, rows[0].numel())
        first, second = halves.unbind(1)
        others = torch.stack((-second, first), dim=1)
        return ((cosines - 1) * halves + sines * others).reshape(rows.shape)

    name, path = tensors[THETA].name, site.path
    operators: list[Operator] = [Dense(Computed(name, (tall, site.in_features), change, sources, (f"{path}.weight",)))]
    if site.has_bias:
        operators.append(Bias(Computed(name, (tall,), change, sources, (f"{path}.bias",))))
    return SiteOperators(tuple(operators), ("R W - W",))


def _columns(theta: "Tensor", alpha: "Tensor", group: int, per_pair: int) -> "tuple[Tensor, Tensor]":
    """c and s of each output, both [groups, 2, group_size / 2, 1]."""
    if per_pair == PER_PAIR["road_4"]:
        theta, alpha = (t.reshape(-1, 2, 2, group // 2, 1) for t in (theta, alpha))
        return alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
    theta, alpha = (t.reshape(-1, per_pair, group // 2, 1).expand(-1, 2, -1, -1) for t in (theta, alpha))
    return alpha * theta.cos(), alpha * theta.sin()
