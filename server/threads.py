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
            await _ended(work)
            raise

    async def run_while_wanted(self, function: Callable[..., T], *arguments: object) -> T:
        """As ``run``, but a call that has not begun when its caller is cancelled never does, and holds nobody up."""
        job = self._executor.submit(function, *arguments)
        work = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if not job.cancel():
                await _ended(work)
            raise

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self._executor.shutdown(wait=True)


async def _ended(work: asyncio.Future[T]) -> None:
    """Wait, however often the caller is cancelled meanwhile."""
    while not work.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([work])
