"""Folds the operators of one site into the normal form that kernels compute, in fp32.

    y = sigma ⊙ Linear(sigma_in ⊙ x) + (x Aᵀ) Bᵀ + Σ x kron(w1, w2)ᵀ + beta

Scales go into B and w1. A Kronecker product with a low-rank factor is multiplied out, or rewritten as one low-rank
pair, whichever takes fewer bytes: kron(L1 R1, L2 R2) = kron(L1, L2) kron(R1, R2).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.adapters_store.errors import expected
from weft.adapters_store.operators import Bias, Factor, Kron, LowRank, Operator, Scale, SiteOperators
from weft.adapters_store.parts import Bottleneck
from weft.adapters_store.plans import FP32, RecordPlan, plan_delta
from weft.adapters_store.sites import SiteCatalogue, SiteInfo, weight_of
from weft.adapters_store.tensor_refs import Value
from weft.adapters_store.values import Values, rounded
from weft.kernels.activation import NAMES as ACTS
from weft.kernels.layout import SiteTerms, row_stride


@dataclass
class Folded:
    """A site's terms in fp32, the tensor each came from for messages, and the report's words for them.

    deltas:  what goes beside the normal form, still to be filled
    """

    site: SiteInfo
    deltas: list[RecordPlan] = field(default_factory=list)
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    krons: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pair_names: list[tuple[str, str]] = field(default_factory=list)
    kron_names: list[tuple[str, str]] = field(default_factory=list)
    sigma: Tensor | None = None
    beta: Tensor | None = None
    sigma_in: Tensor | None = None
    words: list[str] = field(default_factory=list)
    folds: list[str] = field(default_factory=list)

    @property
    def terms(self) -> SiteTerms:
        """In fp32."""
        return self._terms(self.pairs, self.krons)

    def rounded(self, dtype: torch.dtype) -> SiteTerms:
        """Factors rounded once to the serving dtype; vectors stay fp32. AdapterInvalid if a value does not fit."""
        pairs, krons = (
            [
                (rounded(left, dtype, names[0]), rounded(right, dtype, names[1]))
                for (left, right), names in zip(factors, all_names, strict=True)
            ]
            for factors, all_names in ((self.pairs, self.pair_names), (self.krons, self.kron_names))
        )
        return self._terms(pairs, krons)

    @property
    def empty(self) -> bool:
        """Whether there is nothing but deltas."""
        vectors = (self.sigma, self.beta, self.sigma_in)
        return not (self.pairs or self.krons) and all(vector is None for vector in vectors)

    @property
    def rank(self) -> int:
        """Of all low-rank terms together."""
        return sum(a.shape[0] for a, _ in self.pairs)

    def _terms(self, pairs: list[tuple[Tensor, Tensor]], krons: list[tuple[Tensor, Tensor]]) -> SiteTerms:
        low_rank = None
        if pairs:
            # terms of one site side by side are one term: ranks concatenate
            low_rank = (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        return SiteTerms(low_rank, tuple(krons), self.sigma, self.beta, self.sigma_in)


def fold_site(
    site: SiteInfo, said: SiteOperators, values: Values, catalogue: SiteCatalogue, dtype: torch.dtype
) -> Folded:
    """The normal form of a site's operators, in the order in which they apply."""
    folded = Folded(site, folds=list(said.folds))
    for operator in said.operators:
        match operator:
            case LowRank(a, b, scale, None):
                folded.pairs.append((values.read(a), values.read(b) * scale))
                folded.pair_names.append((a.name, b.name))
                folded.words.append(f"low_rank r={a.shape[0]}")
            case Kron():
                _fold_kron(folded, operator, values, dtype)
            case Scale(vector, of_input):
                _fold_scale(folded, vector, values, of_input)
            case Bias(vector, scale, absolute):
                shift = values.read(vector).reshape(-1) * scale
                if absolute:
                    shift = shift - base_bias(site, catalogue)
                folded.beta = shift if folded.beta is None else folded.beta + shift
                folded.words.append("bias")
            case _:
                plan = plan_delta(operator, site, catalogue.info.index[site.path], dtype)
                assert plan is not None, "what the normal form does not hold has a record"
                folded.deltas.append(plan)
                folded.words.append(plan.words)
    return folded


def fold_bottleneck(part: Bottleneck, values: Values, dtype: torch.dtype, tap: int) -> SiteTerms:
    """Two matrices with a function between them, as the terms of a hidden place."""
    assert part.up is not None
    down, up = (
        rounded(values.read(each.weight), dtype, each.weight.name)  # type: ignore[union-attr]
        for each in (part.down, part.up)
    )
    beta, inner = (
        None if v is None else values.read(v).reshape(-1) for v in (part.up_bias, part.down_bias)
    )  # fmt: skip
    return SiteTerms((down, up), beta=beta, inner=inner, act=ACTS.index(part.act), tap=tap)


def bottleneck_bytes(part: Bottleneck, dtype: torch.dtype) -> int:
    """What the terms of a hidden place take in a block."""
    (rank, wide), tall = part.down.shape, part.up.shape[0] if part.up is not None else 0
    vectors = [(1, v.elements) for v in (part.up_bias, part.down_bias) if v is not None]
    return factor_bytes([(rank, wide), (rank, tall)], dtype) + factor_bytes(vectors, FP32)


