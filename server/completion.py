"""One completion between the engine and its reader: tokens become text, stop strings end it, deltas are merged."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from weft.server.engine.messages import FinishReason
from weft.server.errors import DeadlineExceeded
from weft.server.text import Detokenizer, StopStrings, Tokenizer
from weft.server.ticket import Ticket

# the longest tokens have some hundred bytes: so many stay within a message
PIECE_TOKENS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """What a completion grew by since the last look; ``finish`` is set with the last piece."""

    text: str
    tokens: tuple[int, ...]
    finish: FinishReason | None


class Completion:
    """Follows one ticket as fast as the engine goes, however slowly it is read. A context manager.

    duration_s, expires_s:  how long it may take from the start, and when that ends on the loop's clock
    completion_tokens:      tokens generated so far, the ones whose text a stop string hides included
    """

    def __init__(
        self,
        ticket: Ticket,
        tokenizer: Tokenizer | None,
        stops: Sequence[str],
        duration_s: float,
        expires_s: float,
    ) -> None:
        self.completion_tokens = 0
        self._ticket = ticket
        self._duration_s = duration_s
        self._expires_s = expires_s
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        self._stops = StopStrings(stops)
        # tokens not taken yet, each with the text that became certain with it
        self._pending: deque[tuple[int | None, str]] = deque()
        self._finish: FinishReason | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Completion":
        self._task = asyncio.create_task(self._follow())
        # an error of the task must wake the reader, too
        self._task.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def take(self) -> Piece:
        """Wait for news and return it merged, up to a message's worth; raises what ended the request at the end."""
        await self._changed.wait()
        entries = [self._pending.popleft() for _ in range(min(len(self._pending), PIECE_TOKENS_MAX))]
        tokens = tuple(token for token, _ in entries if token is not None)
        last = not self._pending
        if last:
            self._changed.clear()
            if not entries and self._finish is None and self._task is not None and self._task.done():
                self._task.result()
        return Piece("".join(text for _, text in entries), tokens, self._finish if last else None)

    async def _follow(self) -> None:
        """Take tokens until the end, a stop string or the deadline."""
        while self._finish is None:
            try:
                async with asyncio.timeout_at(self._expires_s):
                    progress = await self._ticket.take()
            except TimeoutError:
                text = f"request was not done after {self._duration_s:g} s, its deadline or the server's maximum"
                raise DeadlineExceeded(text) from None
            if self._show(progress.tokens):
                self._finish = FinishReason.STOP
                # now, not when the reader gets here
                self._ticket.leave(FinishReason.STOP.value)
            elif progress.finish is not None:
                self._flush()
                self._finish = progress.finish
            self._changed.set()

    def _show(self, tokens: Sequence[int]) -> bool:
        """Add tokens and their text up to a stop string; whether one was completed."""
        for token in tokens:
            self.completion_tokens += 1
            text, stopped = "", False
            if self._detokenizer is not None:
                text, stopped = self._stops.feed(self._detokenizer.feed(token))
            self._pending.append((token, text))
            if stopped:
                return True
        return False

    def _flush(self) -> None:
        """Add what was held back for a next token that does not come."""
        if self._detokenizer is not None:
            text, stopped = self._stops.feed(self._detokenizer.flush())
            self._pending.append((None, text if stopped else text + self._stops.flush()))
