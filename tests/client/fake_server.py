"""A server that keeps the contract with canned answers, on a real socket in a thread of its own.

What a generation does is said by its prompt, so that each test reads by itself.
"""

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from weft.proto.v1 import adapters_pb2, common_pb2, inference_pb2, server_pb2

WAIT_S = 10.0


@dataclass
class Refusal:
    """A status with the details that the real server sends."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str = ""
    retry_after_s: float | None = None

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        details = [error_details_pb2.ErrorInfo(reason=self.reason, domain="weft")]
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(int(self.retry_after_s * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for each in details:
            box = any_pb2.Any()
            box.Pack(each)
            status.details.append(box)
        return (("grpc-status-details-bin", status.SerializeToString()),)


NOT_FOUND = Refusal(grpc.StatusCode.NOT_FOUND, "no adapter named 'ghost'", "ADAPTER_NOT_FOUND")
EXISTS = Refusal(grpc.StatusCode.ALREADY_EXISTS, "name 'fr-legal' already points to other bytes", "ADAPTER_EXISTS")
BAD_TOP_P = Refusal(
    grpc.StatusCode.INVALID_ARGUMENT,
    "top_p must be in (0, 1], got 2",
    "INVALID_REQUEST",
    field="sampling.top_p",
)
OVERLOADED = Refusal(grpc.StatusCode.UNAVAILABLE, "the queue is full", "OVERLOADED", retry_after_s=1.5)
BAD_TOKEN = Refusal(grpc.StatusCode.UNAUTHENTICATED, "expected the bearer token", "CREDENTIALS_INVALID")
SHORT = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "expected the announced bytes", "UPLOAD_INVALID")
DATA_DAMAGED = Refusal(grpc.StatusCode.DATA_LOSS, "stored bytes changed", "ADAPTER_CORRUPT")


def make_adapter(name: str, method: str = "LORA", **values: Any) -> common_pb2.Adapter:
    """An adapter as the server would report it."""
    site = common_pb2.SiteReport(
        module="model.layers.0.self_attn.q_proj",
        operators=["low_rank r=8"],
        rank=8,
        bytes=2048,
        folds=["alpha/sqrt(r)"],
    )
    standard: dict[str, Any] = {
        "dialect": "peft",
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "disk_bytes": 3_500_000,
        "device_bytes": 2_097_152,
        "site_count": 1,
        "state": common_pb2.ADAPTER_STATE_ACTIVE,
        "create_time_ms": 1_790_000_000_000,
        "sites": [site],
    }
    return common_pb2.Adapter(name=name, method=method, **standard | values)


@dataclass
class Upload:
    """What one RegisterAdapter call brought."""

    header: adapters_pb2.AdapterHeader
    chunks: list[bytes] = field(default_factory=list)


class FakeServer:
    """Start with ``with FakeServer() as server``; ``server.address`` is where it listens."""

    def __init__(self, *, token: str = "", credentials: grpc.ServerCredentials | None = None) -> None:
        self.address = ""
        self.token = token
        self.adapters: dict[str, common_pb2.Adapter] = {}
        self.uploads: list[Upload] = []
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.calls: Counter[str] = Counter()
        self.failures: dict[str, list[Refusal]] = {}
        self.serving = True
        self.page_size_max = 1000
        self.cancelled = threading.Event()
        self._credentials = credentials
        self._up: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "FakeServer":
        self._thread.start()
        self._up.result(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server()
        for each in self._handlers():
            server.add_generic_rpc_handlers((each,))
        if self._credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", self._credentials)
        self.address = f"127.0.0.1:{port}"
        await server.start()
        self._up.set_result(None)
        await self._stop.wait()
        await server.stop(0)

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        unary, answers = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        table: dict[str, dict[str, tuple[Callable[..., Any], Callable[..., Any], Any]]] = {
            "weft.v1.InferenceService": {
                "Generate": (unary, self.generate, inference_pb2.GenerateRequest),
                "StreamGenerate": (answers, self.stream, inference_pb2.StreamGenerateRequest),
            },
            "weft.v1.AdapterService": {
                "RegisterAdapter": (
                    grpc.stream_unary_rpc_method_handler,
                    self.register,
                    adapters_pb2.RegisterAdapterRequest,
                ),
                "GetAdapter": (unary, self.get, adapters_pb2.GetAdapterRequest),
                "ListAdapters": (unary, self.list, adapters_pb2.ListAdaptersRequest),
                "DeleteAdapter": (unary, self.delete, adapters_pb2.DeleteAdapterRequest),
            },
            "weft.v1.ServerService": {"GetServerInfo": (unary, self.info, server_pb2.GetServerInfoRequest)},
            "grpc.health.v1.Health": {"Check": (unary, self.check, health_pb2.HealthCheckRequest)},
        }
        return [
            grpc.method_handlers_generic_handler(
                service,
                {
                    name: make(
                        handle,
                        request_deserializer=request.FromString,
                        response_serializer=lambda message: message.SerializeToString(),
                    )
                    for name, (make, handle, request) in methods.items()
                },
            )
            for service, methods in table.items()
        ]

    async def _enter(self, name: str, context: Any) -> None:
        """Count the call, check its token, and fail it if the test asked for that."""
        self.calls[name] += 1
        sent = dict(context.invocation_metadata() or ()).get("authorization", "")
        if self.token and sent != f"Bearer {self.token}":
            await refuse(context, BAD_TOKEN)
        if self.failures.get(name):
            await refuse(context, self.failures[name].pop(0))

    async def generate(self, request: inference_pb2.GenerateRequest, context: Any) -> Any:
        await self._enter("Generate", context)
        self.requests.append(request)
        await self._refuse_generation(request, context)
        if request.text == "slow":
            await self._forever()
        text = answer(request)
        return inference_pb2.GenerateResponse(
            started=self._started(request),
            text=text,
            token_ids=[ord(each) for each in text],
            reason=_reason(9 if request.text == "odd reason" else 1),
            usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=len(text)),
        )

    async def stream(self, request: inference_pb2.StreamGenerateRequest, context: Any) -> AsyncIterator[Any]:
        await self._enter("StreamGenerate", context)
        inner = request.request
        self.requests.append(inner)
        await self._refuse_generation(inner, context)
        event = inference_pb2.StreamGenerateResponse
        yield event(started=self._started(inner))
        if inner.text == "endless":
            try:
                while True:
                    yield event(delta=inference_pb2.Delta(text="x", token_ids=[120]))
                    await asyncio.sleep(0.01)
            finally:
                self.cancelled.set()
        text = answer(inner)
        for each in text:
            ids = [ord(each)]
            yield event(delta=inference_pb2.Delta(text="" if inner.text == "no tokenizer" else each, token_ids=ids))
        if inner.text == "late failure":
            await refuse(context, DATA_DAMAGED)
        if inner.text == "cut":
            return
        if inner.text == "odd event":
            yield event()
        usage = inference_pb2.Usage(prompt_tokens=3, completion_tokens=len(text))
        yield event(finished=inference_pb2.Finished(reason=inference_pb2.FINISH_REASON_LENGTH, usage=usage))

    async def _refuse_generation(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        if request.adapter and request.adapter not in self.adapters:
            await refuse(context, NOT_FOUND)
        if request.sampling.top_p > 1:
            await refuse(context, BAD_TOP_P)

    async def _forever(self) -> None:
        try:
            await asyncio.sleep(WAIT_S * 10)
        finally:
            self.cancelled.set()

    def _started(self, request: inference_pb2.GenerateRequest) -> inference_pb2.Started:
        return inference_pb2.Started(
            request_id=request.request_id or "made-up",
            adapter_digest=self.adapters[request.adapter].digest if request.adapter else "",
            prompt_tokens=3,
            effective=inference_pb2.EffectiveParams(max_new_tokens=16, temperature=0.7, top_p=1, seed=5),
        )

    async def register(self, messages: AsyncIterator[Any], context: Any) -> Any:
        await self._enter("RegisterAdapter", context)
        upload = Upload((await anext(messages)).header)
        self.uploads.append(upload)
        name = upload.header.name
        if name == "stalled":
            await self._forever()
        if name in self.adapters and not upload.header.replace:
            await refuse(context, EXISTS)
        async for message in messages:
            upload.chunks.append(message.chunk)
        weights = b"".join(upload.chunks)
        if hashlib.sha256(weights).hexdigest() != upload.header.weights_sha256:
            await refuse(context, SHORT)
        self.adapters[name] = make_adapter(name, disk_bytes=len(weights) + len(upload.header.config))
        return adapters_pb2.RegisterAdapterResponse(adapter=self.adapters[name])

    async def get(self, request: adapters_pb2.GetAdapterRequest, context: Any) -> Any:
        await self._enter("GetAdapter", context)
        if request.name not in self.adapters:
            await refuse(context, NOT_FOUND)
        return adapters_pb2.GetAdapterResponse(adapter=self.adapters[request.name])

    async def list(self, request: adapters_pb2.ListAdaptersRequest, context: Any) -> Any:
        await self._enter("ListAdapters", context)
        found = [
            each
            for name, each in sorted(self.adapters.items())
            if name > request.page_token and request.method in ("", each.method)
        ]
        size = min(request.page_size, self.page_size_max)
        page = []
        for each in found[:size]:
            listed = common_pb2.Adapter()
            listed.CopyFrom(each)
            listed.ClearField("sites")
            page.append(listed)
        token = page[-1].name if len(found) > size else ""
        return adapters_pb2.ListAdaptersResponse(adapters=page, next_page_token=token)

    async def delete(self, request: adapters_pb2.DeleteAdapterRequest, context: Any) -> Any:
        await self._enter("DeleteAdapter", context)
        if request.name not in self.adapters:
            await refuse(context, NOT_FOUND)
        del self.adapters[request.name]
        return adapters_pb2.DeleteAdapterResponse()

    async def info(self, request: server_pb2.GetServerInfoRequest, context: Any) -> Any:
        await self._enter("GetServerInfo", context)
        return server_pb2.GetServerInfoResponse(
            version="0.1.0",
            backbone=server_pb2.Backbone(
                name="weft-demo", digest="ab" * 32, family="llama", parameters=800_000, dtype="float32", vocabulary=100
            ),
            limits=server_pb2.Limits(upload_bytes_max=1 << 31, uploads_max=4),
            runtime=server_pb2.Runtime(device="cpu", kernels="torch", versions={"torch": "2.13.0"}),
            memory=server_pb2.Memory(backbone_bytes=3_200_000, adapters_bytes=512_000, adapters_resident=12),
            methods=["LORA", "IA3"],
        )

    async def check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        await self._enter("Check", context)
        assert request.service == "weft.v1.InferenceService"
        kinds = health_pb2.HealthCheckResponse
        return kinds(status=kinds.SERVING if self.serving else kinds.NOT_SERVING)


def _reason(number: int) -> inference_pb2.FinishReason:
    """A finish reason, of a later version of the contract for all we know."""
    return cast(inference_pb2.FinishReason, number)


def answer(request: inference_pb2.GenerateRequest) -> str:
    """What is generated: the prompt backwards."""
    if request.HasField("chat"):
        return request.chat.messages[-1].content[::-1]
    return request.text[::-1] or "".join(chr(each) for each in reversed(request.tokens.ids))


async def refuse(context: Any, refusal: Refusal) -> None:
    """End the call with this status."""
    await context.abort(refusal.code, refusal.message, refusal.metadata())
