"""What the torch implementation keeps beside the arena, and for how long."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.examples import GROUPS, MIXES, Kinds, Loaded, applied, geometry
from weft.kernels.batch import Segment
from weft.kernels.layout import SiteTerms
from weft.kernels.twin import TorchKernels
from weft.kernels.working_set import HEAD


@pytest.fixture
def loaded() -> Loaded:
    return Loaded.random(torch.bfloat16, 5, Kinds(), seed=2)


def kernels_with(loaded: Loaded, budget: int) -> TorchKernels:
    return TorchKernels(loaded.arena, loaded.geometry, budget)


def decode(kernels: TorchKernels, loaded: Loaded, adapters: Sequence[int], group: int = 0) -> Tensor:
    y, x = loaded.tensors(len(adapters), group, torch.bfloat16)
    return applied(kernels, loaded.segments([(1, adapter) for adapter in adapters]), y, x, group)


def slot_bytes(loaded: Loaded) -> list[int]:
    found = []
    for adapter in range(len(loaded.blocks)):
        kernels = kernels_with(loaded, 1 << 22)
        decode(kernels, loaded, [adapter])
        found.append(kernels.working_set_bytes)
    return found


def budgets(loaded: Loaded) -> Iterator[int]:
    sizes = slot_bytes(loaded)
    yield from (0, HEAD, HEAD + min(sizes), HEAD + max(sizes), HEAD + sum(sizes) // 2, 1 << 22)


def test_results_do_not_depend_on_the_budget(loaded: Loaded) -> None:
    for group in range(len(GROUPS)):
        results = [
            decode(kernels_with(loaded, budget), loaded, [0, 1, 2, 3, 4, 1], group) for budget in budgets(loaded)
        ]
        for result in results[1:]:
            assert torch.equal(result, results[0])


def test_scaled_inputs_do_not_depend_on_the_budget(loaded: Loaded) -> None:
    segments = loaded.segments([(1, 0), (2, 1), (1, None), (40, 2), (1, 3), (1, 4), (1, 1)])
    for site, group in enumerate(loaded.geometry.group_of):
        _, x = loaded.tensors(segments[-1].stop, group, torch.bfloat16)
        results = []
        for budget in budgets(loaded):
            kernels = kernels_with(loaded, budget)
            results.append(kernels.scale_input(x, kernels.rows(segments), site))
        for result in results[1:]:
            assert torch.equal(result, results[0])


def test_the_budget_holds(loaded: Loaded) -> None:
    for budget in budgets(loaded):
        kernels = kernels_with(loaded, budget)
        for adapters in ([0], [0, 1, 2], [3], [4, 3, 2, 1, 0], [1, 1]):
            decode(kernels, loaded, adapters)
            assert kernels.working_set_bytes <= budget
            kernels.check()


def test_what_does_not_fit_is_counted(loaded: Loaded) -> None:
    sizes = slot_bytes(loaded)
    kernels = kernels_with(loaded, HEAD + sizes[0])
    decode(kernels, loaded, [0])
    assert kernels.working_set_misses == 0
    decode(kernels, loaded, [0, 1])
    assert kernels.working_set_misses == 1
    assert kernels_with(loaded, 0).working_set_bytes == 0


def test_the_least_recently_used_makes_room(loaded: Loaded) -> None:
    alike = Loaded.of(loaded.geometry, [{0: SiteTerms((torch.randn(4, 36), torch.randn(20, 4)))} for _ in range(3)])
    size = slot_bytes(alike)[0]
    kernels = kernels_with(alike, HEAD + 2 * size)
    decode(kernels, alike, [0])
    decode(kernels, alike, [1])
    decode(kernels, alike, [0])
    # 1 goes, 0 stays: overwriting it in the arena is not noticed
    decode(kernels, alike, [2])
    alike.arena.fill_(255)
    assert decode(kernels, alike, [0, 2]).isfinite().all()
    assert not decode(kernels, alike, [1]).isfinite().all()


def test_who_is_here_is_not_written_again(loaded: Loaded) -> None:
    kernels = kernels_with(loaded, 1 << 22)
    want = decode(kernels, loaded, [0, 1])
    first = loaded.blocks[0]
    loaded.arena[first.offset : first.offset + first.nbytes] = 255
    decode(kernels, loaded, [2])
    assert torch.equal(decode(kernels, loaded, [0, 1]), want)


def test_forgotten_blocks_are_read_anew(loaded: Loaded) -> None:
    kernels = kernels_with(loaded, 1 << 22)
    decode(kernels, loaded, [0, 1])
    held = kernels.working_set_bytes
    kernels.forget(loaded.blocks[0].key)
    assert kernels.working_set_bytes < held
    kernels.forget(12345)
    first = loaded.blocks[0]
    loaded.arena[first.offset : first.offset + first.nbytes] = 255
    assert not decode(kernels, loaded, [0]).isfinite().all()


def test_rows_outlive_their_slots(loaded: Loaded) -> None:
    sizes = slot_bytes(loaded)
    kernels = kernels_with(loaded, HEAD + max(sizes))
    segments = loaded.segments([(1, 0), (1, None)])
    y, x = loaded.tensors(2, 0, torch.bfloat16)
    rows = kernels.rows(segments)
    first = y.clone()
    kernels.apply(first, x, rows, 0)
    for adapter in (1, 2, 3):
        decode(kernels, loaded, [adapter])
    again = y.clone()
    kernels.apply(again, x, rows, 0)
    assert torch.equal(first, again)


def test_prompts_take_no_slot(loaded: Loaded) -> None:
    kernels = kernels_with(loaded, 1 << 22)
    kernels.rows(loaded.segments([(40, 0), (33, 1), (5, None)]))
    assert kernels.working_set_bytes == 0
    kernels.rows(loaded.segments(MIXES["prompts and answers"]))
    assert kernels.working_set_bytes > 0


def test_a_negative_budget_is_refused(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match=r"^working_set_bytes_max: expected at least 0, got -1$"):
        kernels_with(loaded, -1)


def test_adapters_without_bytes_take_no_place() -> None:
    """One that has records only has an empty slot, which must not hide the slot that begins where it lies."""
    of = geometry(torch.float32)
    pair = {0: SiteTerms((torch.randn(3, 36), torch.randn(20, 3)))}
    loaded = Loaded.of(of, [pair, {}, {}, pair])
    kernels = TorchKernels(loaded.arena, of, 1 << 20)
    for block in loaded.blocks:
        kernels.rows([Segment(0, 1, block)])
        kernels.check()
