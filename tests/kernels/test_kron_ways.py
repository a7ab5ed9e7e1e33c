"""Which way Kronecker terms go."""

import pytest

pytest.importorskip("triton", reason="needs Triton, which this machine's platform has no wheel of")

from weft.kernels.kron_ways import is_staged
from weft.kernels.layout import KronTerm
from weft.kernels.tiles import tiles_for


def ways(*shapes: tuple[int, int, int, int]) -> bool:
    """Whether terms of these (o1, i1, o2, i2) go in two stages with the tiles of tensor cores."""
    kron = tiles_for("default", False).kron
    return is_staged([KronTerm(0, 0, *shape) for shape in shapes], kron["BM"], kron["BK"])


def test_balanced_factors_are_fused() -> None:
    for shape in [(64, 64, 64, 64), (32, 64, 32, 64), (112, 64, 128, 64), (32, 32, 32, 32)]:
        assert not ways(shape)


def test_factors_that_would_leave_tiles_empty_or_be_made_again_go_in_two_stages() -> None:
    for shape in [(8, 8, 512, 512), (2, 2, 288, 288), (512, 8, 8, 512), (256, 32, 16, 128)]:
        assert ways(shape)


def test_all_terms_of_a_site_decide_together() -> None:
    many = (8, 8, 512, 512)
    assert ways(many, (8, 32, 512, 128), many)
    assert not ways(many, (8, 2048, 512, 2))


def test_what_is_staged_takes_scratch_of_the_order_of_the_output() -> None:
    for o1 in (2, 8, 64, 512, 4096):
        for i1 in (2, 8, 64, 512, 4096):
            o2, i2 = 4096 // o1, 4096 // i1
            assert not ways((o1, i1, o2, i2)) or i1 * o2 <= 16 * 4096
