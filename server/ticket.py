"""One request in flight: a mailbox that merges what its reader has not taken yet, and the times that it took."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from weft.server import errors
from weft.server.engine.messages import FinishReason, Submit
from weft.server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Progress:
    """What one request brought since the last look; ``finish`` is set with the last tokens."""

    tokens: tuple[int, ...]
    finish: FinishReason | None


class Ticket:
    """One request in flight. A context manager: leaving it before the end aborts the request in the engine.

    names:  what the caller calls the members of its adapter, by what the engine's messages call them
    """

    def __init__(self, submit: Submit, names: Mapping[str, str], leave: Callable[["Ticket", str], None]) -> None:
        self.submit = submit
        self._names = names
        self._leave = leave
        self.waiting = True
        self.ended = False
        self.received = 0
        # admission, leaving the queue, first and last token
        self.began_s = self.scheduled_s = self.first_s = self.last_s = time.monotonic()
        self._tokens: list[int] = []
        self._finish: FinishReason | None = None
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    @property
    def tokens_max(self) -> int:
        """Most tokens that the request can come to hold."""
        return len(self.submit.prompt) + self.submit.max_new_tokens

    async def take(self) -> Progress:
        """Wait for news and return all of it; raises the error that ended the request, after its last tokens."""
        await self._changed.wait()
        if self._error is not None and not self._tokens:
            raise self._error
        if self._error is None:
            self._changed.clear()
        progress = Progress(tuple(self._tokens), self._finish)
        self._tokens.clear()
        return progress

    def add(self, tokens: tuple[int, ...], finish: FinishReason | None) -> None:
        """Put news in the mailbox."""
        self._tokens.extend(tokens)
        self.received += len(tokens)
        self._finish = finish
        self._changed.set()

    def named(self, message: str) -> str:
        """What the engine says, in the words of the caller."""
        for label, name in self._names.items():
            message = message.replace(label, name)
        return message

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        self._error = error
        self._changed.set()

    def count(self, tokens: int, metrics: Metrics) -> None:
        """Measure the tokens that have just come."""
        now_s = time.monotonic()
        if self.received == 0:
            self.first_s = now_s
            metrics.first_token(now_s - self.began_s, now_s - self.scheduled_s)
        else:
            metrics.more_tokens(tokens, now_s - self.last_s)
        self.last_s = now_s

    def leave(self, outcome: str) -> None:
        """End the request for whatever reason; only the first time counts."""
        self._leave(self, outcome)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            outcome = self._finish.value if self._finish is not None else FinishReason.STOP.value
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            outcome = "cancelled"
        else:
            outcome = "deadline" if isinstance(error, errors.DeadlineExceeded) else "error"
        self.leave(outcome)
