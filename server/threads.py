"""Runs slow calls beside the event loop, without ever leaving one behind."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """A few threads for one kind of work."""

    def __init__(self, name: str, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=f"weft-{name}")

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Call ``function`` in a thread. A cancelled caller still waits for it: what it uses may be freed next."""
        work = asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            while not work.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            raise

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self._executor.shutdown(wait=True)
