"""A front process in a thread, over a real socket, with a fake engine in a real process; and how tests talk to it."""

import asyncio
import hashlib
import json
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.server.doors import fake_engine
from weft.proto.v1 import adapters_pb2, inference_pb2, server_pb2
from weft.server.config import ServerConfig
from weft.server.frontend import Frontend
from weft.server.supervisor import RestartPolicy

WAIT_S = 20.0
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are bytes, with one special token behind them."""
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def byte_alphabet() -> list[str]:
    """The characters that byte-level tokenizers write for the bytes 0 to 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(extra)) for byte in range(256)]


def make_backbone(folder: Path, tokenizer: bool = True) -> Path:
    """A model folder for the fake engine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commands").touch()
    if tokenizer:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def adapter_files(
    seed: int = 0, *, rank: int = 2, alpha: float = 4, site: str = fake_engine.SITE
) -> tuple[bytes, bytes]:
    """Config and weights of a small adapter as peft saves it."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [site.rsplit(".", 1)[-1]]}
    random = np.random.default_rng(seed)
    width = fake_engine.WIDTH
    weights = {
        f"base_model.model.{site}.lora_A.weight": random.standard_normal((rank, width), np.float32),
        f"base_model.model.{site}.lora_B.weight": random.standard_normal((width, rank), np.float32),
    }
    return json.dumps(config).encode(), save(weights)


Told = tuple[grpc.StatusCode, str, tuple[str, ...]]


@dataclass
class Refusal:
    """The status of a failed call, taken apart."""

    code: grpc.StatusCode
    text: str
    reason: str
    fields: tuple[str, ...]
    retry_after_s: float | None
    pushback_ms: str | None


def refused(call: Callable[[], object]) -> Told:
    """The code, reason and fields with which a call ends."""
    with pytest.raises(grpc.RpcError) as failed:
        call()
    told = refusal(failed.value)
    return told.code, told.reason, told.fields


def refusal(call: Any) -> Refusal:
    """Read the status of a call that ended badly."""
    trailing = dict(call.trailing_metadata() or ())
    rich = status_pb2.Status.FromString(trailing.get("grpc-status-details-bin", b""))
    reason, fields, retry = "", (), None
    for each in rich.details:
        info, bad, when = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if each.Unpack(info):
            assert info.domain == "weft"
            reason = info.reason
        elif each.Unpack(bad):
            fields = tuple(violation.field for violation in bad.field_violations)
        elif each.Unpack(when):
            retry = when.retry_delay.ToMilliseconds() / 1000
    if rich.details:
        assert rich.code == call.code().value[0]
        assert rich.message == call.details()
    return Refusal(call.code(), call.details(), reason, fields, retry, trailing.get("grpc-retry-pushback-ms"))


