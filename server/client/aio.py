"""The client for asyncio. Belongs to the event loop that it is first used in."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import cached_property
from os import PathLike
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from weft.client import results
from weft.client.connection import (
    CONTROL_TIMEOUT_S,
    DEFAULT_ADDRESS,
    HEALTH_POLL_S,
    HEALTH_REQUEST,
    PAGE_SIZE,
    Calls,
    Tls,
    call_metadata,
    channel_options,
    is_serving,
    not_ready,
    sync_channel,
)
from weft.client.errors import DeadlineExceeded, Unavailable, WeftError, not_understood, weft_errors
from weft.client.requests import GenerateOptions, Prompt, generate_request
from weft.client.upload import PROGRESS_S, Progress, Sending, read_folder
from weft.client.values import Adapter, Completion, Event, Finished, ServerInfo
from weft.proto.v1 import adapters_pb2, inference_pb2, server_pb2


class AsyncStream(AsyncIterator[Event]):
    """The events of one generation as they come. Closing it, or dropping it, ends the generation on the server."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._finished = False

    async def __anext__(self) -> Event:
        if self._call is None:
            raise StopAsyncIteration
        try:
            with weft_errors():
                message = await self._call.read()
            if message is not grpc.aio.EOF:
                event = results.event(message)
                self._finished = isinstance(event, Finished)
                return event
        except BaseException:
            await self.aclose()
            raise
        self._call = None
        if not self._finished:
            raise not_understood("expected a stream to end with finished, got its end")
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the generation on the server if it still runs; the stream is at its end then."""
        self._cancel()

    def _cancel(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # the server would generate to the end for nobody
        self._cancel()


class AsyncClient:
    """A connection to one server; the methods are those of ``Client``, to be awaited.

    address  ``HOST:PORT``
    tls      what to trust and show; None talks plain text
    token    bearer token to send with every call
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, tls: Tls | None = None, token: str = "") -> None:
        self.address = address
        self._tls = tls
        self._metadata = call_metadata(token)

    @cached_property
    def _channel(self) -> Any:
        # made on first use: gRPC ties a channel to the loop that runs when it is made
        options = channel_options(self.address)
        if self._tls is None:
            return grpc.aio.insecure_channel(self.address, options)
        return grpc.aio.secure_channel(self.address, self._tls.credentials(), options)

    @cached_property
    def _calls(self) -> Calls:
        return Calls(self._channel)

    @cached_property
    def _upload_channel(self) -> grpc.Channel:
        # grpc.aio tells "Internal error from Core" where the server refuses an upload half way, in place of what the
        # server said (https://github.com/grpc/grpc/issues/36066); the sync API tells it right
        return sync_channel(self.address, self._tls)

    @cached_property
    def _upload_calls(self) -> Calls:
        return Calls(self._upload_channel)

    async def close(self) -> None:
        """End the connection and every call on it."""
        if "_upload_channel" in self.__dict__:
            self._upload_channel.close()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Generate a whole completion. ``prompt`` is a text, token ids or a conversation."""
        request = generate_request(prompt, **options)
        return results.completion(await self._answer(self._calls.generate, request, timeout_s))

    def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """Begin a completion and return its events: one ``Started``, any number of ``Delta``, one ``Finished``."""
        request = inference_pb2.StreamGenerateRequest(request=generate_request(prompt, **options))
        call = self._calls.stream_generate(request, timeout=timeout_s, metadata=self._metadata)
        return AsyncStream(call)

    async def register(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        replace: bool = False,
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> Adapter:
        """Upload the adapter in ``folder`` and return it once it is durable and can be named by requests.

        ``progress(sent_bytes, total_bytes)`` is called in the loop's thread, ten times a second and at the end.
        """
        upload = await asyncio.to_thread(read_folder, name, folder, replace=replace)
        sending = Sending(upload)
        future = self._upload_calls.register.future(sending, timeout=timeout_s, metadata=self._metadata)
        try:
            with weft_errors():
                message = await _finish(future, sending, progress)
        except WeftError as error:
            raise sending.error or error from None
        finally:
            future.cancel()
        if progress is not None:
            progress(sending.total_bytes, sending.total_bytes)
        return results.adapter(message.adapter)

    async def get(self, name: str, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> Adapter:
        """Return one adapter with its per-site report; raises NotFound."""
        request = adapters_pb2.GetAdapterRequest(name=name)
        return results.adapter((await self._answer(self._calls.get, request, timeout_s)).adapter)

    async def list(self, *, method: str = "", timeout_s: float | None = CONTROL_TIMEOUT_S) -> tuple[Adapter, ...]:
        """Return all adapters in order of name, or those of one method, e.g. ``LORA``; without their sites.

        The timeout holds for each page of a thousand.
        """
        found: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, method=method)
        while True:
            page = await self._answer(self._calls.list, request, timeout_s)
            found.extend(results.adapter(each) for each in page.adapters)
            if not page.next_page_token:
                return tuple(found)
            request.page_token = page.next_page_token

    async def delete(self, name: str, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> None:
        """Forget a name; requests in flight finish. Raises NotFound."""
        await self._answer(self._calls.delete, adapters_pb2.DeleteAdapterRequest(name=name), timeout_s)

    async def info(self, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> ServerInfo:
        """Return what the server is and how much memory it uses."""
        request = server_pb2.GetServerInfoRequest()
        return results.server_info(await self._answer(self._calls.info, request, timeout_s))

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return once the server takes requests; raises DeadlineExceeded when it does not in time."""
        deadline_s = time.monotonic() + timeout_s
        while (remaining_s := deadline_s - time.monotonic()) > 0:
            try:
                answer = await self._answer(self._calls.health, HEALTH_REQUEST, remaining_s, wait_for_ready=True)
            except (DeadlineExceeded, Unavailable):
                continue
            if is_serving(answer):
                return
            await asyncio.sleep(HEALTH_POLL_S)
        raise not_ready(self.address, timeout_s)

    async def _answer(
        self, method: Any, request: object, timeout_s: float | None, *, wait_for_ready: bool = False
    ) -> Any:
        """Make a unary call and wait; cancelling the task ends it on the server too."""
        with weft_errors():
            return await method(request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=wait_for_ready)


async def _finish(future: Any, sending: Sending, progress: Progress | None) -> Any:
    """Wait for a call of the sync API without blocking the loop; telling how far it got, if somebody wants to know."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: object) -> None:
        # a cancelled call may end after the loop did
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(wake)
    while not done.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), PROGRESS_S)
        if progress is not None and not done.is_set():
            progress(sending.sent_bytes, sending.total_bytes)
    return future.result()
