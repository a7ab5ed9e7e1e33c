"""What an adapter compiled to, in words and numbers: the per-site report of registration. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SiteSummary:
    """One line of the report; ``bytes`` are device bytes."""

    module: str
    operators: tuple[str, ...]
    rank: int
    bytes: int
    folds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Traits:
    """What a scheduler must know of an adapter.

    extra_rows:       rows that stand in front of the text and count as its tokens
    position_offset:  where the text's positions begin beside that
    whole_prompt:     what it computes depends on which tokens run in one call: the prompt must not be cut
    cacheable:        keys and values of a prefix of the prompt may be used again
    side_reduction:   a token takes 1 / side_reduction of a token's keys and values once more; 0: it does not
    token_mask:       the tokens from whose last occurrence on it acts; empty: everywhere
    """

    extra_rows: int = 0
    position_offset: int = 0
    whole_prompt: bool = False
    cacheable: bool = True
    token_mask: tuple[int, ...] = ()
    side_reduction: int = 0


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What an adapter compiled to.

    device_bytes:  the size of its block, directory included
    banks:         digests of the blocks that it shares with others
    """

    method: str
    dialect: str
    device_bytes: int
    sites: tuple[SiteSummary, ...]
    notes: tuple[str, ...] = ()
    traits: Traits = Traits()
    banks: tuple[str, ...] = ()
