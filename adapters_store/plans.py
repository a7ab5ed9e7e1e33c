"""Operators beyond the normal form as records of a block: planned from shapes alone, filled when values are read.

A plan knows the size of what it will be before a byte is read, so budgets are judged first; both come from one place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.adapters_store.errors import expected
from weft.adapters_store.operators import Bank, Columns, Dense, LowRank, Operator, Rows, Shared, Sparse
from weft.adapters_store.parts import (
    GATE_INPUTS,
    TAPS,
    Bottleneck,
    EmbeddingEntries,
    EmbeddingPair,
    ExpertPair,
    Gate,
    KronSum,
    KVPrefix,
    Matrix,
    NormOverride,
    Part,
    RowOverride,
    SideNet,
    SoftPrompt,
    TokenMask,
)
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Value
from weft.adapters_store.values import Values, rounded
from weft.kernels.activation import NAMES as ACTS
from weft.kernels.extras import PIECE_WORDS, RECORD_WORDS, Extra, Kind
from weft.kernels.layout import row_stride

FP32 = torch.float32
# blocks hold indices, and kernels the ends of rows, in 32 bits
PLACES_MAX = 2**31 - 1
Read = Callable[[Values], Tensor]


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """One tensor of a record: its shape [rows, columns], the dtype it is stored in, and how to read it in fp32."""

    rows: int
    columns: int
    dtype: torch.dtype
    name: str
    read: Read

    @property
    def nbytes(self) -> int:
        """What it takes in a block, its rows padded."""
        return self.rows * row_stride(self.columns, self.dtype) * self.dtype.itemsize

    def fill(self, values: Values) -> Tensor:
        """The tensor as it is stored."""
        found = self.read(values).reshape(self.rows, self.columns)
        return found.to(torch.int32) if self.dtype == torch.int32 else rounded(found, self.dtype, self.name)


@dataclass(frozen=True, slots=True)
class RecordPlan:
    """One record, what it is called in the report, the module that the report names, and the bank that it uses."""

    kind: Kind
    place: int
    options: tuple[int, ...]
    pieces: tuple[PiecePlan | None, ...]
    module: str
    words: str
    rank: int = 0
    bank: Bank | None = None

    @property
    def head_words(self) -> int:
        """Words of the record itself."""
        return RECORD_WORDS + len(self.options) + PIECE_WORDS * len(self.pieces)

    @property
    def nbytes(self) -> int:
        """What its pieces take in a block."""
        return sum(piece.nbytes for piece in self.pieces if piece is not None)

    def fill(self, values: Values) -> Extra:
        """The record's content."""
        tensors = tuple(None if piece is None else piece.fill(values) for piece in self.pieces)
        return Extra(self.kind, self.place, tensors, self.options)


def piece(
    value: Value, shape: tuple[int, int], dtype: torch.dtype, change: Callable[[Tensor], Tensor] | None = None
) -> PiecePlan:
    """A float tensor, changed on the way where that is asked."""
    read: Read = (lambda values: values.read(value)) if change is None else (lambda values: change(values.read(value)))
    return PiecePlan(*shape, dtype, value.name, read)


def vector(value: Value | None) -> PiecePlan | None:
    """A vector in fp32, or None."""
    return None if value is None else piece(value, (1, value.elements), FP32)


def integers(ref: Value, below: int, ascending: bool = True) -> PiecePlan:
    """Indices below a limit. AdapterInvalid, from shapes alone, where a block could not hold the largest of them."""
    if below > PLACES_MAX:
        raise expected(ref.name, f"indices into at most {PLACES_MAX} places", below, "blocks hold them in 32 bits")
    return PiecePlan(1, ref.elements, torch.int32, ref.name, lambda values: values.indices(ref, below, ascending))


def plan_delta(operator: Operator, site: SiteInfo, place: int, dtype: torch.dtype) -> RecordPlan | None:
    """The record of an operator of a linear; None for those that the normal form holds."""
    tall, wide = site.out_features, site.in_features

    def record(kind: Kind, words: str, *pieces: PiecePlan | None, rank: int = 0) -> RecordPlan:
        return RecordPlan(kind, place, (), pieces, site.path, words, rank)

    match operator:
        case Sparse(index, values):
            n = index.elements
            return record(Kind.SPARSE, f"sparse n={n}", integers(index, tall * wide), piece(values, (1, n), dtype))
        case Rows(index, rows):
            n = index.elements
            return record(Kind.ROWS, f"rows k={n}", integers(index, tall, False), piece(rows, (n, wide), dtype))
        case Columns(index, columns):
            n = index.elements
            turned = piece(columns, (n, tall), dtype, lambda t: t.T)
            return record(Kind.COLUMNS, f"columns k={n}", integers(index, wide, False), turned)
        case Dense(delta):
            return record(Kind.DENSE, "dense", piece(delta, (tall, wide), dtype))
        case LowRank(a, b, scale, Gate() as gate):
            rank = a.shape[0]
            pair = piece(a, (rank, wide), dtype), piece(b, (rank, tall), dtype, lambda t: t.T * scale)
            return record(Kind.GATED, f"gated low_rank r={rank}", *pair, *_gate(gate, wide), rank=rank)
        case Shared(bank, inner, outer):
            rank = inner.elements
            diagonals = vector(inner), vector(outer)
            # the number is the compiler's to say
            return RecordPlan(Kind.SHARED, place, (0,), diagonals, site.path, f"shared low_rank r={rank}", rank, bank)
    return None


