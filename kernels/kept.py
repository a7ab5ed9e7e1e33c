"""What is worked out of blocks and kept beside the arena for as long as the same adapters stand together."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar, cast


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int:
        """How much."""
        ...


T = TypeVar("T", bound=Sized)


class Kept:
    """Values by key, least recently used first; never more than ``bytes_max``."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._values: OrderedDict[Hashable, tuple[Sized, frozenset[int]]] = OrderedDict()
        self.nbytes = 0

    def get(self, key: Hashable, blocks: frozenset[int], make: Callable[[], T]) -> T:
        """The value, made anew where it is not kept: one larger than the budget is at every call.

        key:     names what ``make`` makes, its type included
        blocks:  keys of the blocks that it is made of
        """
        found = self._values.pop(key, None)
        value = make() if found is None else cast(T, found[0])
        if found is None:
            if value.nbytes > self._bytes_max:
                return value
            self.nbytes += value.nbytes
        self._values[key] = value, blocks
        self.trim(self._bytes_max)
        return value

    def trim(self, bytes_max: int) -> None:
        """From now on, keep no more than this."""
        self._bytes_max = bytes_max
        while self.nbytes > bytes_max:
            _, (value, _) = self._values.popitem(last=False)
            self.nbytes -= value.nbytes

    def forget(self, block: int) -> None:
        """Drop what was made of the block with this key."""
        for key in [key for key, (_, blocks) in self._values.items() if block in blocks]:
            self.nbytes -= self._values.pop(key)[0].nbytes
