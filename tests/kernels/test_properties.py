"""Whatever the shapes, the twin computes the formula."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.examples import Loaded, applied
from weft.kernels import dispatch, reference
from weft.kernels.layout import Geometry, SiteShape, SiteTerms


def loaded_alone(wide: int, tall: int, *adapters: SiteTerms) -> Loaded:
    return Loaded.of(Geometry((SiteShape(wide, tall),), (1,), torch.float32), [{0: terms} for terms in adapters])


def delta(loaded: Loaded, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(what one request per adapter adds to y = 0, the inputs)."""
    segments = loaded.segments([(length, adapter) for adapter, length in enumerate(lengths)])
    y, x = loaded.tensors(sum(lengths), 0, torch.float32)
    y.zero_()
    return applied(dispatch.load("torch", loaded.arena, loaded.geometry, 1 << 22), segments, y, x, 0), x


sizes = st.integers(1, 12)


@settings(deadline=None, max_examples=60)
@given(o1=sizes, i1=sizes, o2=sizes, i2=sizes, terms=st.integers(1, 4), rows=st.sampled_from([1, 3, 33]))
def test_kron_is_the_materialised_product(o1: int, i1: int, o2: int, i2: int, terms: int, rows: int) -> None:
    pairs = tuple((torch.randn(o1, i1), torch.randn(o2, i2)) for _ in range(terms))
    got, x = delta(loaded_alone(i1 * i2, o1 * o2, SiteTerms(krons=pairs)), [rows])
    product = sum(torch.kron(w1.double(), w2.double()) for w1, w2 in pairs)
    assert isinstance(product, Tensor)
    torch.testing.assert_close(got.double(), x.double() @ product.T, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    wide=st.integers(1, 70),
    tall=st.integers(1, 70),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    rows=st.sampled_from([1, 2, 33]),
)
def test_low_rank_pairs_of_ragged_ranks_are_products(wide: int, tall: int, ranks: list[int], rows: int) -> None:
    pairs = [(torch.randn(rank, wide), torch.randn(tall, rank)) for rank in ranks]
    got, x = delta(loaded_alone(wide, tall, *(SiteTerms(pair) for pair in pairs)), [rows] * len(ranks))
    want = torch.cat([reference.low_rank(x[i * rows : (i + 1) * rows], *pair) for i, pair in enumerate(pairs)])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
