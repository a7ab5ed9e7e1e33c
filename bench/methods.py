"""`weft bench methods`: every method on one backbone shape: bytes on disk and device, and speed beside the base.

Each method answers one batch of requests with as many distinct adapters as the arena has room for, and the base answers
the same batch, a step of one after a step of the other. Decoding is told apart from the whole run, prefill included.
"""

import argparse
import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from weft.adapters_store.files import weights_in
from weft.bench import record, workload
from weft.bench.clock import Clock
from weft.bench.made import Ground, Made, Variants
from weft.bench.methods_made import MADE
from weft.server.backbone.load import choose_device, choose_dtype, moved
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine

# enough to bring every adapter into the arena and to decode once
WARM_TOKENS = 2


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
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16, help="of each request, at least 2")
    parser.add_argument("--adapter-memory-gib", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="rounds of base beside method")
    names = [made.name for made in MADE]
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD", choices=names, help="measure just these")
    parser.add_argument("--out", default="", help="file for the JSON report")
    parser.add_argument("--json", action="store_true", help="print the JSON report instead of a table")
    options = parser.parse_args(argv)
    if options.new_tokens < 2:
        parser.error(f"--new-tokens: expected at least 2, or nothing is decoded, got {options.new_tokens}")
    return options


class _Bench:
    """One engine that has seen no adapter, one that has, on the same random model."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self._options, self._folder = options, folder
        dtype = choose_dtype(options.dtype, choose_device(options.device))
        # drawing one takes longer than copying it
        self._drawn = workload.random_model(workload.shape(options.shape), dtype)
        self._bare, self._engine = self._load("bare"), self._load("store")
        self._ground = Ground(self._model, self._engine.engine.backbone.info)
        self._bare.run(self._submits([None], WARM_TOKENS))

    def measure(self, made: Made) -> dict[str, object]:
        """One row of the report."""
        source = self._folder / "made"
        made.write(self._ground, source)
        disk, variants = weights_in(source).stat().st_size, Variants.of(source)
        shutil.rmtree(source)
        digests = [self._register(variants, 0)]
        entry = self._engine.catalog.get("adapter-0")
        room = self._options.adapter_memory_gib << 30
        distinct = max(1, min(self._options.requests, room // entry.device_bytes))
        digests += [self._register(variants, number) for number in range(1, distinct)]
        # from here on all of them are in the arena
        self._engine.run(self._submits(digests, WARM_TOKENS, made.invokes))
        shared = self._shared_bytes(digests[0])
        pairs = [self._pair(digests, made.invokes) for _ in range(self._options.repeats)]
        for number in range(distinct):
            self._engine.forget(f"adapter-{number}")
        return {
            "case": f"methods/{made.name}",
            "words": made.words,
            "method": entry.method,
            "disk_bytes": disk,
            "device_bytes": entry.device_bytes,
            "shared_bytes": shared,
            "distinct": distinct,
            **self._speeds([pair[1] for pair in pairs], [pair[0] for pair in pairs]),
        }

    def _speeds(self, own: list[Clock], base: list[Clock]) -> dict[str, object]:
        tokens = self._options.requests * self._options.new_tokens
        rate, base_rate = (median(tokens / clock.total_s for clock in clocks) for clocks in (own, base))
        step, base_step = (median(s for clock in clocks for s in clock.decode_s) for clocks in (own, base))
        return {
            "tokens_per_s": round(rate, 2),
            "base_tokens_per_s": round(base_rate, 2),
            "of_base": round(rate / base_rate, 3),
            "decode_ms": round(1e3 * step, 3),
            "base_decode_ms": round(1e3 * base_step, 3),
            "decode_of_base": round(base_step / step, 3),
        }

    def _register(self, variants: Variants, number: int) -> Digest:
        folder = self._folder / "variant"
        variants.write(folder, number)
        digest = self._engine.register(f"adapter-{number}", folder)
        shutil.rmtree(folder)
        return digest

    def _shared_bytes(self, digest: Digest) -> int:
        """Of the banks that this adapter, which is in the arena, refers to."""
        residency = self._engine.engine.residency
        lease = residency.acquire(digest)
        if lease is None:
            raise SystemExit(f"adapter memory: expected room for {digest}, got none: raise --adapter-memory-gib")
        residency.release(lease)
        return sum(bank.block.nbytes for bank in lease.banks)

    def _pair(self, digests: Sequence[Digest], invokes: tuple[int, ...]) -> tuple[Clock, Clock]:
        """The same requests on both engines, step by step in turn: whatever else the machine does hits both."""
        count, new_tokens = self._options.requests, self._options.new_tokens
        clocks = Clock(self._bare, count), Clock(self._engine, count)
        for clock, named in zip(clocks, ([None], digests), strict=True):
            clock.start(self._submits(named, new_tokens, invokes))
        while any([clock.step() for clock in clocks]):
            pass
        return clocks

    def _submits(
        self, digests: Sequence[Digest | None], new_tokens: int, invokes: tuple[int, ...] = ()
    ) -> list[Submit]:
        options = self._options
        prompts = workload.prompts(options.requests, options.prompt_tokens, self._bare.engine.backbone.vocabulary)
        return [
            Submit(
                RequestId(str(i)),
                (*invokes, *prompt[len(invokes) :]),
                new_tokens,
                adapter=digests[i % len(digests)],
            )
            for i, prompt in enumerate(prompts)
        ]

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


def _words(options: argparse.Namespace) -> str:
    tokens = f"{options.prompt_tokens} prompt tokens and {options.new_tokens} new tokens each, greedy"
    return f"{options.requests} requests at once, {tokens}; random weights of the {options.shape} shape"


def _report(options: argparse.Namespace, rows: list[dict[str, object]]) -> dict[str, object]:
    device = choose_device(options.device)
    what = (
        "tokens_per_s: new tokens over the time of prefill and decode; "
        "decode_ms: median step in which all requests decode; base and method step in turn"
    )
    return {
        "workload": f"{_words(options)}; {what}",
        "rounds": options.repeats,
        "dtype": str(choose_dtype(options.dtype, device)).removeprefix("torch."),
        "device": str(device),
        **record.circumstances(device),
        "rows": rows,
    }


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("disk", "disk_bytes", ","),
    ("device", "device_bytes", ","),
    ("shared", "shared_bytes", ","),
    ("distinct", "distinct", ","),
    ("decode ms", "decode_ms", ".1f"),
    ("base ms", "base_decode_ms", ".1f"),
    ("decode of base", "decode_of_base", ".2f"),
    ("tok/s of base", "of_base", ".2f"),
)


def _table(options: argparse.Namespace, rows: list[dict[str, object]]) -> Table:
    about = record.circumstances(choose_device(options.device))
    table = Table(title=_words(options), caption=f"{about['machine']}, {about['commit']}")
    table.add_column("method")
    table.add_column("what")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for row in rows:
        name = str(row["case"]).partition("/")[2]
        table.add_row(name, str(row["words"]), *(f"{row[key]:{form}}" for _, key, form in COLUMNS))
    return table
