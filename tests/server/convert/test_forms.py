"""Forms of one matrix: as few bytes as there can be, never more lost than allowed, and singular values as LAPACK's."""

import pytest
import torch
from torch import Tensor

from weft.server.convert.factors import factors
from weft.server.convert.forms import Change, Said, smallest, smallest_of_embedding, square

FP32, BF16 = torch.float32, torch.bfloat16


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spectrum(out: int, wide: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    left, right = torch.linalg.qr(noise(out, len(values), seed=seed)).Q, torch.linalg.qr(noise(wide, len(values))).Q
    made: Tensor = left * values @ right.T
    return made


def written(said: Said, shape: tuple[int, ...]) -> Tensor:
    """The matrix that is said."""
    t = said.tensors
    if said.form == "low-rank":
        return t["b"] @ t["a"]
    if said.form == "dense":
        return t["values"].float()
    empty = torch.zeros(shape)
    if said.form == "sparse":
        return empty.flatten().index_copy(0, t["index"].long(), t["values"].float()).view(shape)
    return empty.index_copy(0 if said.form == "rows" else 1, t["index"].long(), t["values"].float())


@pytest.mark.parametrize(("out", "wide"), [(40, 70), (70, 40), (300, 90), (90, 300)])
@pytest.mark.parametrize("error", [1e-6, 1e-3, 0.1, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.05, 2.0])
def test_factors_have_the_smallest_rank_that_singular_values_allow(decay, error, out, wide):
    matrix = spectrum(out, wide, torch.exp(-decay * torch.arange(40.0)))
    lost_max = error**2 * square(matrix)
    values = torch.linalg.svdvals(matrix.double())
    behind = values.square().flip(0).cumsum(0).flip(0)
    wanted = int((behind > lost_max).sum())
    found = factors(matrix, lost_max, 40)
    assert found is not None
    a, b, lost = found
    assert (a.shape, b.shape) == ((len(a), wide), (out, len(a)))
    assert lost == pytest.approx(square(matrix - b @ a), rel=1e-3)
    assert lost <= lost_max
    # singular values of fp32 factors are right to a few units of the largest
    assert wanted <= len(a) <= wanted + (2 if error == 1e-6 else 0)
    assert factors(matrix, lost_max, wanted - 1) is None or len(a) > wanted


def test_a_matrix_of_full_rank_gives_up_early_when_few_directions_would_do():
    matrix = noise(200, 200)
    assert factors(matrix, 0.01 * square(matrix), 3) is None


def test_factors_of_nothing_are_finite():
    matrix = torch.zeros(40, 70)
    matrix[0, 0] = 1e-20
    found = factors(matrix, 0.5 * square(matrix), 5)
    assert found is not None
    assert torch.isfinite(found[0]).all()
    assert torch.isfinite(found[1]).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("error", [0.0, 1e-3, 0.2])
def test_the_smallest_form_is_smaller_than_all_others_that_lose_as_little(error, dtype):
    few = noise(48, 64) * (noise(48, 64, seed=1) > 1.9)
    rows, columns = torch.zeros(48, 64), torch.zeros(48, 64)
    rows[[1, 7]], columns[:, [3, 4, 5]] = noise(2, 64), noise(48, 3)
    matrices = {"sparse": few, "rows": rows, "columns": columns, "dense": noise(48, 64)}
    if error:
        matrices["low-rank"] = noise(48, 2) @ noise(2, 64, seed=2)
    for form, matrix in matrices.items():
        change = Change(matrix, dtype, error**2 * square(matrix))
        best = smallest(change)
        assert best is not None
        assert best.form == form or error == 0.2
        others = [smallest(change, choice) for choice in ("sparse", "rows", "dense", *(["low-rank"] if error else []))]
        assert best.nbytes == min(each.nbytes for each in others if each is not None)
        for each in (best, *others):
            if each is not None:
                lost = square(matrix - written(each, matrix.shape))
                assert lost == pytest.approx(each.lost, rel=1e-4, abs=1e-12)
                assert lost <= change.lost_max * (1 + 1e-6)


def test_bytes_are_those_of_a_device():
    matrix = torch.zeros(8, 16)
    matrix[2] = 1
    for dtype, size in ((FP32, 4), (BF16, 2)):
        change = Change(matrix, dtype, 0.0)
        expected = {"sparse": 16 * (4 + size), "rows": 4 + 16 * size, "dense": 8 * 16 * size}
        assert {form: said.nbytes for form in expected if (said := smallest(change, form))} == expected


def test_values_are_stored_narrow_only_where_that_loses_little_enough():
    matrix = noise(16, 16)

    def stored(matrix: Tensor, lost_max: float) -> torch.dtype:
        said = smallest(Change(matrix, BF16, lost_max), "dense")
        assert said is not None
        return said.tensors["values"].dtype

    assert stored(matrix, 0.0) == FP32
    assert stored(matrix.bfloat16().float(), 0.0) == BF16
    assert stored(matrix, 1e-4 * square(matrix)) == BF16


@pytest.mark.parametrize("followed", [False, True])
def test_an_embedding_is_said_in_whole_rows_or_entries(followed):
    matrix = torch.zeros(50, 8)
    matrix[[3, 9]] = noise(2, 8)
    matrix[20] = 1e-3 * noise(8)
    exact = smallest_of_embedding(Change(matrix, FP32, 0.0), "auto", followed)
    assert (exact.form, exact.count, exact.nbytes) == ("sparse", 24, 3 * (4 + 32) + followed * 24 * 8)
    assert torch.equal(written(exact, matrix.shape), matrix)
    loose = smallest_of_embedding(Change(matrix, FP32, 1e-2 * square(matrix)), "auto", followed)
    assert set((loose.tensors["index"] // 8).tolist()) == {3, 9}
    scattered = torch.zeros(50, 8)
    scattered[:, 3] = noise(50)
    few = smallest_of_embedding(Change(scattered, FP32, 0.0), "auto", followed)
    assert (few.form, few.nbytes) == ("sparse", (1 + followed) * 50 * 8)
    dense = smallest_of_embedding(Change(noise(50, 8), FP32, 0.0), "auto", followed)
    assert (dense.form, dense.nbytes) == ("dense", 50 * 36 + followed * 50 * 32)


def test_something_always_stays():
    matrix = noise(6, 5)
    for form in ("sparse", "rows"):
        said = smallest(Change(matrix, FP32, 2 * square(matrix)), form)
        assert said is not None
        assert said.count == 1
