"""An engine that is stepped by hand while somebody looks at the clock."""

from collections.abc import Sequence

from weft.server.engine.messages import Failed, RequestId, StepStats, Submit, Tokens
from weft.server.engine.offline import OfflineEngine, RequestFailed


class Clock:
    """One batch of ``count`` requests on an engine.

    total_s:   of all steps so far
    decode_s:  of each step in which every request decoded: all have had a token, and none has ended
    """

    def __init__(self, engine: OfflineEngine, count: int):
        self._engine, self._count, self._open = engine.engine, count, 0
        self._begun: set[RequestId] = set()
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
        all_begun = len(self._begun) == self._count
        for event in self._engine.step():
            match event:
                case Failed():
                    raise RequestFailed(event)
                case Tokens():
                    self._begun.add(event.id)
                    self._open -= event.finish is not None
                case StepStats():
                    self.total_s += event.step_s
                    if all_begun and event.rows == self._count:
                        self.decode_s.append(event.step_s)
        return self._open > 0
