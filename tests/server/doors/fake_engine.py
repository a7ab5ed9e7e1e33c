"""An engine process without a model: it keeps the contract of messages and does what the prompt's first token says.

The folder given as model is where tests and this process meet: ``commands`` is the list of what arrived, and files
named like the constants below change how the process starts.
"""

import json
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from weft.adapters_store.report import AdapterReport, SiteSummary
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import (
    Abort,
    Command,
    Digest,
    EngineInfo,
    Event,
    Failed,
    Failure,
    FinishReason,
    Forget,
    Prepare,
    Prepared,
    Ready,
    Refused,
    RequestId,
    Sampling,
    Scheduled,
    Shutdown,
    StartFailed,
    StepStats,
    Submit,
    Tokens,
)

TARGET = "tests.server.doors.fake_engine:main"

# files in the model folder
DIE_AT_START, FAIL_AT_START, BACKBONE_DIGEST, REFUSES = "die_at_start", "fail_at_start", "digest", "refuses"
SLOW_START = "slow_start"
LONG_CONTEXT, LONG_CONTEXT_TOKENS = "long_context", 10_000_000

# first tokens of prompts
WAIT = 900  # stay in the queue
HANG = 901  # leave the queue and be silent
DIE = 902  # end the process after two tokens
BURST = 903  # thousands of tokens a step
BYTES = 904  # repeat the rest of the prompt as the completion
FAIL = 910  # FAIL + i fails with the i-th failure after two tokens
FAILURES = tuple(Failure)

# values of lora_alpha
REFUSE, TOO_LARGE, NEVER, DIE_ON_PREPARE, CORRUPT = 666, 667, 668, 669, 670

VOCABULARY, CONTEXT, EOS = 1000, 512, 256
SITE = "model.layers.0.self_attn.q_proj"
WIDTH = 8
BURST_TOKENS = 2000


@dataclass
class Request:
    """Where one request is."""

    submit: Submit
    made: int = 0
    scheduled: bool = False

    @property
    def stuck(self) -> bool:
        """A prompt that ends with HANG never quite finishes."""
        return self.submit.prompt[-1] == HANG and self.made == self.submit.max_new_tokens - 1


def token(submit: Submit, index: int) -> int:
    """What the fake generates: the alphabet, in capitals with an adapter."""
    if submit.prompt[0] == BYTES:
        return submit.prompt[1 + index % (len(submit.prompt) - 1)]
    return ord("A" if submit.adapter else "a") + index % 26


def info(config: EngineConfig) -> EngineInfo:
    """What the fake is."""
    named = Path(config.model) / BACKBONE_DIGEST
    digest = named.read_text() if named.exists() else "b" * 64
    width = WIDTH if digest[0] == "b" else 2 * WIDTH
    catalogue = CatalogueInfo(
        digest=digest,
        dtype="float32",
        sites=(SiteInfo(SITE, width, width, False, "linear"),),
        groups=(1,),
        modules=frozenset({SITE}),
    )
    return EngineInfo(
        family="fake",
        parameters=123,
        dtype="float32",
        vocabulary=VOCABULARY,
        context_tokens=LONG_CONTEXT_TOKENS if (Path(config.model) / LONG_CONTEXT).exists() else CONTEXT,
        eos_ids=(EOS,),
        default_sampling=Sampling(temperature=0.5, top_k=7, top_p=0.75),
        device="cpu",
        kernels="torch",
        notes=("top_k=7 is odd",),
        versions={"python": "3"},
        catalogue=catalogue,
        kv_bytes_max=config.kv_bytes_max,
        adapter_bytes_max=config.adapter_memory_bytes_max,
    )


def report() -> AdapterReport:
    """What every adapter compiles to."""
    return AdapterReport("LORA", "peft", 512, (SiteSummary(SITE, ("low_rank r=2",), 2, 256),), ("a note",))


