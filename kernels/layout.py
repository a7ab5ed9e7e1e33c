"""How an adapter's operators lie in memory: the one definition of a block, on disk, on host and device.

An *image* is a block that is not in an arena yet: the bytes are the same. All offsets inside are int32 counts
of ``UNIT`` bytes from its start, so a block moves by copying and does not say where it lies; 0 means absent,
because the header is there.

    header       HEADER_WORDS int32   magic, sites, nbytes / ALIGN, head units, records, word of the first, 0, 0
    directory    int32 [sites, SITE_WORDS]
    kron tables  int32 [terms, KRON_WORDS] per site that has terms, each table at a whole UNIT
    records      int32, operators beyond the normal form (``extras``)
    factors      from a multiple of ALIGN on, in the geometry's dtype, per group: A of every site, B of every site,
                 krons of every site
    vectors      fp32, each at a whole UNIT: per site sigma, beta, sigma_in, inner
    pieces       what records point to, each at a whole UNIT

Ranks are exact. Rows of a factor begin at whole UNITs (a row of 100 bf16 numbers takes 104), so every row can
be read with aligned vector loads, and the A of a group are together one [sum of ranks, in_features] matrix.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.kernels import extras
from weft.kernels.activation import IDENTITY
from weft.kernels.extras import FACTOR, INTEGER, Extra, Kind, Piece, Record, code_of

UNIT = 16
ALIGN = 256
HEADER_WORDS = 8
SITE_WORDS = 10
KRON_WORDS = 6

# columns of the directory; ACT holds the number of a function, and in its higher bytes a bottleneck's tap
A_OFF, RANK, B_OFF, KRON_OFF, KRON_COUNT, SIGMA_OFF, BETA_OFF, SIGMA_IN_OFF, ACT, INNER_OFF = range(SITE_WORDS)
TAP_SHIFT = 8

# raised by one whenever the bytes of any block change; a test pins the bytes to it
VERSION = 3
IMAGE_FORMAT = hashlib.sha256(
    f"weft block {VERSION}: {UNIT} {ALIGN} {HEADER_WORDS} {SITE_WORDS} {KRON_WORDS}".encode()
).hexdigest()[:16]
MAGIC = int(IMAGE_FORMAT[:7], 16)

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Words = npt.NDArray[np.int32]


class LayoutError(ValueError):
    """Operators that do not fit their sites, or bytes that are not a block of this format."""


@dataclass(frozen=True, slots=True)
class SiteShape:
    """One linear module: y [.., out_features] from x [.., in_features]."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class Geometry:
    """The sites of a backbone as arithmetic sees them.

    sites:   in index order
    groups:  sizes of the runs of neighbouring sites that share an input; they sum to len(sites)
    dtype:   of the factors in every block: fp32, bf16 or fp16
    hidden:  how many sites at the end are hidden places, each a group of its own
    """

    sites: tuple[SiteShape, ...]
    groups: tuple[int, ...]
    dtype: torch.dtype
    hidden: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in FACTOR_DTYPES:
            raise LayoutError(f"geometry dtype must be one of {FACTOR_DTYPES}, got {self.dtype}")
        if any(size < 1 for size in self.groups) or sum(self.groups) != len(self.sites):
            raise LayoutError(f"geometry groups must be runs that sum to {len(self.sites)}, got {self.groups}")
        for g, members in enumerate(self.members):
            inputs = {self.sites[s].in_features for s in members}
            if len(inputs) != 1:
                raise LayoutError(f"group {g}: sites must share in_features, got {sorted(inputs)}")

    @cached_property
    def members(self) -> tuple[range, ...]:
        """Site indices of each group."""
        stops = np.cumsum(self.groups).tolist()
        return tuple(range(stop - size, stop) for stop, size in zip(stops, self.groups, strict=True))

    @cached_property
    def group_of(self) -> tuple[int, ...]:
        """The group of each site."""
        return tuple(g for g, members in enumerate(self.members) for _ in members)

    def in_features(self, group: int) -> int:
        """Width of the input that the sites of this group share."""
        return self.sites[self.members[group].start].in_features

    def out_features(self, group: int) -> int:
        """Width of the outputs of this group side by side."""
        return sum(self.sites[s].out_features for s in self.members[group])


