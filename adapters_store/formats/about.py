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
    """

    name: str
    reference: str
    operators: str
    format: str
    survey: bool = False
    refuses: str = ""
