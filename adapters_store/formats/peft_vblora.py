"""PEFT ``VBLORA``: low-rank pairs whose rows are cut into pieces, each a mixture of the k best vectors of one bank.

Tensors: ``base_model.vblora_vector_bank`` [vectors, length], and at ``base_model.model.<module>.`` the logits
``vblora_logits_A`` [r, in/length, vectors] and ``vblora_logits_B`` [out/length, r, vectors]: a piece is the sum of the
topk vectors with the largest logits, weighted by their softmax. With ``save_only_topk_weights`` there are, in the
place of each, ``…_topk_indices`` [.., topk] and ``…_topk_weights`` [.., topk - 1], the last weight being the rest to
1.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, require_shape
from weft.adapters_store.operators import LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "VBLORA"
SERVES = (Served("VB-LoRA", "2405.15179", "low_rank (expanded)", "PEFT VBLORA, save_only_topk_weights"),)

BANK = "vblora_vector_bank"
A, B = "vblora_logits_A", "vblora_logits_B"
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"

TRAINING_ONLY = ("vblora_dropout", "init_vector_bank_bound", "init_logits_std")


@dataclass(frozen=True, slots=True)
class _Bank:
    """The bank and how a piece is made of it."""

    vectors: TensorRef
    count: int
    length: int
    best: int
    rank: int


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore(*TRAINING_ONLY)
    rank, best = settings.integer("r"), settings.integer("topk")
    count, length = settings.integer("num_vectors"), settings.integer("vector_length")
    chosen = settings.flag("save_only_topk_weights")
    if best > count:
        raise expected("topk", f"at most the {count} vectors of the bank", best)
    targets = read_targets(settings, catalogue, METHOD, "VB-LoRA", conv1d=True)
    settings.finish(METHOD)
    roles = [A, B]
    if chosen:
        roles = [role + end for role in (A, B) for end in (INDICES, WEIGHTS)]
    integers = [role for role in roles if role.endswith(INDICES)]
    found = read_tensors(header, catalogue, targets, roles, integers=integers, shared=[BANK])
    bank = _Bank(found.shared[BANK], count, length, best, rank)
    require_shape(bank.vectors, (count, length), f"num_vectors is {count}, vector_length {length}")
    sites = {site.path: _operators(found.by_site[site.path], site, bank, chosen) for site in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _operators(tensors: Roles, site: SiteInfo, bank: _Bank, chosen: bool) -> SiteOperators:
    wide, tall, length, rank = site.in_features, site.out_features, bank.length, bank.rank
    if wide % length or tall % length:
        raise expected("vector_length", f"a divisor of both sizes ({sizes(site)})", length)
    pieces_a = _pieces(tensors, A, (rank, wide // length), bank, chosen, site)
    pieces_b = _pieces(tensors, B, (tall // length, rank), bank, chosen, site)
    pair = LowRank(
        Computed(pieces_a.name, (rank, wide), _in_rows, (pieces_a,)),
        Computed(pieces_b.name, (tall, rank), _in_columns, (pieces_b,)),
    )
    return SiteOperators((pair,), ("vectors of the bank into a and b",))


def _pieces(tensors: Roles, role: str, shape: tuple[int, int], bank: _Bank, chosen: bool, site: SiteInfo) -> Computed:
    """[*shape, length]."""
    why = f"r is {bank.rank}, topk {bank.best}, vector_length {bank.length}, {sizes(site)}"
    result = (*shape, bank.length)
    if not chosen:
        require_shape(tensors[role], (*shape, bank.count), why)

        def of_logits(vectors: "Tensor", logits: "Tensor") -> "Tensor":
            values, indices = logits.topk(bank.best, dim=-1)
            return (values.softmax(dim=-1)[..., None] * vectors[indices]).sum(dim=-2)

        return Computed(tensors[role].name, result, of_logits, (bank.vectors, tensors[role]))
    index, weights = tensors[role + INDICES], tensors[role + WEIGHTS]
    require_shape(index, (*shape, bank.best), why)
    require_shape(weights, (*shape, bank.best - 1), why)

    def of_choice(vectors: "Tensor", indices: "Tensor", *first: "Tensor") -> "Tensor":
        import torch

        outside = indices[(indices < 0) | (indices >= bank.count)]
        if len(outside):
            raise expected(index.name, f"indices from 0 to {bank.count - 1}", int(outside[0]))
        rest = 1 - first[0].sum(dim=-1, keepdim=True) if first else vectors.new_ones(*shape, 1)
        mixture = torch.cat([*first, rest], dim=-1)
        return (mixture[..., None] * vectors[indices.long()]).sum(dim=-2)

    # a single vector has weight 1, and the tensor of its other weights is empty
    sources = (bank.vectors, index, *([weights] if weights.elements else []))
    return Computed(index.name, result, of_choice, sources)


def _in_rows(pieces: "Tensor") -> "Tensor":
    return pieces.flatten(1)


def _in_columns(pieces: "Tensor") -> "Tensor":
    return pieces.transpose(1, 2).flatten(0, 1)