@dataclass(frozen=True, eq=False)
class SiteTerms:
    """One site's operators: y = sigma * Linear(sigma_in * x) + act(x A^T + inner) B^T + sum of x kron(w1, w2)^T + beta.

    low_rank:  A [rank, in], B [out, rank]
    krons:     (w1 [o1, i1], w2 [o2, i2]) with o1*o2 = out, i1*i2 = in and one (o1, o2) for all terms
    sigma:     [out]    beta: [out]    sigma_in: [in]    inner: [rank]    kept in fp32
    act, tap:  at hidden places only: the function between A and B (``activation``), and what x is (``parts``)
    """

    low_rank: tuple[Tensor, Tensor] | None = None
    krons: tuple[tuple[Tensor, Tensor], ...] = ()
    sigma: Tensor | None = None
    beta: Tensor | None = None
    sigma_in: Tensor | None = None
    inner: Tensor | None = None
    act: int = IDENTITY
    tap: int = 0


class KronTerm(NamedTuple):
    """One row of a kron table: where its factors lie (UNITs) and their shapes."""

    w1_off: int
    w2_off: int
    o1: int
    i1: int
    o2: int
    i2: int


@dataclass(frozen=True, eq=False)
class Directory:
    """The head of a block, on the host.

    sites:      int32 [sites, SITE_WORDS]
    krons:      per site, its terms
    records:    operators beyond the normal form
    signature:  equal for two blocks exactly if all their shapes, and so all their offsets, are equal
    nbytes:     of the whole block
    """

    sites: Words
    krons: tuple[tuple[KronTerm, ...], ...]
    records: tuple[Record, ...]
    signature: bytes
    nbytes: int

    @cached_property
    def kinds(self) -> frozenset[Kind]:
        """Kinds of its records."""
        return frozenset(record.kind for record in self.records)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def row_stride(columns: int, dtype: torch.dtype) -> int:
    """Elements from one row of a factor to the next."""
    return round_up(columns, UNIT // dtype.itemsize)


def pack(geometry: Geometry, terms: Mapping[int, SiteTerms], records: Sequence[Extra] = ()) -> Tensor:
    """The image of an adapter: uint8 [nbytes] on the CPU, nbytes a multiple of ALIGN.

    terms:    by site index; sites that are not named have no operators
    records:  operators beyond the normal form
    Factors are rounded once to the geometry's dtype. LayoutError if a shape does not fit its site.
    """
    for site, term in terms.items():
        _check(geometry, site, term)
    plan = _Plan(geometry, terms, records)
    image = torch.zeros(plan.nbytes, dtype=torch.uint8)
    image[: plan.head.nbytes].numpy()[:] = plan.head.view(np.uint8)
    for offset, tensor, dtype in plan.pieces:
        rows, columns = tensor.shape
        stride = row_stride(columns, dtype)
        start = offset * UNIT
        view = image[start : start + rows * stride * dtype.itemsize].view(dtype).view(rows, stride)
        view[:, :columns].copy_(tensor)
    return image


def directory(image: Tensor) -> Directory:
    """Read the head of an image (or of a block on any device). LayoutError if it is not of this format."""
    header = _words(image, HEADER_WORDS)
    if header is None or int(header[0]) != MAGIC:
        name = "too few bytes" if header is None else f"a first word of {int(header[0]):#x}"
        raise LayoutError(f"image: expected a block of format {IMAGE_FORMAT}, got {name}")
    sites, nbytes, head_units = int(header[1]), int(header[2]) * ALIGN, int(header[3])
    head = _words(image, head_units * UNIT // 4)
    if head is None or nbytes != image.numel() or HEADER_WORDS + sites * SITE_WORDS > head.size:
        raise LayoutError(f"image: its header names {nbytes} bytes, got {image.numel()}")
    table = head[HEADER_WORDS : HEADER_WORDS + sites * SITE_WORDS].reshape(sites, SITE_WORDS)
    krons = tuple(tuple(_kron_terms(head, int(row[KRON_OFF]), int(row[KRON_COUNT]))) for row in table)
    records = tuple(extras.read(head[int(header[5]) :], int(header[4])))
    return Directory(table, krons, records, hashlib.sha256(head.tobytes()).digest(), nbytes)


class Views:
    """Zero-copy views of what lies in a buffer of blocks, an arena or one image.

    buffer:  uint8 [bytes], any device
    dtype:   of the factors
    """

    def __init__(self, buffer: Tensor, dtype: torch.dtype) -> None:
        self._factors = buffer.view(dtype)
        self._vectors = buffer.view(torch.float32)
        self._integers = buffer.view(torch.int32)

    def matrix(self, start: int, offset: int, rows: int, columns: int) -> Tensor:
        """The factor [rows, columns] at ``offset`` UNITs in the block at byte ``start``."""
        return self._of(self._factors, start, offset, rows, columns)

    def piece(self, start: int, piece: Piece) -> Tensor:
        """The tensor [rows, columns] of a record in the block at byte ``start``."""
        flat = {FACTOR: self._factors, INTEGER: self._integers}.get(piece.code, self._vectors)
        return self._of(flat, start, piece.offset, piece.rows, piece.columns)

    @staticmethod
    def _of(flat: Tensor, start: int, offset: int, rows: int, columns: int) -> Tensor:
        first = flat.storage_offset() + (start + offset * UNIT) // flat.itemsize
        return flat.as_strided((rows, columns), (row_stride(columns, flat.dtype), 1), first)

    def vector(self, start: int, offset: int, length: int) -> Tensor | None:
        """The fp32 vector [length] at ``offset`` UNITs in the block at byte ``start``; None at offset 0."""
        first = self._vectors.storage_offset() + (start + offset * UNIT) // 4
        return self._vectors.as_strided((length,), (1,), first) if offset else None


def unpack(geometry: Geometry, block: Tensor, head: Directory | None = None) -> dict[int, SiteTerms]:
    """The operators of a block as zero-copy views of it, by site index.

    block:  uint8 [nbytes], an image or its copy inside an arena, on any device
    head:   its directory if it has been read already
    B is viewed as [out, rank], which is how SiteTerms speaks of it, though its rows lie along out.
    """
    head = head or directory(block)
    views = Views(block, geometry.dtype)
    terms: dict[int, SiteTerms] = {}
    for site, row in enumerate(head.sites.tolist()):
        if not any(row):
            continue
        shape, rank = geometry.sites[site], row[RANK]
        low_rank = None
        if rank:
            b = views.matrix(0, row[B_OFF], rank, shape.out_features)
            low_rank = (views.matrix(0, row[A_OFF], rank, shape.in_features), b.T)
        terms[site] = SiteTerms(
            low_rank,
            tuple(
                (views.matrix(0, k.w1_off, k.o1, k.i1), views.matrix(0, k.w2_off, k.o2, k.i2)) for k in head.krons[site]
            ),
            views.vector(0, row[SIGMA_OFF], shape.out_features),
            views.vector(0, row[BETA_OFF], shape.out_features),
            views.vector(0, row[SIGMA_IN_OFF], shape.in_features),
            views.vector(0, row[INNER_OFF], rank),
            row[ACT] % (1 << TAP_SHIFT),
            row[ACT] >> TAP_SHIFT,
        )
    return terms


def unpack_records(geometry: Geometry, block: Tensor, head: Directory | None = None) -> tuple[Extra, ...]:
    """The operators beyond the normal form, as zero-copy views [rows, columns]."""
    views = Views(block, geometry.dtype)
    return tuple(
        Extra(r.kind, r.place, tuple(None if p is None else views.piece(0, p) for p in r.pieces), r.options)
        for r in (head or directory(block)).records
    )


class _Plan:
    """Offsets of every piece of one image; ``head`` holds the words up to the factors."""

    def __init__(self, geometry: Geometry, terms: Mapping[int, SiteTerms], records: Sequence[Extra]) -> None:
        self.pieces: list[tuple[int, Tensor, torch.dtype]] = []
        tables, cursor = {}, HEADER_WORDS + len(geometry.sites) * SITE_WORDS
        for site in sorted(terms):
            if terms[site].krons:
                cursor = tables[site] = round_up(cursor, UNIT // 4)
                cursor += KRON_WORDS * len(terms[site].krons)
        first_record = cursor
        cursor += sum(record.words for record in records)
        head_units = round_up(cursor * 4, UNIT) // UNIT
        self.head: Words = np.zeros(head_units * UNIT // 4, dtype=np.int32)
        self._units = head_units
        last_word = HEADER_WORDS + len(geometry.sites) * SITE_WORDS
        sites = self.head[HEADER_WORDS:last_word].reshape(-1, SITE_WORDS)
        # rows of most factors are whole cache lines; begin them at one
        self._units = round_up(self._units, ALIGN // UNIT)
        for members in geometry.members:
            present = [site for site in members if site in terms]
            self._place_low_rank(sites, terms, present, geometry.dtype)
            for site in present:
                self._place_krons(sites[site], terms[site], tables.get(site, 0), geometry.dtype)
        for site in sorted(terms):
            self._place_vectors(sites[site], terms[site])
        extras.write(self.head[first_record:], records, [self._place_pieces(r, geometry.dtype) for r in records])
        self.nbytes = round_up(self._units * UNIT, ALIGN)
        if self._units > np.iinfo(np.int32).max:
            raise LayoutError(f"image: expected at most {np.iinfo(np.int32).max * UNIT} bytes, got {self.nbytes}")
        self.head[:6] = MAGIC, len(geometry.sites), self.nbytes // ALIGN, head_units, len(records), first_record

    def _place(self, tensor: Tensor, dtype: torch.dtype) -> int:
        offset = self._units
        self.pieces.append((offset, tensor, dtype))
        self._units += tensor.shape[0] * row_stride(tensor.shape[1], dtype) * dtype.itemsize // UNIT
        return offset

    def _place_vectors(self, row: Words, term: SiteTerms) -> None:
        row[ACT] = term.act | term.tap << TAP_SHIFT
        vectors = (SIGMA_OFF, term.sigma), (BETA_OFF, term.beta), (SIGMA_IN_OFF, term.sigma_in), (INNER_OFF, term.inner)
        for word, tensor in vectors:
            if tensor is not None:
                row[word] = self._place(tensor[None], torch.float32)

    def _place_pieces(self, record: Extra, dtype: torch.dtype) -> list[Piece | None]:
        matrices = [None if t is None else t.reshape(1, -1) if t.dim() < 2 else t for t in record.tensors]
        return [
            None if m is None else Piece(self._place(m, m.dtype), m.shape[0], m.shape[1], code_of(m, dtype))
            for m in matrices
        ]

    def _place_low_rank(
        self, sites: Words, terms: Mapping[int, SiteTerms], present: Sequence[int], dtype: torch.dtype
    ) -> None:
        pairs = [(sites[site], pair) for site in present if (pair := terms[site].low_rank) is not None]
        for row, (a, _) in pairs:
            row[A_OFF], row[RANK] = self._place(a, dtype), a.shape[0]
        for row, (_, b) in pairs:
            row[B_OFF] = self._place(b.T, dtype)

    def _place_krons(self, row: Words, term: SiteTerms, table: int, dtype: torch.dtype) -> None:
        if not term.krons:
            return
        row[KRON_OFF], row[KRON_COUNT] = table * 4 // UNIT, len(term.krons)
        for i, (w1, w2) in enumerate(term.krons):
            words = (self._place(w1, dtype), self._place(w2, dtype), *w1.shape, *w2.shape)
            self.head[table + i * KRON_WORDS : table + (i + 1) * KRON_WORDS] = words


def _check(geometry: Geometry, site: int, term: SiteTerms) -> None:
    if not 0 <= site < len(geometry.sites):
        raise LayoutError(f"terms: expected site indices below {len(geometry.sites)}, got {site}")
    shape = geometry.sites[site]
    wide, tall = shape.in_features, shape.out_features
    if term.low_rank is not None:
        a, b = term.low_rank
        rank = a.shape[0]
        if rank < 1 or tuple(a.shape) != (rank, wide) or tuple(b.shape) != (tall, rank):
            raise LayoutError(
                f"site {site} low_rank: expected A [rank, {wide}] and B [{tall}, rank], "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
    for w1, w2 in term.krons:
        shapes = (tuple(w1.shape), tuple(w2.shape))
        if any(len(s) != 2 for s in shapes) or tuple(np.multiply(*shapes).tolist()) != (tall, wide):
            raise LayoutError(
                f"site {site} krons: expected factors of a [{tall}, {wide}] matrix, got {shapes[0]} and {shapes[1]}"
            )
    if len({(w1.shape[0], w2.shape[0]) for w1, w2 in term.krons}) > 1:
        shapes_out = [(w1.shape[0], w2.shape[0]) for w1, w2 in term.krons]
        raise LayoutError(f"site {site} krons: expected one (o1, o2) for all terms, got {shapes_out}")
    rank = 0 if term.low_rank is None else term.low_rank[0].shape[0]
    for name, length in (("sigma", tall), ("beta", tall), ("sigma_in", wide), ("inner", rank)):
        tensor = getattr(term, name)
        if tensor is not None and tuple(tensor.shape) != (length,):
            raise LayoutError(f"site {site} {name}: expected [{length}], got {list(tensor.shape)}")


def _words(image: Tensor, count: int) -> Words | None:
    if image.dtype != torch.uint8 or image.dim() != 1 or image.numel() < 4 * count:
        return None
    return image[: 4 * count].cpu().contiguous().numpy().view(np.int32).copy()


def _kron_terms(head: Words, offset: int, count: int) -> Iterator[KronTerm]:
    start = offset * UNIT // 4
    for _ in range(count):
        yield KronTerm(*head[start : start + KRON_WORDS].tolist())
        start += KRON_WORDS
