"""The two factors of a LoRA, in whatever form a variant of PEFT's stores them, as one plain pair A [r, in], B [out, r].

    QA-LoRA   A [r, in/g] acts on the means of g inputs, times in/g:     A'[:, j] = A[:, j // g] · (in/g) / g
    BD-LoRA   the blocks of a block-diagonal A [r, in/n] or B [out, r/n], one below the other
    KaSA      ``lora_diag`` d between the factors, and W without its r smallest singular components beneath them
    PiSSA     beneath them W without its r largest singular components, which is where A and B began
    OLoRA     likewise, W = QR without s·Q[:, :r] R[:r]

What was taken out of W is computed from the served W again, in fp64, and taken from s·B A before anything is rounded:
the two are alike, so that they must not be rounded one by one. The difference is one pair of rank 2r.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.peft_lora_settings import BDLORA, KASA, OLORA, PISSA, QALORA, Config
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.sites import SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Formula = Callable[..., Tensor]

A, B, DIAGONAL = "lora_A.weight", "lora_B.weight", "lora_diag"


@dataclass(frozen=True, slots=True)
class Pair:
    """y += scale · (x aᵀ) bᵀ, and what was done to get there."""

    a: Value
    b: Value
    scale: float
    folds: tuple[str, ...]


def pair(tensors: Roles, site: SiteInfo, config: Config) -> Pair:
    """The pair of a site. AdapterInvalid if a shape is wrong."""
    a, b = tensors[A], tensors[B]
    rank, scale = config.ranks[site.path], config.scales[site.path]
    wide, tall = site.in_features, site.out_features
    if config.variant == QALORA and a.shape != (rank, wide):
        return _pooled(a, b, site, config)
    if config.variant == BDLORA:
        return _blocks(a, b, site, config)
    why = f"r is {rank} here, {site.path} is {wide} -> {tall}"
    require_shape(a, (rank, wide), why)
    require_shape(b, (tall, rank), why)
    start = KASA if config.variant == KASA else config.start
    if start:
        return _without_start(tensors, site, config, start)
    return Pair(a, b, scale, (config.fold,))


def _pooled(a: TensorRef, b: TensorRef, site: SiteInfo, config: Config) -> Pair:
    rank, group = config.ranks[site.path], config.group
    if site.in_features % group:
        why = f"{site.path} has {site.in_features} inputs"
        raise expected("qalora_group_size", "a divisor of the number of inputs", group, why)
    groups = site.in_features // group
    require_shape(a, (rank, groups), f"r is {rank} and qalora_group_size {group}, {site.path} has {groups} groups")
    require_shape(b, (site.out_features, rank), f"r is {rank} here")

    def spread(a: "Tensor") -> "Tensor":
        return a.repeat_interleave(group, dim=1) * (groups / group)

    whole = Computed(a.name, (rank, site.in_features), spread, (a,))
    return Pair(whole, b, config.scales[site.path], (config.fold, "A spread over groups"))


def _blocks(a: TensorRef, b: TensorRef, site: SiteInfo, config: Config) -> Pair:
    assert config.blocks is not None
    rank, count, path = config.ranks[site.path], config.blocks.count, site.path
    in_a, in_b = path in config.blocks.of_a, path in config.blocks.of_b
    rows, columns = (rank, site.in_features) if in_a else (site.out_features, rank)
    if (in_a or in_b) and (rows % count or columns % count):
        raise expected("nblocks", "a divisor of r and of the features beside it", count, f"{rows} and {columns} here")
    why = f"r is {rank} here, in {count} blocks where use_bdlora says so"
    require_shape(a, (rank, site.in_features // (count if in_a else 1)), why)
    require_shape(b, (site.out_features, rank // (count if in_b else 1)), why)

    def diagonal(stacked: "Tensor") -> "Tensor":
        import torch

        spread: Tensor = torch.block_diag(*stacked.chunk(count))  # type: ignore[no-untyped-call]
        return spread

    left: Value = Computed(a.name, (rank, site.in_features), diagonal, (a,)) if in_a else a
    right: Value = Computed(b.name, (site.out_features, rank), diagonal, (b,)) if in_b else b
    folds = (config.fold, "blocks spread out") if in_a or in_b else (config.fold,)
    return Pair(left, right, config.scales[path], folds)


def _without_start(tensors: Roles, site: SiteInfo, config: Config, start: str) -> Pair:
    """s·B A less what was taken out of the backbone's weight, as one pair."""
    a, b, path = tensors[A], tensors[B], site.path
    rank, scale, least = config.ranks[path], config.scales[path], min(site.in_features, site.out_features)
    if rank > least or (rank == least and start == KASA):
        wanted = f"at most {least - (start == KASA)}"
        raise expected("r", wanted, rank, f"{start} takes that many components out of {path}")
    sources: tuple[TensorRef, ...] = (a, b)
    if start == KASA:
        require_shape(tensors[DIAGONAL], (rank,), f"r is {rank} here")
        sources = (a, b, tensors[DIAGONAL])
    left, right = min(2 * rank, site.out_features), min(2 * rank, site.in_features)

    def both(a: "Tensor", b: "Tensor", *rest: "Tensor") -> "Tensor":
        import torch

        weight = rest[-1].double()
        weighted = b.double() * scale if len(rest) == 1 else b.double() * (rest[0].double() * scale)
        old_b, old_a = _taken(weight, rank, start, scale)
        q_left, r_left = torch.linalg.qr(torch.cat([weighted, -old_b], dim=1))
        q_right, r_right = torch.linalg.qr(torch.cat([a.double(), old_a]).T)
        assert (q_left.shape[1], q_right.shape[1]) == (left, right)
        return torch.cat([q_right, q_left @ (r_left @ r_right.T)])

    stacked = Computed(b.name, (site.in_features + site.out_features, right), both, sources, (f"{path}.weight",))
    new_a = Computed(a.name, (right, site.in_features), lambda t: t[: site.in_features].T, (stacked,))
    new_b = Computed(b.name, (site.out_features, right), lambda t: t[site.in_features :], (stacked,))
    return Pair(new_a, new_b, 1.0, (config.fold, f"{start.removesuffix('_config')} out of the base"))


def _taken(weight: "Tensor", rank: int, start: str, scale: float) -> "tuple[Tensor, Tensor]":
    """What was taken out of a weight [out, in], as the product of [out, rank] and [rank, in]; all in fp64."""
    import torch

    if start == OLORA:
        # the first columns of Q span those of W, and nothing else of QR is needed
        q, _ = torch.linalg.qr(weight[:, :rank])
        return q, scale * (q.T @ weight)
    # singular vectors of the shorter side, in ascending order of singular values
    tall = weight.shape[0] > weight.shape[1]
    _, vectors = torch.linalg.eigh(weight.T @ weight if tall else weight @ weight.T)
    chosen = vectors[:, -rank:] if start == PISSA else vectors[:, :rank]
    return (weight @ chosen, chosen.T) if tall else (chosen, chosen.T @ weight)
