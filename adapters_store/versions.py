"""What the residency knows of one version: where it is on its way between disk and arena."""

from dataclasses import dataclass
from enum import Enum, auto

from weft.adapters_store.composition import Members, Source
from weft.adapters_store.errors import AdapterError
from weft.kernels.batch import Block
from weft.kernels.layout import Directory


class State(Enum):
    """Where a version is."""

    SIZING = auto()  # the loader finds out how large the block is, or makes the image
    ABSENT = auto()  # known, not in the arena
    WRITING = auto()  # has a place in the arena; the loader writes there
    RESIDENT = auto()


@dataclass(eq=False)
class Version:
    """What is known of one version.

    members:       of a derived version
    source:        of a bank: a version that refers to it, and the members of that
    nbytes:        of its block; 0 means unknown
    offset:        of its block in the arena; -1 means that it has none
    directory:     of its block once it has been written
    banks:         that its block refers to, as far as it is known
    block:         while RESIDENT
    unclaimed:     polls before which the block is kept for whoever made it load; 0 once it was acquired
    asked:         the poll at which a derived version was last asked for
    made:          whether its image was made again since a load found it damaged
    error, until:  why the last load failed, and how long that is news
    blamed:        of a bank: the source that failed
    """

    digest: str
    members: Members = ()
    source: Source | None = None
    state: State = State.ABSENT
    nbytes: int = 0
    offset: int = -1
    directory: Directory | None = None
    banks: tuple[str, ...] = ()
    block: Block | None = None
    uses: int = 0
    unclaimed: int = 0
    asked: int = 0
    made: bool = False
    error: AdapterError | None = None
    until: float = 0.0
    blamed: Source | None = None
