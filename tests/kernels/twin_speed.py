"""What adapters cost a CPU per decoding step, at the shape of SmolLM2-135M: ``python -m tests.kernels.twin_speed``.

Beside it, in the same minute: the same work as stacked fp32 ``bmm``, and the time that reading the factors takes.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from weft.kernels.batch import Block, Segment
from weft.kernels.dispatch import Kernels, load
from weft.kernels.layout import Geometry, SiteShape, SiteTerms, directory, pack

HIDDEN, KV, FF, LAYERS, ADAPTERS, RANK = 576, 192, 1536, 30, 16, 16
SITES = [(HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN), (HIDDEN, FF), (HIDDEN, FF), (FF, HIDDEN)]
GROUPS = {
    "qkv": (HIDDEN, (HIDDEN, KV, KV)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate_up": (HIDDEN, (FF, FF)),
    "down": (FF, (HIDDEN,)),
}


def median_ms(step: Callable[[], object], runs: int = 21) -> float:
    step()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[runs // 2]


def tensors() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(ADAPTERS, sum(talls)).bfloat16(), torch.randn(ADAPTERS, k).bfloat16())
        for k, talls in GROUPS.values()
    ]


def stacked() -> Callable[[], None]:
    """One bmm to shrink and one per site to expand, adapters stacked."""
    layers = [
        [
            (torch.randn(ADAPTERS, k, RANK * len(talls)), [torch.randn(ADAPTERS, RANK, n) for n in talls])
            for k, talls in GROUPS.values()
        ]
        for _ in range(LAYERS)
    ]
    batch = tensors()

    def step() -> None:
        for groups in layers:
            for (y, x), (a, bs) in zip(batch, groups, strict=True):
                hidden = torch.bmm(x.float().unsqueeze(1), a)
                for out, h, b in zip(y.split([b.shape[2] for b in bs], 1), hidden.split(RANK, 2), bs, strict=True):
                    out.add_(torch.bmm(h, b).squeeze(1))

    return step


def loaded() -> tuple[Kernels, list[Segment]]:
    """Kernels and one decoding row for each of the adapters."""
    geometry = Geometry(tuple(SiteShape(k, n) for k, n in SITES * LAYERS), (3, 1, 2, 1) * LAYERS, torch.bfloat16)
    images = []
    for _ in range(ADAPTERS):
        pairs = [(torch.randn(RANK, s.in_features), torch.randn(s.out_features, RANK)) for s in geometry.sites]
        images.append(pack(geometry, {site: SiteTerms(pair) for site, pair in enumerate(pairs)}))
    heads = [directory(image) for image in images]
    segments = [Segment(i, i + 1, Block(i, i * head.nbytes, head.nbytes, head)) for i, head in enumerate(heads)]
    return load("torch", torch.cat(images), geometry, 1 << 30), segments


def main() -> None:
    kernels, segments = loaded()
    batch, times = tensors(), dict[str, list[float]]({name: [] for name in GROUPS})
    start = time.perf_counter()
    rows = kernels.rows(segments)
    joined = time.perf_counter() - start

    def step() -> None:
        for group in range(LAYERS * len(GROUPS)):
            began = time.perf_counter()
            kernels.apply(*batch[group % len(GROUPS)], rows, group)
            times[list(GROUPS)[group % len(GROUPS)]].append(time.perf_counter() - began)

    print(f"{torch.get_num_threads()} threads, {ADAPTERS} distinct adapters of rank {RANK}, {LAYERS} layers, bf16")
    print(f"joining              {1e3 * joined / ADAPTERS:6.1f} ms per adapter")
    every = median_ms(step)
    for name, found in times.items():
        print(f"{name:20} {1e6 * sorted(found)[len(found) // 2]:6.0f} us")
    print(f"step                 {every:6.2f} ms")
    print(f"stacked fp32 bmm     {median_ms(stacked()):6.2f} ms")
    words = kernels.arena.view(torch.int64)
    print(f"reading the factors  {median_ms(words.sum):6.2f} ms")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