class Running:
    """A running front, seen from a caller."""

    def __init__(self, frontend: Frontend, loop: asyncio.AbstractEventLoop, grpc_address: str, metrics: str) -> None:
        self.frontend = frontend
        self.loop = loop
        self.address = grpc_address
        self.metrics_address = metrics
        self.metadata: list[tuple[str, str]] = []
        self.channel = self.connect()

    def connect(self, **options: Any) -> grpc.Channel:
        """A new connection."""
        return grpc.insecure_channel(self.address, options=list(options.items()))

    def unary(self, path: str, request: Message | bytes, answer: type[Message], timeout: float | None = WAIT_S) -> Any:
        """Call a unary RPC."""
        call = self.channel.unary_unary(path, response_deserializer=answer.FromString)
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        return call(raw, timeout=timeout, metadata=self.metadata)

    def generate(self, *, timeout: float | None = WAIT_S, **fields: Any) -> Any:
        """Call Generate; ``ids`` is short for a prompt of tokens."""
        request = make_request(**fields)
        return self.unary("/weft.v1.InferenceService/Generate", request, inference_pb2.GenerateResponse, timeout)

    def stream(self, *, timeout: float | None = WAIT_S, channel: grpc.Channel | None = None, **fields: Any) -> Any:
        """Call StreamGenerate; an iterator of events that can be cancelled."""
        request = inference_pb2.StreamGenerateRequest(request=make_request(**fields))
        call = (channel or self.channel).unary_stream(
            "/weft.v1.InferenceService/StreamGenerate",
            request_serializer=inference_pb2.StreamGenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.StreamGenerateResponse.FromString,
        )
        return call(request, timeout=timeout, metadata=self.metadata)

    def upload(self, parts: Iterable[adapters_pb2.RegisterAdapterRequest], timeout: float = WAIT_S) -> Any:
        """Call RegisterAdapter and return the call, which can be asked for its result."""
        call = self.channel.stream_unary(
            "/weft.v1.AdapterService/RegisterAdapter",
            request_serializer=adapters_pb2.RegisterAdapterRequest.SerializeToString,
            response_deserializer=adapters_pb2.RegisterAdapterResponse.FromString,
        )
        return call.future(iter(parts), timeout=timeout, metadata=self.metadata)

    def register(self, name: str, files: tuple[bytes, bytes] | None = None, **header: Any) -> Any:
        """Register an adapter and return it."""
        return self.upload(parts(name, files or adapter_files(), **header)).result().adapter

    def get(self, name: str) -> Any:
        """Call GetAdapter."""
        request = adapters_pb2.GetAdapterRequest(name=name)
        return self.unary("/weft.v1.AdapterService/GetAdapter", request, adapters_pb2.GetAdapterResponse).adapter

    def list_adapters(self, **fields: Any) -> Any:
        """Call ListAdapters."""
        request = adapters_pb2.ListAdaptersRequest(**fields)
        return self.unary("/weft.v1.AdapterService/ListAdapters", request, adapters_pb2.ListAdaptersResponse)

    def delete(self, name: str) -> Any:
        """Call DeleteAdapter."""
        request = adapters_pb2.DeleteAdapterRequest(name=name)
        return self.unary("/weft.v1.AdapterService/DeleteAdapter", request, adapters_pb2.DeleteAdapterResponse)

    def info(self) -> Any:
        """Call GetServerInfo."""
        request = server_pb2.GetServerInfoRequest()
        return self.unary("/weft.v1.ServerService/GetServerInfo", request, server_pb2.GetServerInfoResponse)

    @property
    def engine_pid(self) -> int:
        """The engine's process, 0 while there is none."""
        return self.frontend.supervisor.pid or 0

    def commands(self, kind: str = "") -> list[str]:
        """What the engine was told, as ``Kind id``."""
        lines = (Path(self.frontend.supervisor._config.model) / "commands").read_text().splitlines()
        return [line for line in lines if line.startswith(kind)]

    def aborts_next(self) -> Callable[[], str]:
        """Call before a request is sent; what it returns waits for that request and names its Abort."""
        before = len(self.commands("Submit"))

        def abort() -> str:
            until(lambda: len(self.commands("Submit")) > before)
            return self.commands("Submit")[before].replace("Submit", "Abort")

        return abort

    def scrape(self) -> dict[str, float]:
        """The metrics page as {sample with labels: value}."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=WAIT_S) as page:
            lines = [line for line in page.read().decode().splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def on_loop(self, work: Any) -> Any:
        """Run a coroutine in the front."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)


def make_request(ids: Sequence[int] = (), sampling: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A GenerateRequest."""
    if ids:
        fields["tokens"] = inference_pb2.TokenIds(ids=ids)
    if sampling is not None:
        fields["sampling"] = inference_pb2.SamplingParams(**sampling)
    return inference_pb2.GenerateRequest(**fields)


def parts(
    name: str, files: tuple[bytes, bytes], *, chunk_bytes: int = 1 << 20, **header: Any
) -> Iterator[adapters_pb2.RegisterAdapterRequest]:
    """An upload, piece by piece."""
    config, weights = files
    fields: dict[str, Any] = {"weights_size": len(weights), "weights_sha256": hashlib.sha256(weights).hexdigest()}
    fields |= header
    yield adapters_pb2.RegisterAdapterRequest(header=adapters_pb2.AdapterHeader(name=name, config=config, **fields))
    for at in range(0, len(weights), chunk_bytes):
        yield adapters_pb2.RegisterAdapterRequest(chunk=weights[at : at + chunk_bytes])


@contextmanager
def running(
    folder: Path, *, tokenizer: bool = True, policy: RestartPolicy | None = None, **options: Any
) -> Iterator[Running]:
    """Run a front over ``folder``, which keeps the backbone and the store."""
    config = ServerConfig(
        **{
            "model": str(make_backbone(folder / "backbone", tokenizer)),
            "store": str(folder / "store"),
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            **options,
        }
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="front")
    thread.start()
    try:
        frontend = asyncio.run_coroutine_threadsafe(_create(config, policy), loop).result(WAIT_S)
        try:
            addresses = asyncio.run_coroutine_threadsafe(frontend.start(), loop).result(WAIT_S)
            server = Running(frontend, loop, addresses.grpc, addresses.metrics)
            with server.channel:
                yield server
        finally:
            asyncio.run_coroutine_threadsafe(frontend.close(), loop).result(WAIT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _create(config: ServerConfig, policy: RestartPolicy | None) -> Frontend:
    frontend = Frontend(config, fake_engine.TARGET)
    if policy is not None:
        frontend.supervisor._policy = policy
    return frontend


def until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Wait for a condition."""
    waited = threading.Event()
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("the condition did not come true in time")