def plan_part(part: Part, info: CatalogueInfo, dtype: torch.dtype) -> RecordPlan | None:
    """The record of a part; None for a bottleneck that is ``plain``."""
    match part:
        case NormOverride(path, weight, bias):
            pieces = vector(weight), vector(bias)
            return RecordPlan(Kind.NORM, info.norm_index[path], (), pieces, path, "norm override")
        case Bottleneck():
            return None if part.plain else _bottleneck(part, info, dtype)
        case KVPrefix():
            return _prefix(part, info, dtype)
        case SoftPrompt(rows):
            count, width = rows.shape
            return _of_embedding(Kind.SOFT, info, f"soft prompt v={count}", piece(rows, (count, width), dtype))
        case RowOverride():
            return _row_override(part, info, dtype)
        case EmbeddingEntries():
            return _entries(part, info, dtype)
        case EmbeddingPair(a, b, scale, outer):
            rank = a.shape[0]
            left = piece(a, (a.shape[1], rank), dtype, lambda t: t.T)
            full = scale * _embedding_scale(info)
            right = piece(b, (rank, b.shape[0]), dtype, lambda t: t.T * full)
            words = f"low_rank r={rank}" if outer is None else f"scale out, low_rank r={rank}"
            return _of_embedding(Kind.EMBED_PAIR, info, words, left, right, vector(outer))
        case TokenMask(tokens):
            return RecordPlan(Kind.MASK, 0, tokens, (), "prompt", f"acts from the last of {len(tokens)} tokens on")
        case SideNet():
            return _side(part, dtype)
        case ExpertPair():
            return _experts(part, info, dtype)


def _experts(part: ExpertPair, info: CatalogueInfo, dtype: torch.dtype) -> RecordPlan:
    place, scale = info.experts_index[part.path], part.scale
    (count, rank, wide), tall = part.a.shape, part.b.shape[1]
    number = [name for name, _ in info.experts[place].parameters].index(part.parameter)
    # both along their long side, for rows are padded
    pieces = (
        piece(part.a, (count * rank, wide), dtype),
        piece(part.b, (count * rank, tall), dtype, lambda t: t.transpose(1, 2) * scale),
    )
    words = f"low_rank r={rank} of {count} experts in {part.parameter}"
    return RecordPlan(Kind.EXPERTS, place, (number,), pieces, part.path, words, rank)


