"""What a parser says of itself: the rows of ``weft methods`` and of the README's table."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Served:
    """One method that a parser serves.

    name:       as its paper calls it
    reference:  arXiv number, or the library that defines it
    operators:  what it becomes, in the words of ``design``: ``scale, low_rank``
    format:     what is read: ``PEFT LORA, use_dora``
    survey:     whether it is a row of arXiv 2303.15647
    refuses:    what of the format is refused, and why; empty if nothing is
    counts_as:  the method that this row is a start, a setting or a carrier of; empty if it is one of its own
    """

    name: str
    reference: str
    operators: str
    format: str
    survey: bool = False
    refuses: str = ""
    counts_as: str = ""

    @property
    def method(self) -> str:
        """What it counts as: several rows may be of one method."""
        return self.counts_as or self.name
