"""Factors that many adapters share: a block of their own, named by what is in it, that adapters' blocks refer to.

Two adapters drawn from the same random matrices bring the same bytes, so they name the same bank, which lies in the
arena once and stays there as long as either is in use.
"""

import hashlib

import numpy as np
from torch import Tensor

from weft.adapters_store.operators import Bank, ParsedAdapter, Shared
from weft.adapters_store.plans import piece
from weft.adapters_store.values import Values
from weft.kernels.extras import PIECE_WORDS, RECORD_WORDS, Extra, Kind
from weft.kernels.layout import (
    ALIGN,
    HEADER_WORDS,
    SITE_WORDS,
    Directory,
    Geometry,
    pack,
    round_up,
    row_stride,
)

WORD_BYTES = 4
DIGEST_WORDS = 8
# words of the record by which an adapter's block names a bank
REFERENCE_WORDS = RECORD_WORDS + DIGEST_WORDS


def banks_of(parsed: ParsedAdapter) -> list[Bank]:
    """The banks that an adapter refers to, each once, in the order in which its block numbers them."""
    operators = (operator for said in parsed.sites.values() for operator in said.operators)
    return list(dict.fromkeys(operator.bank for operator in operators if isinstance(operator, Shared)))


def bank_bytes(bank: Bank, geometry: Geometry) -> int:
    """Length of a bank's block, from shapes alone."""
    words = HEADER_WORDS + len(geometry.sites) * SITE_WORDS + RECORD_WORDS + 2 * PIECE_WORDS
    (rank, wide), tall, dtype = bank.a.shape, bank.b.shape[0], geometry.dtype
    body = sum(rank * row_stride(columns, dtype) * dtype.itemsize for columns in (wide, tall))
    return round_up(round_up(words * WORD_BYTES, ALIGN) + body, ALIGN)


def bank_image(bank: Bank, values: Values, geometry: Geometry) -> tuple[str, Tensor]:
    """The digest and the image of a bank."""
    (rank, wide), tall = bank.a.shape, bank.b.shape[0]
    a = piece(bank.a, (rank, wide), geometry.dtype)
    b = piece(bank.b, (rank, tall), geometry.dtype, lambda t: t.T)
    image = pack(geometry, {}, [Extra(Kind.BANK, 0, (a.fill(values), b.fill(values)))])
    values.next_site()
    return hashlib.sha256(image.numpy().data).hexdigest(), image


def reference(number: int, digest: str) -> Extra:
    """The record by which an adapter's block names its bank of this number."""
    words = np.frombuffer(bytes.fromhex(digest), dtype="<i4").tolist()
    return Extra(Kind.SHARES, number, (), tuple(words))


def shared_digests(head: Directory) -> tuple[str, ...]:
    """The banks that a block refers to, in the order of their numbers."""
    found = (record for record in head.records if record.kind is Kind.SHARES)
    return tuple(np.array(record.options, dtype="<i4").tobytes().hex() for record in found)


def counted(extra: Extra, number: int | None) -> Extra:
    """A record with the number of the bank that it uses, where it uses one."""
    return extra if number is None else Extra(extra.kind, extra.place, extra.tensors, (number,))
