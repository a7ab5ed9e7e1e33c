"""`weft bench decode`: new tokens per second of one batch, base and with adapters, on a random model of a real shape.

Cases run in turn, round after round, so that whatever else the machine does hits all of them; medians are reported.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from weft.bench import record, workload
from weft.server.backbone.load import choose_device, choose_dtype, moved
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine

BASELINE = "base"


@dataclass(frozen=True, slots=True)
class Case:
    """Something to time: one call answers ``tokens`` new tokens in all."""

    name: str
    words: str
    run: Callable[[], None]
    tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its table, and write its JSON where asked."""
    options = _options(argv)
    console = Console(stderr=options.json)
    with tempfile.TemporaryDirectory() as folder:
        cases = _weft_cases(options, Path(folder))
        if options.peer == "peft":
            from weft.bench.peer_peft import cases as peer_cases

            cases += peer_cases(options, Path(folder))
        rates = _measure(cases, options.repeats, console)
    report = _report(options, cases, rates)
    if options.out:
        record.write(Path(options.out), report)
    if options.json:
        Console(soft_wrap=True).print_json(data=report)
    else:
        _print(console, options, cases, rates)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="weft bench decode", description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m", help="smollm2-135m, or a folder or hub name")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--requests", type=int, default=16, help="requests in the batch")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16, help="rank of the low-rank adapters, on all linears")
    parser.add_argument("--adapter-memory-gib", type=int, default=2, help="arena of the engine that has adapters")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; every case runs once in each")
    parser.add_argument("--peer", choices=("none", "peft"), default="none", help="time this library in the same run")
    parser.add_argument("--out", default="", help="file for the JSON report")
    parser.add_argument("--json", action="store_true", help="print the JSON report instead of a table")
    return parser.parse_args(argv)


def _weft_cases(options: argparse.Namespace, folder: Path) -> list[Case]:
    bare, engine = _engine(options, folder / "bare"), _engine(options, folder / "store")
    sites = workload.body_sites(engine.engine.backbone.info)
    count, third = options.requests, -(-options.requests // 3)
    folders = {
        **{f"low{i}": workload.write_low_rank(folder / f"low{i}", sites, options.rank, i) for i in range(count)},
        **{f"kron{i}": workload.write_kron(folder / f"kron{i}", sites, i) for i in range(third)},
        **{f"scale{i}": workload.write_scale(folder / f"scale{i}", sites, i) for i in range(third)},
    }
    digests = {name: engine.register(name, made) for name, made in folders.items()}
    low: list[Digest | None] = [digests[f"low{i}"] for i in range(count)]
    mixed: list[Digest | None] = [digests[f"{kind}{i}"] for i in range(third) for kind in ("low", "kron", "scale")]
    cases = [
        Case(BASELINE, "an engine that has no adapter", *_batch(options, bare, [None])),
        Case("unused", f"{len(digests)} adapters registered, none named", *_batch(options, engine, [None])),
        Case("one", "one LoRA for all requests", *_batch(options, engine, low[:1])),
        Case("distinct", f"{count} distinct LoRA", *_batch(options, engine, low)),
    ]
    if count >= len(("low", "kron", "scale")):
        cases.append(Case("mixed", "LoRA, KronA and (IA)³ by turns, all distinct", *_batch(options, engine, mixed)))
    for case in cases:
        case.run()
    resident, wanted = engine.engine.stats().adapters_resident, len({*low, *mixed[:count]})
    if resident < wanted:
        raise SystemExit(f"adapters resident: expected {wanted}, got {resident}: raise --adapter-memory-gib")
    return cases


def _engine(options: argparse.Namespace, store: Path) -> OfflineEngine:
    device = choose_device(options.device)
    model = workload.random_model(workload.shape(options.shape), choose_dtype(options.dtype, device))
    memory = options.adapter_memory_gib << 30
    config = EngineConfig(
        model=options.shape,
        store=str(store),
        device=options.device,
        adapter_memory_bytes_max=memory,
        working_set_bytes_max=4 * memory,
    )
    return OfflineEngine(config, Backbone(moved(model, device)))


def _batch(
    options: argparse.Namespace, engine: OfflineEngine, adapters: Sequence[Digest | None]
) -> tuple[Callable[[], None], int]:
    """What a case runs, all requests at once, and how many tokens that makes."""
    prompts = workload.prompts(options.requests, options.prompt_tokens, engine.engine.backbone.vocabulary)
    submits = [
        Submit(RequestId(str(i)), prompt, options.new_tokens, adapter=adapters[i % len(adapters)])
        for i, prompt in enumerate(prompts)
    ]
    return lambda: _discard(engine.run(submits)), options.requests * options.new_tokens


def _discard(_: object) -> None:
    return None


def _measure(cases: Sequence[Case], repeats: int, console: Console) -> dict[str, list[float]]:
    """Tokens per second of every case in every round, after one round to warm up."""
    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    for round_ in track(range(repeats + 1), "measuring", console=console, transient=True):
        for case in cases:
            started = time.perf_counter()
            case.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ > 0:
                rates[case.name].append(case.tokens / (time.perf_counter() - started))
    return rates


def _workload_words(options: argparse.Namespace) -> str:
    tokens = f"{options.prompt_tokens} prompt tokens and {options.new_tokens} new tokens each, greedy"
    adapters = f"random weights of the {options.shape} shape, rank {options.rank} on all linears"
    return f"{options.requests} requests at once, {tokens}; {adapters}; new tokens over the time of prefill and decode"


def _report(options: argparse.Namespace, cases: Sequence[Case], rates: dict[str, list[float]]) -> dict[str, object]:
    rows = [
        {
            "case": f"decode/{case.name}",
            "words": case.words,
            "metric": "tokens_per_s",
            **record.summary(rates[case.name]),
            "of_base": round(record.summary(rates[case.name])["p50"] / record.summary(rates[BASELINE])["p50"], 3),
        }
        for case in cases
    ]
    device = choose_device(options.device)
    return {
        "workload": _workload_words(options),
        "rounds": options.repeats,
        "dtype": str(choose_dtype(options.dtype, device)).removeprefix("torch."),
        "device": str(device),
        "kernels": "triton" if device.type == "cuda" else "torch",
        **record.circumstances(device),
        "rows": rows,
    }


def _print(console: Console, options: argparse.Namespace, cases: Sequence[Case], rates: dict[str, list[float]]) -> None:
    about = record.circumstances(choose_device(options.device))
    table = Table(title=f"tokens/s — {_workload_words(options)}", caption=f"{about['machine']}, {about['commit']}")
    for column in ("case", "what", "tok/s", "p20–p80", "of base"):
        table.add_column(column, justify="left" if column in ("case", "what") else "right")
    base = record.summary(rates[BASELINE])["p50"]
    for case in cases:
        found = record.summary(rates[case.name])
        spread = f"{found['p20']:.0f}–{found['p80']:.0f}"
        table.add_row(case.name, case.words, f"{found['p50']:.0f}", spread, f"{found['p50'] / base:.2f}")
    console.print(table)
