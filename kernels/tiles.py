"""Tile sizes per device: searched offline, committed as ``tuned/<device name>.json``, never tuned while serving.

Sizes decide the order of sums, so they are fixed for a process and depend on nothing in a batch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from weft.kernels.layout import round_up

TUNED = Path(__file__).parent / "tuned"

# segments of at least this many rows are cut into large tiles
LARGE_MIN = 64
# rows of the tiles that every other kernel walks
SMALL = 16

Options = Mapping[str, int]


@dataclass(frozen=True)
class Tiles:
    """Constants of every launch.

    span_min, splits_max:  how a product over in_features is split: into at most ``splits_max`` planes of at
                           least ``span_min``
    shrink, expand:        by height, ``small`` or ``large``
    """

    span_min: int
    splits_max: int
    shrink: Mapping[str, Options]
    expand: Mapping[str, Options]
    kron: Options
    scale: Options

    def split(self, features: int) -> tuple[int, int]:
        """(span of one plane, planes) for a product over this many features."""
        step = max(options["BK"] for options in self.shrink.values())
        span = round_up(max(self.span_min, -(-features // self.splits_max)), step)
        return span, -(-features // span)


@lru_cache
def tiles_for(device_name: str) -> Tiles:
    """The tiles of a device by its name (``NVIDIA H200``), or the defaults if none were searched for it."""
    path = TUNED / f"{device_name.replace(' ', '_')}.json"
    table = json.loads((path if path.is_file() else TUNED / "default.json").read_text())
    return Tiles(
        table["split_k"]["span_min"],
        table["split_k"]["splits_max"],
        {height: table[height]["shrink"] for height in ("small", "large")},
        {height: table[height]["expand"] for height in ("small", "large")},
        table["kron"],
        table["scale"],
    )