def base_bias(site: SiteInfo, catalogue: SiteCatalogue) -> Tensor:
    """The backbone's own bias, in fp32 on the host."""
    return weight_of(catalogue, f"{site.path}.bias")


def kron_becomes_low_rank(kron: Kron, site: SiteInfo, dtype: torch.dtype) -> bool:
    """Whether one low-rank pair takes fewer bytes than the two factors."""
    pair = factor_bytes(low_rank_shapes(_kron_rank(kron), site), dtype)
    return pair < factor_bytes([kron.w1.shape, kron.w2.shape], dtype)


def site_bytes(said: SiteOperators, site: SiteInfo, dtype: torch.dtype) -> int:
    """What a site's operators take in a block, known before a byte of them is read."""
    # several vectors of one kind become one
    vectors: set[tuple[str, int]] = set()
    total = 0
    for operator in said.operators:
        match operator:
            case LowRank(a, _, _, None):
                total += factor_bytes(low_rank_shapes(a.shape[0], site), dtype)
            case Kron(w1, w2, _):
                becomes = kron_becomes_low_rank(operator, site, dtype)
                shapes = low_rank_shapes(_kron_rank(operator), site) if becomes else [w1.shape, w2.shape]
                total += factor_bytes(shapes, dtype)
            case Scale(_, of_input):
                vectors.add(("sigma_in", site.in_features) if of_input else ("sigma", site.out_features))
            case Bias():
                vectors.add(("beta", site.out_features))
            case _:
                plan = plan_delta(operator, site, 0, dtype)
                total += 0 if plan is None else plan.nbytes
    return total + factor_bytes([(1, length) for _, length in vectors], FP32)


def factor_bytes(shapes: list[tuple[int, int]], dtype: torch.dtype) -> int:
    """What matrices of these shapes take in a block, rows padded as it pads them."""
    return sum(rows * row_stride(columns, dtype) * dtype.itemsize for rows, columns in shapes)


def low_rank_shapes(rank: int, site: SiteInfo) -> list[tuple[int, int]]:
    """A and B as a block stores them, B with its rows along out."""
    return [(rank, site.in_features), (rank, site.out_features)]


def _kron_rank(kron: Kron) -> int:
    """Rank of the low-rank form; a factor in one piece counts with its smaller side."""
    first = kron.w1.inner or min(kron.w1.shape)
    return first * (kron.w2.inner or min(kron.w2.shape))


def _fold_kron(folded: Folded, kron: Kron, values: Values, dtype: torch.dtype) -> None:
    names = (kron.w1.left.name, kron.w2.left.name)
    if kron_becomes_low_rank(kron, folded.site, dtype):
        (l1, r1), (l2, r2) = (_halves(factor, values) for factor in (kron.w1, kron.w2))
        folded.pairs.append((torch.kron(r1, r2), torch.kron(l1, l2) * kron.scale))
        folded.pair_names.append(names)
        folded.words.append(f"low_rank r={_kron_rank(kron)}")
        folded.folds.append("kron as low_rank")
        return
    w1, w2 = (_whole(factor, values) for factor in (kron.w1, kron.w2))
    folded.krons.append((w1 * kron.scale, w2))
    folded.kron_names.append(names)
    folded.words.append("kron {}x{} * {}x{}".format(*kron.w1.shape, *kron.w2.shape))
    for name, factor in (("w1", kron.w1), ("w2", kron.w2)):
        if factor.right is not None:
            folded.folds.append(f"{name} multiplied out")


def read_factor(factor: Factor, values: Values) -> tuple[Tensor, Tensor | None]:
    """What the file holds of a factor, with its term taken and its transposition undone."""
    left = values.read(factor.left)
    if factor.term is not None:
        left = left[factor.term]
    return (left.T if factor.transposed else left), None if factor.right is None else values.read(factor.right)


def _whole(factor: Factor, values: Values) -> Tensor:
    left, right = read_factor(factor, values)
    return left if right is None else left @ right


def _halves(factor: Factor, values: Values) -> tuple[Tensor, Tensor]:
    """left [rows, rank], right [rank, columns]; a factor in one piece stands beside an identity."""
    left, right = read_factor(factor, values)
    if right is not None:
        return left, right
    rows, columns = left.shape
    return (torch.eye(rows), left) if rows <= columns else (left, torch.eye(columns))


def record_words(operators: tuple[Operator, ...], site: SiteInfo, dtype: torch.dtype) -> int:
    """Words of the records that these operators take in a block's head."""
    plans = (plan_delta(operator, site, 0, dtype) for operator in operators)
    return sum(plan.head_words for plan in plans if plan is not None)


def _fold_scale(folded: Folded, said: Value, values: Values, of_input: bool) -> None:
    vector = values.read(said).reshape(-1)
    if of_input:
        folded.sigma_in = vector if folded.sigma_in is None else folded.sigma_in * vector
    else:
        if folded.krons or folded.deltas:
            why = "an output scale goes into low-rank pairs and biases only"
            raise expected(said.name, "a scale before the deltas that it does not touch", "one behind them", why)
        # whatever was added so far is scaled as well
        folded.pairs = [(a, b * vector[:, None]) for a, b in folded.pairs]
        folded.beta = None if folded.beta is None else folded.beta * vector
        folded.sigma = vector if folded.sigma is None else folded.sigma * vector
    folded.words.append("scale in" if of_input else "scale out")