def _side(part: SideNet, dtype: torch.dtype) -> RecordPlan:
    def stored(value: Value) -> PiecePlan:
        # whatever stands before the last axis counts as rows
        columns = value.shape[-1] if value.shape else 1
        return piece(value, (value.elements // columns, columns), dtype)

    layers = [value for pair in zip(part.downs, part.blocks, strict=True) for values in pair for value in values]
    whole = (*part.first, *part.up, *part.norm, *layers)
    width, count = part.first[0].shape[0], len(part.layers)
    pieces = (vector(part.gates), *(stored(value) for value in whole))
    options = (part.reduction, *part.layers)
    return RecordPlan(Kind.SIDE, 0, options, pieces, "hidden", f"side network of {count} layers, {width} wide")


def _of_embedding(kind: Kind, info: CatalogueInfo, words: str, *pieces: PiecePlan | None) -> RecordPlan:
    assert info.embedding is not None
    return RecordPlan(kind, 0, (), pieces, info.embedding.path, words)


def _embedding_scale(info: CatalogueInfo) -> float:
    """What an embedding multiplies its rows by: blocks hold what comes out of the module."""
    return info.embedding.scale if info.embedding is not None else 1.0


def _bottleneck(part: Bottleneck, info: CatalogueInfo, dtype: torch.dtype) -> RecordPlan:
    width = info.hidden[info.hidden_index[part.layer, part.after]].features
    maps = [list(_map(each, dtype)) for each in (part.down, part.up)]
    norm = (None, None) if part.norm is None else (vector(part.norm[0]), vector(part.norm[1]))
    gate = (None, None) if part.gate is None else _gate(part.gate, width)
    # rows of the maps as it were; in fp32 they would be larger than Kronecker terms are
    biases = [None if v is None else piece(v, (1, v.elements), dtype) for v in (part.down_bias, part.up_bias)]
    # epsilon as the bits of a float: options are integers
    epsilon = 0 if part.norm is None else int(torch.tensor(part.norm[2], dtype=FP32).view(torch.int32))
    terms = [len(each.terms) if isinstance(each, KronSum) else 0 for each in (part.down, part.up)]
    options = (TAPS.index(part.tap), ACTS.index(part.act), *terms, epsilon)
    pieces = (*norm, *gate, vector(part.skip), *biases, *maps[0], *maps[1])
    rank = 0 if part.up is None else part.down.shape[0]
    words = f"bottleneck r={rank} {part.act}" if rank else "hidden map"
    kind = " kron" if any(terms) else ""
    place = info.hidden_index[part.layer, part.after]
    return RecordPlan(Kind.BOTTLENECK, place, options, pieces, module_of(part, info), f"{words}{kind}", rank)


def module_of(part: Bottleneck, info: CatalogueInfo) -> str:
    """What a hidden place is called in reports."""
    return f"{info.layers[part.layer].path} {part.after}"


def _map(said: Matrix | KronSum | None, dtype: torch.dtype) -> Iterator[PiecePlan | None]:
    """One piece of a matrix; three of each term: w1, w2 and none, or w1, the transposed left and the right."""
    if isinstance(said, Matrix):
        yield piece(said.weight, said.shape, dtype)
    elif said is not None:
        for w1, *w2 in said.terms:
            (o1, i1), (rows, columns) = w1.shape, w2[0].shape
            yield piece(w1, (o1, i1), dtype)
            if len(w2) == 1:
                yield piece(w2[0], (rows, columns), dtype)
                yield None
            else:
                # both along their long side, for rows are padded
                yield piece(w2[0], (columns, rows), dtype, lambda t: t.T)
                yield piece(w2[1], (columns, w2[1].shape[1]), dtype)


def _prefix(part: KVPrefix, info: CatalogueInfo, dtype: torch.dtype) -> RecordPlan:
    layer = info.layers[part.layer]
    count, heads = part.keys.shape[0], layer.kv_heads

    def by_head(t: Tensor) -> Tensor:
        return t.reshape(count, heads, -1).transpose(0, 1)

    # a gate per token is a matrix as large as the prefix, or larger
    gate_dtype = dtype if part.gate_per_token else FP32
    pieces = (
        piece(part.keys, (heads * count, layer.key_size), dtype, by_head),
        piece(part.values, (heads * count, layer.value_size), dtype, by_head),
        *((None, None) if part.gate is None else _gate(part.gate, layer.features, gate_dtype)),
    )
    words = f"kv prefix p={count}{' gated' if part.gate else ''}"
    options = (count, int(part.shifts), int(part.gate_per_token), GATE_INPUTS.index(part.gate_input))
    return RecordPlan(Kind.PREFIX, part.layer, options, pieces, layer.attention, words)


def _row_override(part: RowOverride, info: CatalogueInfo, dtype: torch.dtype) -> RecordPlan:
    assert info.embedding is not None
    count, width = part.rows.shape
    ids, scale = part.ids, _embedding_scale(info)
    if isinstance(ids, tuple):
        listed = torch.tensor(ids)
        order = listed.argsort()
        id_piece = PiecePlan(1, count, torch.int32, part.rows.name, lambda values: listed[order])
        rows = piece(part.rows, (count, width), dtype, lambda t: t[order] * scale)
    else:
        id_piece = integers(ids, info.embedding.rows)
        rows = piece(part.rows, (count, width), dtype, lambda t: t * scale)
    return _of_embedding(Kind.EMBED_ROWS, info, f"rows n={count}", id_piece, rows)


def _entries(part: EmbeddingEntries, info: CatalogueInfo, dtype: torch.dtype) -> RecordPlan:
    assert info.embedding is not None
    count, scale = part.index.elements, _embedding_scale(info)
    index = integers(part.index, info.embedding.rows * info.embedding.features)
    values = piece(part.values, (1, count), dtype, lambda t: t * scale)
    return _of_embedding(Kind.EMBED_ENTRIES, info, f"entries n={count}", index, values)


def _gate(gate: Gate, wide: int, dtype: torch.dtype = FP32) -> tuple[PiecePlan, PiecePlan | None]:
    outputs = gate.weight.elements // wide
    return piece(gate.weight, (outputs, wide), dtype), vector(gate.bias)
