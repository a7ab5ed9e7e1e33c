"""Everything that can go wrong with an adapter, as types.

    AdapterError
    ├── AdapterInvalid        the files are malformed, or ask for something that is not served
    ├── AdapterTooLarge       the compiled adapter cannot fit the memory that is set aside for adapters
    ├── AdapterCorrupt        stored bytes are missing or no longer match their digest
    ├── AdapterNotFound       no adapter of this name
    ├── AdapterExists         the name points to another version, and replacing it was not asked for
    ├── AdapterIncompatible   registered for another backbone, and does not fit the one that is loaded
    ├── StoreFull             no space left where the store lies
    ├── StoreIOError          the store cannot be read or written
    └── StoreBug              a defect of ours; the message names an incident in the log and nothing else

Each carries the ``field`` that it is about: a config key, the name of a tensor, ``name``, or nothing. Messages say
what was expected and what was got; they hold no path and no text of other errors, so that they may be shown to whoever
sent the files.
"""


class AdapterError(Exception):
    """The root of the tree above."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = quoted(field)

    def __reduce__(self) -> tuple[type["AdapterError"], tuple[str, ...]]:
        return type(self), (self.message, self.field)


class AdapterInvalid(AdapterError):
    """The files are malformed, or ask for something that is not served."""


class AdapterTooLarge(AdapterError):
    """The compiled adapter cannot fit the memory that is set aside for adapters."""


class AdapterCorrupt(AdapterError):
    """Stored bytes are missing or no longer match their digest."""


class AdapterNotFound(AdapterError):
    """No adapter of this ``name``."""

    def __init__(self, message: str, field: str = "", name: str = "") -> None:
        super().__init__(message, field)
        self.name = quoted(name)

    def __reduce__(self) -> tuple[type["AdapterError"], tuple[str, ...]]:
        return type(self), (self.message, self.field, self.name)


class AdapterExists(AdapterError):
    """The name points to another version, and replacing it was not asked for."""


class AdapterIncompatible(AdapterError):
    """Registered for another backbone, and does not fit the one that is loaded."""


class StoreFull(AdapterError):
    """No space left where the store lies."""


class StoreIOError(AdapterError):
    """The store cannot be read or written."""


class StoreBug(AdapterError):
    """A defect of ours; the message names an incident in the log and nothing else."""


def expected(field: str, wanted: str, got: object, why: str = "") -> AdapterInvalid:
    """The one form of a refusal: ``field: expected wanted, got this (why)``."""
    return AdapterInvalid(f"{quoted(field)}: expected {wanted}, got {got}{f' ({why})' if why else ''}", field)


def quoted(text: str, length_max: int = 200) -> str:
    """Text that somebody else chose, made safe to print: escaped, and cut in the middle when it is long."""
    safe = "".join(c if c.isascii() and c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(safe) <= length_max:
        return safe
    half = length_max // 2
    return f"{safe[:half]}…{safe[-half:]}"


def some(names: list[str], shown_max: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    shown = ", ".join(quoted(name) for name in names[:shown_max])
    return shown if len(names) <= shown_max else f"{shown} and {len(names) - shown_max} more"
