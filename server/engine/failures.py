"""Which message-level failure stands for which error of the store."""

from weft.adapters_store.errors import AdapterCorrupt, AdapterError, AdapterInvalid, AdapterTooLarge
from weft.server.engine.messages import Failure

_FAILURES: dict[type[AdapterError], Failure] = {
    AdapterInvalid: Failure.ADAPTER_INVALID,
    AdapterTooLarge: Failure.ADAPTER_TOO_LARGE,
    AdapterCorrupt: Failure.ADAPTER_CORRUPT,
}


def failure_of(error: AdapterError) -> Failure:
    """The failure that the front translates to a status; errors the engine cannot meet by input are bugs."""
    return _FAILURES.get(type(error), Failure.BUG)
