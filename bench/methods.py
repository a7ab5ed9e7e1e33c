"""`weft bench methods`: every method on one backbone shape: bytes on disk and device, and speed beside the base.

Each method answers one batch of requests with as many distinct adapters as the arena has room for; the base answers
the same batch right before and right after, so that whatever else the machine does hits both.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from weft.bench import record, workload
from weft.bench.methods_made import MADE, Ground, Made, variant
from weft.server.backbone.load import choose_device, choose_dtype, moved
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine

WEIGHTS = "adapter_model.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its table, and write its JSON where asked."""
    options = _options(argv)
    console = Console(stderr=options.json)
    made = [each for each in MADE if not options.only or each.name in options.only]
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(options, Path(folder))
        rows: list[dict[str, object]] = []
        for each in track(made, "measuring", console=console, transient=True):
            rows.append(bench.measure(each))
            # whoever stops it half way has the rows until then
            report = _report(options, rows)
            if options.out:
                record.write(Path(options.out), report)
    if options.json:
        Console(soft_wrap=True).print_json(data=report)
    else:
        console.print(_table(options, rows))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="weft bench methods", description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m", help="smollm2-135m, or a folder or hub name")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--requests", type=int, default=16, help="requests in the batch, each with its own adapter")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--adapter-memory-gib", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1, help="rounds of base, method, base")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD", help="measure just these")
    parser.add_argument("--out", default="", help="file for the JSON report")
    parser.add_argument("--json", action="store_true", help="print the JSON report instead of a table")
    return parser.parse_args(argv)


class _Bench:
    """One engine that has seen no adapter, one that has, on the same random model."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self._options, self._folder = options, folder
        dtype = choose_dtype(options.dtype, choose_device(options.device))
        # drawing one takes longer than copying it
        self._drawn = workload.random_model(workload.shape(options.shape), dtype)
        self._bare, self._engine = self._load("bare"), self._load("store")
        self._ground = Ground(self._model, self._engine.engine.backbone.info)

    def measure(self, made: Made) -> dict[str, object]:
        """One row of the report."""
        source = self._folder / "made"
        made.write(self._ground, source)
        disk = (source / WEIGHTS).stat().st_size
        digests = [self._register(source, 0)]
        entry = self._engine.catalog.get("adapter-0")
        room = self._options.adapter_memory_gib << 30
        distinct = max(1, min(self._options.requests, room // entry.device_bytes))
        digests += [self._register(source, number) for number in range(1, distinct)]
        self._run(self._engine, digests)
        base, rates = [self._rate(self._bare, [None])], []
        for _ in range(self._options.repeats):
            rates.append(self._rate(self._engine, digests))
            base.append(self._rate(self._bare, [None]))
        for number in range(distinct):
            self._engine.forget(f"adapter-{number}")
        _remove(source)
        return {
            "case": f"methods/{made.name}",
            "words": made.words,
            "method": entry.method,
            "disk_bytes": disk,
            "device_bytes": entry.device_bytes,
            "distinct": distinct,
            "tokens_per_s": round(median(rates), 2),
            "base_tokens_per_s": round(median(base), 2),
            "of_base": round(median(rates) / median(base), 3),
        }

    def _register(self, source: Path, number: int) -> Digest:
        folder = variant(source, self._folder / "variant", number)
        digest = self._engine.register(f"adapter-{number}", folder)
        _remove(folder)
        return digest

    def _rate(self, engine: OfflineEngine, digests: Sequence[Digest | None]) -> float:
        started = time.perf_counter()
        self._run(engine, digests)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return float(self._options.requests * self._options.new_tokens / (time.perf_counter() - started))

    def _run(self, engine: OfflineEngine, digests: Sequence[Digest | None]) -> None:
        options = self._options
        prompts = workload.prompts(options.requests, options.prompt_tokens, engine.engine.backbone.vocabulary)
        submits = [
            Submit(RequestId(str(i)), prompt, options.new_tokens, adapter=digests[i % len(digests)])
            for i, prompt in enumerate(prompts)
        ]
        engine.run(submits)

    def _model(self) -> PreTrainedModel:
        return copy.deepcopy(self._drawn)

    def _load(self, name: str) -> OfflineEngine:
        options = self._options
        memory = options.adapter_memory_gib << 30
        config = EngineConfig(
            model=options.shape,
            store=str(self._folder / name),
            device=options.device,
            adapter_memory_bytes_max=memory,
            working_set_bytes_max=memory,
        )
        return OfflineEngine(config, Backbone(moved(self._model(), choose_device(options.device))))


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _words(options: argparse.Namespace) -> str:
    tokens = f"{options.prompt_tokens} prompt tokens and {options.new_tokens} new tokens each, greedy"
    return f"{options.requests} requests at once, {tokens}; random weights of the {options.shape} shape"


def _report(options: argparse.Namespace, rows: list[dict[str, object]]) -> dict[str, object]:
    device = choose_device(options.device)
    return {
        "workload": f"{_words(options)}; new tokens over the time of prefill and decode; base before and after",
        "rounds": options.repeats,
        "dtype": str(choose_dtype(options.dtype, device)).removeprefix("torch."),
        "device": str(device),
        **record.circumstances(device),
        "rows": rows,
    }


def _table(options: argparse.Namespace, rows: list[dict[str, object]]) -> Table:
    about = record.circumstances(choose_device(options.device))
    table = Table(title=_words(options), caption=f"{about['machine']}, {about['commit']}")
    for column in ("method", "what", "disk", "device", "distinct", "tok/s", "base", "of base"):
        table.add_column(column, justify="left" if column in ("method", "what") else "right")
    for row in rows:
        name = str(row["case"]).partition("/")[2]
        sizes = [f"{row[key]:,}" for key in ("disk_bytes", "device_bytes", "distinct")]
        speeds = [f"{row[key]:.0f}" for key in ("tokens_per_s", "base_tokens_per_s")]
        table.add_row(name, str(row["words"]), *sizes, *speeds, f"{row['of_base']:.2f}")
    return table
