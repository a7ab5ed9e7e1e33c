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
class AdapterReport:
    """What an adapter compiled to; ``device_bytes`` is the size of its block, directory included."""

    method: str
    dialect: str
    device_bytes: int
    sites: tuple[SiteSummary, ...]
    notes: tuple[str, ...] = ()
