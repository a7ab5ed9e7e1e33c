"""Tile sizes per device: searched offline, committed as ``tuned/<device name>.json``, never tuned while serving.

Sizes decide the order of sums, so they are fixed for a process and depend on nothing in a batch. ``expand``, ``kron``
and ``join`` keep one stage: pipelined wgmma with a register operand is miscompiled by the ptxas of older Tritons.
``maxnreg``, which only NVIDIA knows, keeps ptxas from spilling for the sake of one more program per processor.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from weft.kernels.layout import round_up

TUNED = Path(__file__).parent / "tuned"

# rows of a tile: SMALL for short segments, LARGE for segments of at least that many
SMALL = 16
LARGE = 64

Options = Mapping[str, int]


@dataclass(frozen=True)
class Tiles:
    """Constants of every launch.

    split_k:         ``span_min``, ``splits_max``: a product over in_features is split into at most
                     ``splits_max`` planes of at least ``span_min``
    shrink, expand:  by the tile's height, ``small`` or ``large``; so ``fold``
    """

    split_k: Options
    shrink: Mapping[str, Options]
    expand: Mapping[str, Options]
    kron: Options
    fold: Mapping[str, Options]
    join: Options
    scale: Options
    entries: Options
    rows: Options
    norm: Options

    def split(self, features: int) -> tuple[int, int]:
        """(span of one plane, planes) for a product over this many features."""
        step = max(options["BK"] for options in self.shrink.values())
        least = max(self.split_k["span_min"], -(-features // self.split_k["splits_max"]))
        span = round_up(least, step)
        return span, -(-features // span)


@lru_cache
def tiles_for(device_name: str, exact: bool, nvidia: bool = True) -> Tiles:
    """The tiles of a device by its name (``NVIDIA H200``), or the defaults if none were searched for it.

    exact:  for products in fp32 on plain cores, else for tensor cores
    """
    path = TUNED / f"{device_name.replace(' ', '_')}.json"
    table = json.loads((path if path.is_file() else TUNED / "default.json").read_text())
    chosen = table["exact" if exact else "half"]
    # said outright: Triton's default depends on its version
    fused = {"enable_fp_fusion": True}

    def complete(options: dict[str, int]) -> Options:
        return {name: value for name, value in options.items() if nvidia or name != "maxnreg"} | fused

    def by_height(kernel: str) -> dict[str, Options]:
        return {height: complete(options) for height, options in chosen[kernel].items()}

    return Tiles(
        chosen["split_k"],
        by_height("shrink"),
        by_height("expand"),
        complete(chosen["kron"]),
        by_height("fold"),
        complete(chosen["join"]),
        complete(chosen["scale"]),
        complete(chosen["entries"]),
        complete(chosen["rows"]),
        complete(chosen["norm"]),
    )
