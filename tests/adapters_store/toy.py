"""Adapters said in a line or two, for a backbone of one layer; what they compute is asked of the real kernels."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.adapters_store.banks import shared_digests
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.composition import joined
from weft.adapters_store.merge import Member, merge
from weft.adapters_store.operators import Factor, Operator, ParsedAdapter, SiteOperators
from weft.adapters_store.parts import Part
from weft.adapters_store.sites import CatalogueInfo, EmbeddingInfo, HiddenInfo, LayerInfo, NormInfo, SiteInfo
from weft.adapters_store.tensor_refs import TensorRef
from weft.kernels import dispatch
from weft.kernels.batch import Block, Segment
from weft.kernels.dispatch import Kernels
from weft.kernels.layout import ALIGN, Geometry, SiteShape, directory

WIDE, TALL, HEADS, SIZE, WORDS = 12, 20, 2, 4, 9
LINEAR, NORM, EMBEDDING = "layer.linear", "layer.norm", "embed"
DTYPES = {torch.float32: "F32", torch.int32: "I32"}
TAPS = ("h", "h+x_res", "x_res", "ln_x")


class Backbone:
    """A SiteCatalogue: one linear with a bias, one norm, one place behind each sublayer of two layers, an embedding."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        self.weight = torch.randn(TALL, WIDE, generator=random)
        self.bias = torch.randn(TALL, generator=random)
        layers = tuple(LayerInfo(f"layer{i}", f"layer{i}.attn", HEADS, SIZE, SIZE, WIDE) for i in range(2))
        self.info = CatalogueInfo(
            digest="d" * 64,
            dtype="float32",
            sites=(SiteInfo(LINEAR, WIDE, TALL, True, "linear"),),
            groups=(1,),
            modules=frozenset({LINEAR, NORM, EMBEDDING}),
            norms=(NormInfo(NORM, WIDE, False),),
            hidden=tuple(HiddenInfo(i, after, WIDE, TAPS) for i in range(2) for after in ("attention", "mlp")),
            layers=layers,
            embedding=EmbeddingInfo(EMBEDDING, WORDS, WIDE),
        )

    def parameter(self, path: str) -> Tensor | None:
        """The linear's own."""
        return {f"{LINEAR}.weight": self.weight, f"{LINEAR}.bias": self.bias}.get(path)

    @property
    def geometry(self) -> Geometry:
        """The linear and the hidden places."""
        shapes = (SiteShape(WIDE, TALL), *(SiteShape(WIDE, WIDE) for _ in self.info.hidden))
        return Geometry(shapes, (1,) * len(shapes), torch.float32, len(self.info.hidden))


@dataclass
class File:
    """A weights file in the making."""

    data: bytearray = field(default_factory=bytearray)

    def put(self, tensor: Tensor, name: str = "") -> TensorRef:
        """One more tensor."""
        raw, start = tensor.contiguous().numpy().tobytes(), len(self.data)
        self.data += raw
        name = name or f"tensor{start}"
        return TensorRef(name, tuple(tensor.shape), DTYPES[tensor.dtype], start, start + len(raw))

    def factor(self, tensor: Tensor) -> Factor:
        """One more tensor, as a factor of a Kronecker product."""
        return Factor(self.put(tensor))

    def adapter(self, operators: Sequence[Operator] = (), parts: Sequence[Part] = ()) -> ParsedAdapter:
        """What a parser would say, the file read."""
        sites = {LINEAR: SiteOperators(tuple(operators))} if operators else {}
        return ParsedAdapter("TOY", "toy", sites, weights=memoryview(bytes(self.data)), parts=tuple(parts))


def compose(*members: Member) -> ParsedAdapter:
    """What a request that names these comes to."""
    return merge(joined(members), "COMPOSED", "weft")


@dataclass(frozen=True)
class Loaded:
    """One adapter in an arena of its own, and rows that it acts on."""

    kernels: Kernels
    block: Block

    def linear(self, x: Tensor, backbone: Backbone) -> Tensor:
        """x [tokens, in] through the adapted linear, all of it one request."""
        rows = self.kernels.rows([Segment(0, len(x), self.block)])
        fed = self.kernels.scale_input(x, rows, 0) if self.kernels.input_scaled(rows, 0) else x
        y = F.linear(fed, backbone.weight, backbone.bias)
        self.kernels.apply(y, x, rows, 0)
        return y

    def hidden(self, h: Tensor, x_res: Tensor, ln_x: Tensor, place: int) -> Tensor:
        """What becomes of a sublayer's output."""
        rows, h = self.kernels.rows([Segment(0, len(h), self.block)]), h.clone()
        self.kernels.hidden(h, x_res, ln_x, rows, place)
        return h

    def embed(self, out: Tensor, ids: Tensor) -> Tensor:
        """What becomes of the embedding's output for these ids."""
        rows, out = self.kernels.rows([Segment(0, len(out), self.block)]), out.clone()
        self.kernels.embed(out, ids, rows, ())
        return out


def load(parsed: ParsedAdapter, backbone: Backbone) -> Loaded:
    """Compile an adapter and put it where kernels read it, factors that it would share with others behind it."""
    shared: dict[str, Tensor] = {}
    image, report = compile_adapter(parsed, backbone, backbone.geometry, 1 << 20, shared.__setitem__)
    assert report.device_bytes == image.numel() == block_bytes(parsed, backbone.geometry, backbone)
    assert image.numel() % ALIGN == 0
    images = [image, *(shared[digest] for digest in shared_digests(directory(image)))]
    offsets = accumulate((len(each) for each in images), initial=0)
    block, *banks = (Block(at, at, len(each), directory(each)) for at, each in zip(offsets, images, strict=False))
    kernels = dispatch.load("torch", torch.cat(images), backbone.geometry, 1 << 20)
    return Loaded(kernels, replace(block, banks=tuple(banks)))
