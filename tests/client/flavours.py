"""Lets one test speak to both clients: an ``AsyncClient`` on a loop in another thread that looks like a ``Client``."""

import asyncio
import inspect
import threading
from collections.abc import Iterator
from typing import Any

from weft.client import AsyncClient, AsyncStream, Event

WAIT_S = 20.0


class LoopThread:
    """An event loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


class BlockingStream(Iterator[Event]):
    """An ``AsyncStream`` that looks like a ``Stream``."""

    def __init__(self, thread: LoopThread, stream: AsyncStream) -> None:
        self._thread = thread
        self._stream = stream

    def __next__(self) -> Event:
        async def step() -> Event | None:
            return await anext(self._stream, None)

        event: Event | None = self._thread.run(step())
        if event is None:
            raise StopIteration
        return event

    def close(self) -> None:
        self._thread.run(self._stream.aclose())

    def __enter__(self) -> "BlockingStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BlockingClient:
    """An ``AsyncClient`` that looks like a ``Client``."""

    def __init__(self, address: str, **options: Any) -> None:
        self._thread = LoopThread()
        self._client = AsyncClient(address, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        async def call(*values: Any, **options: Any) -> Any:
            result = method(*values, **options)
            return await result if inspect.isawaitable(result) else result

        def blocking(*values: Any, **options: Any) -> Any:
            result = self._thread.run(call(*values, **options))
            return BlockingStream(self._thread, result) if isinstance(result, AsyncStream) else result

        return blocking

    def __enter__(self) -> "BlockingClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.run(self._client.close())
        self._thread.close()