class FakeEngine:
    """Requests in, events out."""

    def __init__(self, config: EngineConfig) -> None:
        self.requests: dict[RequestId, Request] = {}
        self.log = (Path(config.model) / "commands").open("a", buffering=1)
        self.objects = Path(config.store) / "objects"
        # a file with a digest that is refused, and for which failure
        self.refuses = Path(config.model) / REFUSES

    def handle(self, command: Command) -> list[Event]:
        """Take a command."""
        what = getattr(command, "id", None) or getattr(command, "digest", "")
        self.log.write(f"{type(command).__name__} {what}\n")
        match command:
            case Submit():
                self.requests[command.id] = Request(command)
            case Abort():
                self.requests.pop(command.id, None)
            case Prepare():
                return self.prepare(command.digest)
            case Forget() | Shutdown():
                pass
        return []

    def prepare(self, digest: Digest) -> list[Event]:
        """Judge an adapter by its alpha."""
        refused, _, failure = self.refuses.read_text().partition(" ") if self.refuses.exists() else ("", "", "")
        if refused == digest:
            return [Refused(digest, Failure(failure or "adapter_invalid"), "not any more")]
        config = json.loads((self.objects / digest / "adapter_config.json").read_text())
        match config["lora_alpha"]:
            case 666:
                return [Refused(digest, Failure.ADAPTER_INVALID, "lora_alpha: expected another, got 666", "lora_alpha")]
            case 667:
                return [Refused(digest, Failure.ADAPTER_TOO_LARGE, "adapter needs 9 MiB, got 1 MiB")]
            case 668:
                return []
            case 669:
                os._exit(9)
            case 670:
                return [Refused(digest, Failure.BUG, "secret detail of the engine")]
        return [Prepared(digest, report())]

    def step(self) -> list[Event]:
        """One more token for everybody."""
        events: list[Event] = []
        rows = len(self.requests)
        for request in list(self.requests.values()):
            first = request.submit.prompt[0]
            if first == WAIT:
                continue
            if not request.scheduled:
                request.scheduled = True
                events.append(Scheduled(request.submit.id, 0.001, 0.0))
            if first != HANG and not request.stuck:
                events.append(self.advance(request, first))
        if events:
            events.append(self.stats(rows))
        return events

    def advance(self, request: Request, first: int) -> Event:
        """The next token or the end of a request."""
        submit = request.submit
        if request.made == 2 and first == DIE:
            os._exit(7)
        if request.made == 2 and FAIL <= first < FAIL + len(FAILURES):
            del self.requests[submit.id]
            return Failed(submit.id, FAILURES[first - FAIL], "what the engine says")
        many = first == BURST or len(submit.prompt) > BURST_TOKENS
        left = submit.max_new_tokens - request.made - (submit.prompt[-1] == HANG)
        count = min(BURST_TOKENS if many else 1, left)
        tokens = tuple(token(submit, request.made + i) for i in range(count))
        request.made += count
        finish = FinishReason.LENGTH if request.made == submit.max_new_tokens else None
        if tokens[-1] in submit.stop_ids:
            finish = FinishReason.STOP
        if finish is not None:
            del self.requests[submit.id]
        return Tokens(submit.id, tokens, finish)

    def stats(self, rows: int = 0) -> StepStats:
        """Made-up figures that tests recognise."""
        return StepStats(
            step_s=0.001,
            rows=rows,
            distinct_adapters=1,
            kv_bytes=1 << 20,
            backbone_bytes=5000,
            adapters_bytes=512,
            adapters_resident=1,
            working_set_bytes=64,
            adapter_loads=1,
            adapter_load_s=(0.01,),
        )


def main(connection: Connection, config: EngineConfig) -> None:
    """The process."""
    folder = Path(config.model)
    if (folder / DIE_AT_START).exists():
        os._exit(5)
    if (folder / FAIL_AT_START).exists():
        connection.send(StartFailed("dtype must be float32, got something else"))
        return
    if (folder / SLOW_START).exists():
        time.sleep(60)
    engine = FakeEngine(config)
    connection.send(Ready(info(config)))
    connection.send([engine.stats()])
    try:
        serve(connection, engine)
    except (EOFError, OSError):
        return


def serve(connection: Connection, engine: FakeEngine) -> None:
    """Take commands and step until told to stop."""
    while True:
        events: list[Event] = []
        while connection.poll(0.001 if engine.requests else 0.05):
            command = connection.recv()
            if isinstance(command, Shutdown):
                return
            events += engine.handle(command)
            if events or engine.requests:
                break
        events += engine.step()
        if events:
            connection.send(events)
        time.sleep(0)
