"""The client for plain code. May be used from several threads at once."""

import time
from collections.abc import Iterator
from os import PathLike
from typing import Any, Self, Unpack

import grpc

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
    is_serving,
    not_ready,
    sync_channel,
)
from weft.client.errors import DeadlineExceeded, Unavailable, WeftError, not_understood, weft_errors
from weft.client.requests import GenerateOptions, Prompt, generate_request
from weft.client.upload import PROGRESS_S, Progress, Sending, read_folder
from weft.client.values import Adapter, Completion, Event, Finished, ServerInfo
from weft.proto.v1 import adapters_pb2, inference_pb2, server_pb2


class Stream(Iterator[Event]):
    """The events of one generation as they come. Closing it, or dropping it, ends the generation on the server."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._finished = False

    def __next__(self) -> Event:
        call = self._call
        if call is None:
            raise StopIteration
        try:
            with weft_errors():
                message = next(call, None)
            if message is not None:
                event = results.event(message)
                self._finished = isinstance(event, Finished)
                return event
        except BaseException:
            self.close()
            raise
        self._call = None
        if not self._finished:
            raise not_understood("expected a stream to end with finished, got its end")
        raise StopIteration

    def close(self) -> None:
        """End the generation on the server if it still runs; the stream is at its end then."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # gRPC's own threads keep a dropped call alive: the server would generate to the end for nobody
        self.close()


class Client:
    """A connection to one server.

    address  ``HOST:PORT``
    tls      what to trust and show; None talks plain text
    token    bearer token to send with every call

    Calls without ``timeout_s`` take as long as the server lets them; those that answer at once get 30 seconds.
    All of them raise ``WeftError``.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, tls: Tls | None = None, token: str = "") -> None:
        self.address = address
        self._metadata = call_metadata(token)
        self._channel = sync_channel(address, tls)
        self._calls = Calls(self._channel)

    def close(self) -> None:
        """End the connection and every call on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Generate a whole completion. ``prompt`` is a text, token ids or a conversation."""
        request = generate_request(prompt, **options)
        return results.completion(self._answer(self._calls.generate, request, timeout_s))

    def stream(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """Begin a completion and return its events: one ``Started``, any number of ``Delta``, one ``Finished``."""
        request = inference_pb2.StreamGenerateRequest(request=generate_request(prompt, **options))
        call = self._calls.stream_generate(request, timeout=timeout_s, metadata=self._metadata)
        return Stream(call)

    def register(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        replace: bool = False,
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> Adapter:
        """Upload the adapter in ``folder`` and return it once it is durable and can be named by requests.

        ``progress(sent_bytes, total_bytes)`` is called in this thread, ten times a second and at the end.
        """
        upload = read_folder(name, folder, replace=replace)
        sending = Sending(upload)
        future = self._calls.register.future(sending, timeout=timeout_s, metadata=self._metadata)
        try:
            with weft_errors():
                while not _done_within(future, PROGRESS_S):
                    if progress is not None:
                        progress(sending.sent_bytes, sending.total_bytes)
                message = future.result()
        except WeftError as error:
            raise sending.error or error from None
        finally:
            future.cancel()
        if progress is not None:
            progress(sending.total_bytes, sending.total_bytes)
        return results.adapter(message.adapter)

    def get(self, name: str, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> Adapter:
        """Return one adapter with its per-site report; raises NotFound."""
        request = adapters_pb2.GetAdapterRequest(name=name)
        return results.adapter(self._answer(self._calls.get, request, timeout_s).adapter)

    def list(self, *, method: str = "", timeout_s: float | None = CONTROL_TIMEOUT_S) -> tuple[Adapter, ...]:
        """Return all adapters in order of name, or those of one method, e.g. ``LORA``; without their sites.

        The timeout holds for each page of a thousand.
        """
        found: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, method=method)
        while True:
            page = self._answer(self._calls.list, request, timeout_s)
            found.extend(results.adapter(each) for each in page.adapters)
            if not page.next_page_token:
                return tuple(found)
            request.page_token = page.next_page_token

    def delete(self, name: str, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> None:
        """Forget a name; requests in flight finish. Raises NotFound."""
        self._answer(self._calls.delete, adapters_pb2.DeleteAdapterRequest(name=name), timeout_s)

    def info(self, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> ServerInfo:
        """Return what the server is and how much memory it uses."""
        return results.server_info(self._answer(self._calls.info, server_pb2.GetServerInfoRequest(), timeout_s))

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return once the server takes requests; raises DeadlineExceeded when it does not in time."""
        deadline_s = time.monotonic() + timeout_s
        while (remaining_s := deadline_s - time.monotonic()) > 0:
            try:
                answer = self._answer(self._calls.health, HEALTH_REQUEST, remaining_s, wait_for_ready=True)
            except (DeadlineExceeded, Unavailable):
                continue
            if is_serving(answer):
                return
            time.sleep(HEALTH_POLL_S)
        raise not_ready(self.address, timeout_s)

    def _answer(self, method: Any, request: object, timeout_s: float | None, *, wait_for_ready: bool = False) -> Any:
        """Make a unary call and wait; an interrupt ends it on the server too."""
        future = method.future(request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=wait_for_ready)
        try:
            with weft_errors():
                return future.result()
        finally:
            future.cancel()


def _done_within(future: Any, timeout_s: float) -> bool:
    try:
        future.exception(timeout=timeout_s)
    except grpc.FutureTimeoutError:
        return False
    return True
