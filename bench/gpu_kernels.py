"""Time what each kernel adds to one decoding layer, beside the time that reading its adapters takes.

Shapes are those of Llama-3.1-8B in bf16; one row per request. Several layers stand in one CUDA graph, so that neither
a launch from Python nor what the last layer left in a cache is what is timed.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from weft.bench import record
from weft.kernels import dispatch
from weft.kernels.activation import NAMES
from weft.kernels.batch import Block, Segment
from weft.kernels.dispatch import Kernels
from weft.kernels.extras import Extra, Kind
from weft.kernels.layout import ALIGN, Geometry, SiteShape, SiteTerms, directory, pack
from weft.kernels.norms import Norm

REQUESTS = 64
LAYERS = 8
DISTINCT = (1, 16, 64)
# of a real layer
WIDE, KV = 4096, 1024

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Operators of one adapter at one layer: ``terms`` at sites q, k, v and behind the MLP; records likewise.

    seen:  ``apply`` at group 0 (q, k, v) or 1 (the hidden place), or ``override_norm``
    """

    words: str
    seen: str
    terms: Callable[[int, int, torch.Generator], Mapping[int, SiteTerms]]
    records: Callable[[int, int, torch.Generator], list[Extra]] = lambda wide, kv, noise: []


def _normal(noise: torch.Generator, *shape: int) -> Tensor:
    drawn: Tensor = torch.randn(*shape, generator=noise) / shape[-1] ** 0.5
    return drawn


def _pairs(wide: int, kv: int, noise: torch.Generator) -> dict[int, SiteTerms]:
    return {i: SiteTerms((_normal(noise, 16, wide), _normal(noise, n, 16))) for i, n in enumerate((wide, kv, kv))}


def _bottleneck(wide: int, kv: int, noise: torch.Generator) -> dict[int, SiteTerms]:
    pair = _normal(noise, 64, wide), _normal(noise, wide, 64)
    return {3: SiteTerms(pair, beta=_normal(noise, wide), inner=_normal(noise, 64), act=NAMES.index("gelu"))}


def _kron(narrow: int) -> Callable[[int, int, torch.Generator], Mapping[int, SiteTerms]]:
    def terms(wide: int, kv: int, noise: torch.Generator) -> dict[int, SiteTerms]:
        factor = _normal(noise, wide // narrow, wide // narrow)
        return {0: SiteTerms(krons=((_normal(noise, narrow, narrow), factor),))}

    return terms


def _nothing(wide: int, kv: int, noise: torch.Generator) -> dict[int, SiteTerms]:
    return {}


def _entries(wide: int, kv: int, noise: torch.Generator) -> list[Extra]:
    index = torch.randperm(wide * wide, generator=noise)[: wide * wide // 200].sort().values
    return [Extra(Kind.SPARSE, 0, (index.int(), _normal(noise, len(index)).bfloat16()))]


def _rows(wide: int, kv: int, noise: torch.Generator) -> list[Extra]:
    index = torch.randperm(wide, generator=noise)[:64].sort().values
    return [Extra(Kind.ROWS, 0, (index.int(), _normal(noise, 64, wide).bfloat16()))]


def _norm(wide: int, kv: int, noise: torch.Generator) -> list[Extra]:
    return [Extra(Kind.NORM, 0, (_normal(noise, wide), None))]


CASES = {
    "low_rank": Case("pairs of rank 16 on q, k and v", "qkv", _pairs),
    "bottleneck": Case("64 wide with gelu and both biases, behind the MLP", "hidden", _bottleneck),
    "kron_fused": Case("64 x 64 with 64 x 64 on q", "qkv", _kron(64)),
    "kron_staged": Case("8 x 8 with 512 x 512 on q", "qkv", _kron(8)),
    "entries": Case("one in 200 entries of q", "qkv", _nothing, _entries),
    "rows": Case("64 rows of q", "qkv", _nothing, _rows),
    "norm": Case("the weight of an RMS norm", "norm", _nothing, _norm),
}


def loaded(case: Case, distinct: int, wide: int, kv: int, device: torch.device) -> tuple[Geometry, Tensor, list[Block]]:
    """(geometry of one layer, arena, LAYERS * distinct blocks): a layer's adapters lie apart from the next one's."""
    shape = Geometry((SiteShape(wide, wide), SiteShape(wide, kv), SiteShape(wide, kv), SiteShape(wide, wide)), (3, 1),
                     torch.bfloat16, 1)  # fmt: skip
    noise = torch.Generator().manual_seed(0)
    image = pack(shape, case.terms(wide, kv, noise), case.records(wide, kv, noise))
    head, count = directory(image), LAYERS * distinct
    # equal numbers in places of their own
    arena = image.to(device).repeat(count)
    assert len(image) % ALIGN == 0
    return shape, arena, [Block(i, i * len(image), len(image), head) for i in range(count)]


def layers(case: Case, kernels: Kernels, blocks: list[Block], wide: int, kv: int) -> Run:
    """A function that runs the case at every layer in turn, on requests that have the adapters in equal parts."""
    device, distinct = kernels.arena.device, len(blocks) // LAYERS
    every = [
        kernels.rows([Segment(i, i + 1, blocks[layer * distinct + i * distinct // REQUESTS]) for i in range(REQUESTS)])
        for layer in range(LAYERS)
    ]
    x = torch.randn(REQUESTS, wide, device=device, dtype=torch.bfloat16)
    group = int(case.seen == "hidden")
    y = torch.zeros(REQUESTS, wide if group else wide + 2 * kv, device=device, dtype=torch.bfloat16)
    norm = Norm(torch.ones(wide, device=device, dtype=torch.bfloat16), None, 1e-6, False, 0.0)

    def run() -> None:
        for rows in every:
            if case.seen == "norm":
                kernels.override_norm(y[:, None, :wide], x[:, None], rows, 0, norm)
            else:
                kernels.apply(y, x, rows, group)

    return run


def timed(run: Run, device: torch.device) -> float:
    """Seconds of one run."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        run()
        return float(do_bench_cudagraph(run)) / 1e3
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def bytes_per_s(device: torch.device, nbytes: int = 1 << 28) -> float:
    """Bytes that a copy reads and writes in a second."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / timed(lambda: target.copy_(source), device)


def measured(device: torch.device, wide: int = WIDE, kv: int = KV) -> Iterator[dict[str, object]]:
    """One row per case and number of distinct adapters."""
    rate = bytes_per_s(device, 1 << 28 if device.type == "cuda" else 1 << 24)
    for name, case in CASES.items():
        for distinct in DISTINCT:
            shape, arena, blocks = loaded(case, distinct, wide, kv, device)
            kernels = dispatch.load("auto", arena, shape, 1 << 30)
            seconds = timed(layers(case, kernels, blocks, wide, kv), device) / LAYERS
            yield {
                "case": f"kernels/{name}/{distinct}",
                "words": f"{case.words}, {REQUESTS} rows of {distinct} adapters",
                "metric": "us_per_layer",
                "us": round(1e6 * seconds, 2),
                "us_of_reading": round(1e6 * distinct * blocks[0].nbytes / rate, 2),
                "bytes_per_adapter": blocks[0].nbytes,
            }


def report(device: torch.device) -> dict[str, object]:
    """All rows with their circumstances."""
    workload = "one decoding layer of the Llama-3.1-8B shape in bf16, adapters alone, without the base"
    return {"workload": workload, **record.circumstances(device), "rows": list(measured(device))}
