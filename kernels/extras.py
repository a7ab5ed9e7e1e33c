"""Operators beyond the normal form, as records in a block: what they are, where they act, where their tensors lie.

A record is a run of int32 words behind the directory; the host reads it, kernels are handed what it points to.

    kind, place, options, pieces    four words; then the options, then per piece:
    offset, rows, columns, code     offset in UNITs from the start of the block, 0 for a piece that is absent

``place`` counts what the kind acts on: sites for deltas, norms, hidden places, layers; 0 where there is only one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.int32]

RECORD_WORDS = 4
PIECE_WORDS = 4


class Kind(IntEnum):
    """What a record is. Pieces in brackets may be absent; F is in the factors' dtype, V in fp32, I in int32.

    Deltas of a linear, place = site:
        SPARSE      I index [nnz] into the flat [out, in], ascending; F value [nnz]
        ROWS        I row [k]; F rows [k, in]:             y[:, row] += x rowsᵀ
        COLUMNS     I column [k]; F columns [k, out]:      y += x[:, column] columns
        DENSE       F delta [out, in]
        GATED       F a [r, in]; F b [r, out]; V gate [1, in]; [V gate bias [1]]:  y += gate(x) · (x aᵀ) b
        SHARED      V inner [r]; V outer [out]; options: number of a bank (a, b):
                    y += outer ⊙ ((inner ⊙ (x a[:, :in]ᵀ)) b[:, :out])
    Elsewhere:
        NORM        [V weight [d]]; [V bias [d]] in the place of the norm's own, place = norm
        BOTTLENECK  place = hidden place: see ``parts.bottleneck``
        PREFIX      F keys [heads · p, key size]; F values [heads · p, value size]; [V gate [k, d], F where k is a
                    number per prefix token]; [V gate bias [k]];
                    options: p, whether positions of the text begin at p, whether there is a gate per token, what gates
                    read of a call: 0 the mean over its rows, 1 the first, 2 the last; place = layer
        SOFT        F rows [v, d] in front of the text
        EMBED_ROWS  I id [n], ascending; F rows [n, d] in the place of what the embedding puts out
        EMBED_ENTRIES  I index [n] into the flat embedding, ascending; F value [n], what is added to what it puts out
        EMBED_PAIR  F a [vocabulary, r]; F b [r, d]; [V outer [d]]:  embedding(id) = outer ⊙ embedding(id) + a[id] b
        BANK        in a block of its own: F a [r, widest in]; F b [r, tallest out]
        SHARES      options: the eight words of a bank's digest; place = its number
        MASK        I tokens [k]: operators begin where these tokens occur last in the prompt
        SIDE        V gate [n]; F first weight, first bias, up weight, up bias; parameters of the norm; then per layer
                    F down weight, down bias, parameters of the block; options: reduction, layers [n]
        EXPERTS     F a [experts · r, in]; F b [experts · r, out]:  expert e's weight += b[e]ᵀ a[e]; options: number of
                    the parameter that holds the weights; place = module of experts
    """

    SPARSE = 1
    ROWS = 2
    COLUMNS = 3
    DENSE = 4
    GATED = 5
    SHARED = 6
    NORM = 16
    BOTTLENECK = 17
    PREFIX = 18
    SOFT = 19
    EMBED_ROWS = 20
    EMBED_PAIR = 21
    MASK = 22
    SIDE = 23
    EXPERTS = 24
    EMBED_ENTRIES = 25
    BANK = 30
    SHARES = 31


DELTAS = frozenset({Kind.SPARSE, Kind.ROWS, Kind.COLUMNS, Kind.DENSE, Kind.GATED, Kind.SHARED})

FACTOR, VECTOR, INTEGER = range(3)


class Piece(NamedTuple):
    """Where a tensor [rows, columns] of a record lies; ``code`` says in which dtype."""

    offset: int
    rows: int
    columns: int
    code: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record as a block's head says it."""

    kind: Kind
    place: int
    options: tuple[int, ...]
    pieces: tuple[Piece | None, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Extra:
    """A record's content before it is packed: tensors of one or two dimensions, in the dtypes that are stored."""

    kind: Kind
    place: int
    tensors: tuple[Tensor | None, ...]
    options: tuple[int, ...] = ()

    @property
    def words(self) -> int:
        """Words that the record takes."""
        return RECORD_WORDS + len(self.options) + PIECE_WORDS * len(self.tensors)


def code_of(tensor: Tensor, factors: torch.dtype) -> int:
    """How a tensor is stored. ValueError for a dtype that no block holds."""
    if tensor.dtype == torch.int32:
        return INTEGER
    if tensor.dtype == factors:
        return FACTOR
    if tensor.dtype == torch.float32:
        return VECTOR
    raise ValueError(f"expected int32, fp32 or {factors}, got {tensor.dtype}")


def write(words: Words, extras: Sequence[Extra], pieces: Sequence[Sequence[Piece | None]]) -> None:
    """Fill ``words`` with the records of these extras, whose tensors lie at ``pieces``."""
    at = 0
    for extra, its_pieces in zip(extras, pieces, strict=True):
        head = (extra.kind, extra.place, len(extra.options), len(its_pieces), *extra.options)
        body = [word for piece in its_pieces for word in (piece or (0, 0, 0, 0))]
        words[at : at + extra.words] = (*head, *body)
        at += extra.words


def read(words: Words, count: int) -> Iterator[Record]:
    """The first ``count`` records of these words."""
    at = 0
    for _ in range(count):
        kind, place, options, pieces = words[at : at + RECORD_WORDS].tolist()
        at += RECORD_WORDS
        said = tuple(words[at : at + options].tolist())
        at += options
        table = words[at : at + PIECE_WORDS * pieces].reshape(pieces, PIECE_WORDS).tolist()
        at += PIECE_WORDS * pieces
        yield Record(Kind(kind), place, said, tuple(Piece(*row) if row[0] else None for row in table))
