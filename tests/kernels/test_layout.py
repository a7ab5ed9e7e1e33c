"""How operators lie in a block."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.examples import Kinds, Loaded, geometry, random_adapter
from weft.kernels import layout
from weft.kernels.layout import ALIGN, UNIT, Geometry, LayoutError, SiteShape, SiteTerms, directory, pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def tensors(terms: SiteTerms) -> list[Tensor]:
    pairs = [*([terms.low_rank] if terms.low_rank else []), *terms.krons]
    vectors = (terms.sigma, terms.beta, terms.sigma_in)
    return [t for pair in pairs for t in pair] + [v for v in vectors if v is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_packed_is_unpacked(dtype: torch.dtype, seed: int) -> None:
    of = geometry(dtype)
    adapter = random_adapter(of, seed, Kinds())
    found = unpack(of, pack(of, adapter))
    assert found.keys() == {site for site, terms in adapter.items() if tensors(terms)}
    for site, terms in found.items():
        for got, want in zip(tensors(terms), tensors(adapter[site]), strict=True):
            assert torch.equal(got, want.to(got.dtype))
        assert all(t.dtype == dtype for pair in terms.krons for t in pair)
        assert terms.sigma is None or terms.sigma.dtype == torch.float32


@settings(deadline=None, max_examples=40)
@given(ranks=st.lists(st.integers(0, 40), min_size=6, max_size=6), dtype=st.sampled_from(DTYPES))
def test_ragged_ranks_take_their_own_bytes_and_no_more(ranks: list[int], dtype: torch.dtype) -> None:
    of = geometry(dtype)
    terms = {
        site: SiteTerms((torch.randn(rank, shape.in_features), torch.randn(shape.out_features, rank)))
        for site, (rank, shape) in enumerate(zip(ranks, of.sites, strict=True))
        if rank
    }
    rows = lambda columns: -(-columns * dtype.itemsize // UNIT) * UNIT  # noqa: E731
    head = 4 * (layout.HEADER_WORDS + len(of.sites) * layout.SITE_WORDS)
    factors = sum(r * (rows(s.in_features) + rows(s.out_features)) for r, s in zip(ranks, of.sites, strict=True))
    assert len(pack(of, terms)) == aligned(aligned(head) + factors)


def test_every_kind_of_piece_takes_its_own_bytes() -> None:
    of = Geometry((SiteShape(12, 20),), (1,), torch.bfloat16)
    krons = ((torch.ones(4, 3), torch.ones(5, 4)), (torch.ones(4, 6), torch.ones(5, 2)))
    image = pack(of, {0: SiteTerms(None, krons, torch.ones(20), torch.ones(20), torch.ones(12))})
    head, table = 32 + 32, 2 * 24
    vectors = 80 + 80 + 48
    factors = 4 * 16 + 5 * 16 + 4 * 16 + 5 * 16
    assert len(image) == aligned(aligned(head + table) + factors + vectors)
    assert directory(image).nbytes == len(image)


def test_the_ranks_of_a_group_are_one_matrix() -> None:
    of = geometry(torch.bfloat16)
    adapter = {site: random_adapter(of, 0, Kinds()).get(site, SiteTerms()) for site in range(3)}
    adapter[1] = SiteTerms()
    adapter[0], adapter[2] = (SiteTerms((torch.randn(5, 36), torch.randn(of.sites[s].out_features, 5))) for s in (0, 2))
    image = pack(of, adapter)
    sites = directory(image).sites
    assert sites[1, layout.A_OFF] == 0
    together = layout.Views(image, of.dtype).matrix(0, int(sites[0, layout.A_OFF]), 10, 36)
    wanted = torch.cat([terms.low_rank[0] for terms in adapter.values() if terms.low_rank])
    assert torch.equal(together, wanted.to(of.dtype))


def test_offsets_name_whole_units_inside_the_block_and_no_two_pieces_overlap() -> None:
    of = geometry(torch.float16)
    image = pack(of, random_adapter(of, 5, Kinds()))
    head = directory(image)
    covered = torch.zeros(len(image) // UNIT, dtype=torch.int64)
    for terms in unpack(of, image).values():
        for tensor in tensors(terms):
            tall = tensor if tensor.dim() == 1 or tensor.stride(1) == 1 else tensor.T
            length = tall.numel() if tall.dim() == 1 else (len(tall) - 1) * tall.stride(0) + tall.shape[1]
            start = tall.storage_offset() * tall.itemsize
            assert start % UNIT == 0
            covered[start // UNIT : -(-(start + length * tall.itemsize) // UNIT)] += 1
    assert covered.max() == 1
    words = layout.HEADER_WORDS + len(of.sites) * layout.SITE_WORDS
    assert not covered[: words * 4 // UNIT].any()
    assert head.sites.shape == (len(of.sites), layout.SITE_WORDS)


def test_a_block_may_lie_anywhere() -> None:
    of = geometry(torch.bfloat16)
    adapter = random_adapter(of, 1, Kinds())
    image = pack(of, adapter)
    loaded = Loaded.of(of, [random_adapter(of, 2, Kinds()), adapter])
    block = loaded.blocks[1]
    moved = unpack(of, loaded.arena[block.offset : block.offset + block.nbytes])
    for site, terms in unpack(of, image).items():
        for got, want in zip(tensors(moved[site]), tensors(terms), strict=True):
            assert torch.equal(got, want)


def test_adapters_shaped_alike_share_a_signature() -> None:
    of = geometry(torch.bfloat16)
    same = [SiteTerms((torch.randn(3, 36), torch.randn(20, 3))) for _ in range(2)]
    other = SiteTerms((torch.randn(4, 36), torch.randn(20, 4)))
    signatures = [directory(pack(of, {0: terms})).signature for terms in (*same, other)]
    assert signatures[0] == signatures[1] != signatures[2]


def test_the_format_is_pinned_to_its_bytes() -> None:
    of = Geometry((SiteShape(12, 20), SiteShape(12, 6)), (2,), torch.bfloat16)
    count = torch.arange(60, dtype=torch.float32)
    terms = {
        0: SiteTerms((count[:24].view(2, 12), count[:40].view(20, 2)), sigma=count[:20], sigma_in=count[:12]),
        1: SiteTerms(krons=((count[:6].view(2, 3), count[:12].view(3, 4)),), beta=count[:6]),
    }
    digest = hashlib.sha256(pack(of, terms).numpy().tobytes()).hexdigest()[:16]
    # when these bytes change, raise layout.VERSION and write down both anew
    assert (layout.VERSION, digest, layout.IMAGE_FORMAT) == (3, "c6258381e5a7a635", "372101d56ef25b55")


def test_shapes_that_do_not_fit_are_refused() -> None:
    of = geometry(torch.float32)
    cases = {
        "site 0 low_rank: expected A [rank, 36] and B [20, rank], got [2, 36] and [6, 2]": {
            0: SiteTerms((torch.ones(2, 36), torch.ones(6, 2)))
        },
        "site 1 krons: expected factors of a [6, 36] matrix, got (2, 6) and (3, 5)": {
            1: SiteTerms(krons=((torch.ones(2, 6), torch.ones(3, 5)),))
        },
        "site 1 krons: expected one (o1, o2) for all terms, got [(2, 3), (3, 2)]": {
            1: SiteTerms(krons=((torch.ones(2, 6), torch.ones(3, 6)), (torch.ones(3, 6), torch.ones(2, 6))))
        },
        "site 2 sigma_in: expected [36], got [48]": {2: SiteTerms(sigma_in=torch.ones(48))},
        "terms: expected site indices below 6, got 6": {6: SiteTerms()},
    }
    for message, terms in cases.items():
        with pytest.raises(LayoutError) as refusal:
            pack(of, terms)
        assert str(refusal.value) == message


def test_geometries_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(LayoutError, match="groups must be runs that sum to 2"):
        Geometry((SiteShape(4, 4), SiteShape(4, 4)), (3,), torch.float32)
    with pytest.raises(LayoutError, match="sites must share in_features, got \\[4, 8\\]"):
        Geometry((SiteShape(4, 4), SiteShape(8, 4)), (2,), torch.float32)
    with pytest.raises(LayoutError, match="geometry dtype must be one of"):
        Geometry((SiteShape(4, 4),), (1,), torch.int8)


def test_bytes_that_are_not_a_block_are_refused() -> None:
    of = geometry(torch.float32)
    image = pack(of, random_adapter(of, 0, Kinds()))
    with pytest.raises(LayoutError, match=f"expected a block of format {layout.IMAGE_FORMAT}, got too few bytes"):
        directory(image[:16])
    with pytest.raises(LayoutError, match="got a first word of"):
        directory(torch.zeros_like(image))
    with pytest.raises(LayoutError, match=f"its header names {len(image)} bytes, got {len(image) - ALIGN}"):
        directory(image[:-ALIGN])
