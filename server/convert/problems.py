"""Why something cannot be converted, in the form of all refusals: what it is about, what was expected, what was got."""

from weft.adapters_store.errors import quoted


class CannotConvert(Exception):
    """The message is for whoever gave the files."""


def expected(subject: str, wanted: str, got: object, why: str = "") -> CannotConvert:
    """The one form of a refusal: ``subject: expected wanted, got this (why)``."""
    return CannotConvert(f"{quoted(subject)}: expected {wanted}, got {got}{f' ({why})' if why else ''}")
