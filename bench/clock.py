"""An engine that is stepped by hand while somebody looks at the clock."""

from collections.abc import Sequence

from weft.server.engine.messages import Failed, StepStats, Submit, Tokens
from weft.server.engine.offline import OfflineEngine, RequestFailed


class Clock:
    """One batch of ``count`` requests on an engine.

    total_s:   of all steps so far
    decode_s:  of each step in which every request decoded and none was in its prefill
    """

    def __init__(self, engine: OfflineEngine, count: int):
        self._engine, self._count, self._open = engine.engine, count, 0
        self.total_s = 0.0
        self.decode_s: list[float] = []

    def start(self, submits: Sequence[Submit]) -> None:
        """Take the requests in; nothing runs yet."""
        self._open = len(submits)
        for submit in submits:
            self._engine.handle(submit)

    def step(self) -> bool:
        """Run one step if any request is open; says whether one still is. Raises RequestFailed."""
        if not self._open:
            return False
        for event in self._engine.step():
            match event:
                case Failed():
                    raise RequestFailed(event)
                case Tokens(finish=reason) if reason is not None:
                    self._open -= 1
                case StepStats(rows=rows):
                    self.total_s += event.step_s
                    if rows == self._count and not event.prefill_tokens:
                        self.decode_s.append(event.step_s)
        return self._open > 0
