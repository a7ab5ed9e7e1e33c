"""`make gpu-bench`: on a machine with a GPU, time kernels, and decoding over numbers of distinct adapters and ranks.

One JSON file per shape under ``$OUT`` (or bench/results), written as soon as that shape is done.
"""

import os
import sys
from pathlib import Path

import torch

from weft.bench import decode, gpu_kernels, record

ROOT = Path(__file__).resolve().parent.parent
# (requests, rank): few and many distinct adapters, small and large ones
POINTS = ((1, 16), (16, 16), (64, 16), (16, 64))


def main() -> int:
    """Run the points one after another."""
    if not torch.cuda.is_available():
        sys.stderr.write("gpu-bench: expected a CUDA device, got none\n")
        return 1
    out = Path(os.environ.get("OUT", ROOT / "bench" / "results"))
    record.write(out / "gpu_kernels.json", gpu_kernels.report(torch.device("cuda")))
    for requests, rank in POINTS:
        name = f"gpu_decode_{requests}x_r{rank}.json"
        peer = ["--peer", "peft"] if requests == 16 and rank == 16 else []
        point = ["--requests", str(requests), "--rank", str(rank), "--repeats", "3", "--out", str(out / name), *peer]
        decode.main(point)
    return 0


if __name__ == "__main__":
    sys.exit(main())
