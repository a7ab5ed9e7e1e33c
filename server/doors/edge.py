"""The edge: every byte that enters or leaves the server passes here, for our services and for the standard ones.

Handlers behind it are plain coroutines and generators over messages that raise the errors of ``weft.server.errors``.
The edge authenticates, decodes, encodes, counts, ends streams that nobody reads, and turns every exception into a
status: left to itself, grpc.aio sends the text of an unhandled exception to the caller.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode

from weft.server.doors.auth import Bearer
from weft.server.doors.status import Verdict, verdict
from weft.server.errors import AnswerTooLarge, DeadlineExceeded, MalformedMessage, SlowConsumer
from weft.server.metrics import Metrics

logger = logging.getLogger(__name__)

# in either direction
MESSAGE_BYTES_MAX = 4 << 20
# time that the status gets to reach a caller who does not read
FAREWELL_S = 1.0

Metadata = Sequence[tuple[str, str | bytes]]


class Context(Protocol):
    """What the edge uses of ``grpc.aio.ServicerContext``."""

    def invocation_metadata(self) -> Metadata | None: ...
    def time_remaining(self) -> float | None: ...
    async def write(self, message: bytes) -> None: ...
    async def abort(self, code: StatusCode, details: str, trailing_metadata: Metadata) -> None: ...


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler knows of its call besides the message: seconds until the caller gives up, None for never."""

    remaining_s: float | None

    def time_s(self, longest_s: float) -> float:
        """Seconds that the call may take, ``longest_s`` at most; raises DeadlineExceeded when none are left."""
        if self.remaining_s is None:
            return longest_s
        if self.remaining_s <= 0:
            raise DeadlineExceeded(f"expected a deadline that lies ahead, got one {-self.remaining_s:g} s ago")
        return min(longest_s, self.remaining_s)


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: its path as callers name it, the class of its requests, and whether a token is asked."""

    path: str
    request: type[Message]
    guarded: bool

    def decode(self, raw: bytes) -> Message:
        """Parse one message; bytes that are not one are the caller's mistake."""
        try:
            return self.request.FromString(raw)
        except DecodeError:
            expected = self.request.DESCRIPTOR.full_name
            raise MalformedMessage(f"expected a serialized {expected}, got {len(raw)} other bytes") from None

    async def decode_all(self, raw: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        """Parse a stream, one message when it is asked for."""
        async for each in raw:
            yield self.decode(each)


def encoded(message: Message) -> bytes:
    """Serialize an answer, unless it is larger than grpc would send."""
    raw = message.SerializeToString()
    if len(raw) > MESSAGE_BYTES_MAX:
        raise AnswerTooLarge(f"expected an answer of at most {MESSAGE_BYTES_MAX} bytes, got {len(raw)}; ask for less")
    return raw


def paths(services: Sequence[ServiceDescriptor]) -> tuple[str, ...]:
    """All RPCs of these services as ``service/method``."""
    return tuple(f"{service.full_name}/{method.name}" for service in services for method in service.methods)


class Edge:
    """Wraps handlers for grpc.aio."""

    def __init__(self, metrics: Metrics, bearer: Bearer | None, write_stall_s_max: float) -> None:
        self._metrics = metrics
        self._bearer = bearer
        self._write_stall_s_max = write_stall_s_max

    def handlers(self, service: ServiceDescriptor, servicer: object, *, guarded: bool = True) -> object:
        """Return grpc's handler for a whole service; ``servicer`` has one attribute per RPC, named like it."""
        methods: Mapping[str, object] = {
            each.name: self._handler(each, getattr(servicer, each.name), guarded) for each in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def _handler(self, descriptor: MethodDescriptor, handle: Callable[..., Any], guarded: bool) -> object:
        path = f"{descriptor.containing_service.full_name}/{descriptor.name}"
        method = Method(path, GetMessageClass(descriptor.input_type), guarded)
        if descriptor.server_streaming:
            self._metrics.streaming(path, 0)
        # no (de)serializers: grpc.aio answers UNKNOWN and the exception's text when they fail
        if descriptor.client_streaming and descriptor.server_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream_stream(method, handle))
        if descriptor.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._stream_unary(method, handle))
        if descriptor.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._unary_stream(method, handle))
        return grpc.unary_unary_rpc_method_handler(self._unary_unary(method, handle))

    def _unary_unary(
        self, method: Method, handle: Callable[[Message, Call], Awaitable[Message]]
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def call(raw: bytes, context: Context) -> bytes:
            async with self._guard(method, context) as this:
                return encoded(await handle(method.decode(raw), this))
            raise AssertionError("a failed call was aborted")

        return call

    def _unary_stream(
        self, method: Method, handle: Callable[[Message, Call], AsyncGenerator[Message, None]]
    ) -> Callable[[bytes, Context], Awaitable[None]]:
        async def call(raw: bytes, context: Context) -> None:
            async with self._guard(method, context) as this:
                await self._send(method, handle(method.decode(raw), this), context)

        return call

    def _stream_unary(
        self, method: Method, handle: Callable[[AsyncIterator[Message], Call], Awaitable[Message]]
    ) -> Callable[[AsyncIterator[bytes], Context], Awaitable[bytes]]:
        async def call(raw: AsyncIterator[bytes], context: Context) -> bytes:
            async with self._guard(method, context) as this:
                return encoded(await handle(method.decode_all(raw), this))
            raise AssertionError("a failed call was aborted")

        return call

    def _stream_stream(
        self, method: Method, handle: Callable[[AsyncIterator[Message], Call], AsyncGenerator[Message, None]]
    ) -> Callable[[AsyncIterator[bytes], Context], Awaitable[None]]:
        async def call(raw: AsyncIterator[bytes], context: Context) -> None:
            async with self._guard(method, context) as this:
                await self._send(method, handle(method.decode_all(raw), this), context)

        return call

    async def _send(self, method: Method, messages: AsyncGenerator[Message, None], context: Context) -> None:
        """Write a handler's messages; whoever does not read them for too long loses the stream."""
        async with self._counted(method), aclosing(messages):
            async for message in messages:
                try:
                    async with asyncio.timeout(self._write_stall_s_max):
                        await context.write(encoded(message))
                except TimeoutError:
                    limit = self._write_stall_s_max
                    raise SlowConsumer(f"expected the stream to be read, got nothing read for {limit:g} s") from None

    @asynccontextmanager
    async def _counted(self, method: Method) -> AsyncIterator[None]:
        self._metrics.streaming(method.path, +1)
        try:
            yield
        finally:
            self._metrics.streaming(method.path, -1)

    @asynccontextmanager
    async def _guard(self, method: Method, context: Context) -> AsyncIterator[Call]:
        """Authenticate, count, and end the call with a status whatever happens inside."""
        began_s = time.monotonic()
        code = StatusCode.OK
        end: Verdict | None = None
        self._metrics.rpc_started(method.path)
        try:
            if method.guarded and self._bearer is not None:
                self._bearer.check(context.invocation_metadata() or ())
            yield Call(context.time_remaining())
        except asyncio.CancelledError:
            remaining_s = context.time_remaining()
            late = remaining_s is not None and remaining_s <= 0
            code = StatusCode.DEADLINE_EXCEEDED if late else StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001  the one crash guard of the gRPC edge
            end = self._judge(error, method)
            code = end.code
        finally:
            # before the caller knows: whoever asks next sees it counted
            self._metrics.rpc_completed(method.path, code, time.monotonic() - began_s)
        if end is not None:
            await abort(context, end)

    def _judge(self, error: Exception, method: Method) -> Verdict:
        """What the caller is told, counted and logged."""
        end = verdict(error)
        self._metrics.error(end.code, end.reason)
        if end.code is StatusCode.INTERNAL:
            logger.error("%s: %s", method.path, end.text, exc_info=error)
        else:
            logger.debug("%s: %s %s: %s", method.path, end.code.name, end.reason, end.text)
        return end


async def abort(context: Context, end: Verdict) -> None:
    """End the call with a status; raises grpc's AbortError, which grpc wants to see."""
    try:
        async with asyncio.timeout(FAREWELL_S):
            await context.abort(end.code, end.text, end.metadata)
    except TimeoutError:
        # grpc holds the status until the caller reads what lies before it; nothing of ours waits for that
        raise asyncio.CancelledError from None
