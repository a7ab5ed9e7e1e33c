"""Which message-level failure stands for which error of the store, and which error means that memory ran out."""

import torch

from weft.adapters_store.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterTooLarge,
    StoreFull,
    StoreIOError,
)
from weft.server.engine.messages import Failure

_FAILURES: dict[type[AdapterError], Failure] = {
    AdapterInvalid: Failure.ADAPTER_INVALID,
    AdapterTooLarge: Failure.ADAPTER_TOO_LARGE,
    AdapterCorrupt: Failure.ADAPTER_CORRUPT,
    AdapterIncompatible: Failure.ADAPTER_INCOMPATIBLE,
    StoreFull: Failure.STORE_FULL,
    StoreIOError: Failure.STORE_IO_ERROR,
}


def failure_of(error: AdapterError) -> Failure:
    """The failure that the front translates to a status; errors the engine cannot meet by input are bugs."""
    return _FAILURES.get(type(error), Failure.BUG)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    # torch has no type of its own for the host
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
