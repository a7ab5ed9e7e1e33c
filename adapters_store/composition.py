"""Derived versions: several versions, each with a weight, in order, as one adapter. Imports no torch.

A derived version has no files: it is read from those of its members, and named by their digests and weights, so that
whoever asks for the same list gets the same version.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from weft.adapters_store.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from weft.adapters_store.files import read_version
from weft.adapters_store.formats import parse_adapter
from weft.adapters_store.merge import Member, merge
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.tensor_refs import TensorRef

METHOD, DIALECT = "COMPOSED", "weft"
# part of every derived digest: another meaning of a list makes other versions
RULES = "weft composition 1"
LABEL_CHARACTERS = 12

# digests of versions and their weights, in order
Members = tuple[tuple[str, float], ...]
# a version, and its members if it is a derived one
Source = tuple[str, Members]


def derive(members: Iterable[tuple[str, float]]) -> tuple[str | None, Members]:
    """The digest of a list, and the members that it comes to: none where the digest says it all.

    Members of weight 0 do nothing: an empty list is the bare backbone, one member of weight 1 is that version itself.
    """
    kept = tuple((digest, float(weight)) for digest, weight in members if weight != 0)
    if not kept:
        return None, ()
    if len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0], ()
    lines = [RULES, *(f"{digest} {weight.hex()}" for digest, weight in kept)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest(), kept


def label_of(digest: str) -> str:
    """What messages call a member; whoever knows its name puts that in the place."""
    return digest[:LABEL_CHARACTERS]


def read_composed(root: Path, members: Members, info: CatalogueInfo, data: bool = True) -> ParsedAdapter:
    """Read, judge and merge the members. AdapterInvalid where they do not go together.

    Without ``data`` only headers are read: enough to see that, and how large it will be.
    """
    read: dict[str, ParsedAdapter] = {}
    for digest, _ in members:
        if digest not in read:
            read[digest] = _read(root, digest, info, data)
    found = [Member(label_of(digest), read[digest], weight) for digest, weight in members]
    return merge(joined(found) if data else found, METHOD, DIALECT)


def joined(members: Sequence[Member]) -> list[Member]:
    """The same members over one run of bytes: their files', one behind the other. Tensors are named by member."""
    pieces: dict[int, memoryview] = {}
    for member in members:
        assert isinstance(member.parsed.weights, memoryview), "members were read"
        pieces[id(member.parsed)] = member.parsed.weights
    run = _Run(tuple(pieces.values()))
    starts = dict(zip(pieces, run.starts, strict=False))
    moved = {id(m.parsed): _moved(m.parsed, starts[id(m.parsed)], m.label, {}) for m in members}
    return [replace(m, parsed=replace(moved[id(m.parsed)], weights=run)) for m in members]


class _Run:
    """Runs of bytes one behind the other, never copied together; what is cut out must lie in one of them."""

    def __init__(self, pieces: tuple[memoryview, ...]) -> None:
        self._pieces = pieces
        self.starts = list(accumulate((len(piece) for piece in pieces), initial=0))

    def __getitem__(self, part: slice, /) -> memoryview:
        at = bisect_right(self.starts, part.start, hi=len(self._pieces)) - 1
        start = self.starts[at]
        assert part.stop <= self.starts[at + 1], "a tensor lies in one file"
        return self._pieces[at][part.start - start : part.stop - start]


def _read(root: Path, digest: str, info: CatalogueInfo, data: bool) -> ParsedAdapter:
    try:
        return parse_adapter(read_version(root, digest, data), info)
    except AdapterInvalid as error:
        # it was valid when it was registered, so it was for another backbone
        raise AdapterIncompatible(f"{label_of(digest)}: {error.message}", error.field) from error
    except AdapterError as error:
        raise type(error)(f"{label_of(digest)}: {error.message}", error.field) from error


def _moved(said: Any, by: int, label: str, known: dict[int, Any]) -> Any:
    """A copy of what a parser said in which every tensor lies ``by`` bytes further on.

    known:  by identity, so that a formula that several operators share stays one
    """
    if id(said) in known:
        return known[id(said)]
    result = said
    if isinstance(said, TensorRef):
        result = replace(said, name=f"{label}: {said.name}", start=said.start + by, stop=said.stop + by)
    elif is_dataclass(said) and not isinstance(said, type):
        changed = {f.name: _moved(getattr(said, f.name), by, label, known) for f in fields(said)}
        result = replace(said, **changed)
    elif isinstance(said, tuple):
        result = tuple(_moved(each, by, label, known) for each in said)
    elif isinstance(said, dict):
        result = {key: _moved(each, by, label, known) for key, each in said.items()}
    known[id(said)] = result
    return result
