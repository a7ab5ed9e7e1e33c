"""The door of this room: one interface, one implementation per kind of device."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from weft.kernels.batch import BatchError, Rows, Segment
from weft.kernels.layout import ALIGN, FACTOR_DTYPES, Geometry

NAMES = ("auto", "torch", "triton")


class KernelsUnavailable(RuntimeError):
    """The implementation asked for cannot run here."""


class Kernels(ABC):
    """Applies adapters to rows, straight from the bytes of one arena.

    arena:     uint8 [bytes], where blocks lie; the caller writes blocks, this class only reads
    geometry:  the sites of the backbone
    """

    name: str

    def __init__(self, arena: Tensor, geometry: Geometry) -> None:
        if arena.dtype != torch.uint8 or arena.dim() != 1 or not arena.is_contiguous():
            raise ValueError(f"arena: expected contiguous uint8 [bytes], got {arena.dtype} {list(arena.shape)}")
        if arena.numel() % ALIGN:
            raise ValueError(f"arena: expected a multiple of {ALIGN} bytes, got {arena.numel()}")
        self.arena = arena
        self.geometry = geometry
        self._widths = [(geometry.out_features(g), geometry.in_features(g)) for g in range(len(geometry.groups))]

    @abstractmethod
    def rows(self, segments: Sequence[Segment]) -> Rows:
        """Prepare a batch. The result may be applied as long as its blocks stay where they are.

        segments:  cover rows 0..tokens in order; one per request, so that a request's rows are computed
                   alike in every batch of this shape
        """

    @abstractmethod
    def apply(self, y: Tensor, x: Tensor, rows: Rows, group: int) -> None:
        """Add the adapters' part to the outputs of a group of sites, in place; base rows keep every bit.

            y = sigma * y + (x A^T) B^T + sum of x kron(w1, w2)^T + beta

        y:  [tokens, outputs of the group side by side]   fp32, bf16 or fp16; rows may be strided
        x:  [tokens, in_features]   the input as it was *before* sigma_in; rows may be strided
        """

    @abstractmethod
    def scale_input(self, x: Tensor, rows: Rows, site: int) -> Tensor:
        """A copy of x [tokens, in_features] in which rows with sigma_in at this site are multiplied by it."""

    def input_scaled(self, rows: Rows, site: int) -> tuple[tuple[int, int], ...]:
        """Row ranges whose adapter has sigma_in at this site; known on the host, costs no device work."""
        return rows.input_scaled(site)

    def touches(self, rows: Rows, group: int) -> bool:
        """Whether ``apply`` would change anything at this group; known on the host, costs no device work."""
        return bool(rows.touched[group])

    @property
    def working_set_bytes(self) -> int:
        """Bytes held beside the arena, in the form that this device computes fastest on."""
        return 0

    @property
    def working_set_misses(self) -> int:
        """Adapters, counted once per ``rows``, that did not fit the working set's budget and run slower."""
        return 0

    def forget(self, key: int) -> None:  # noqa: B027 - keeping nothing is a right answer
        """The block that was loaded under this key is gone; nothing of it may be kept."""

    def _check(self, y: Tensor | None, x: Tensor, rows: Rows, group: int) -> None:
        tall, wide = self._widths[group]
        if y is not None:
            self._check_one("y", y, rows.tokens, tall)
        self._check_one("x", x, rows.tokens, wide)

    def _check_one(self, name: str, tensor: Tensor, tokens: int, width: int) -> None:
        if tensor.shape != (tokens, width):
            raise BatchError(f"{name}: expected [{tokens}, {width}], got {list(tensor.shape)}")
        if tensor.dtype not in FACTOR_DTYPES:
            raise BatchError(f"{name}: expected fp32, bf16 or fp16, got {tensor.dtype}")
        if tensor.stride(1) != 1 and width > 1 and tokens:
            raise BatchError(f"{name}: expected columns side by side, got strides {tensor.stride()}")
        if tensor.device != self.arena.device:
            raise BatchError(f"{name}: expected a tensor on {self.arena.device}, got {tensor.device}")


def load(name: str, arena: Tensor, geometry: Geometry, working_set_bytes_max: int) -> Kernels:
    """The implementation called ``name``: ``torch``, ``triton``, or ``auto`` for the arena's device.

    working_set_bytes_max:  bytes that may be held beside the arena (only ``torch`` does)
    """
    if name not in NAMES:
        raise ValueError(f"kernels: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "auto":
        name = "triton" if arena.device.type == "cuda" else "torch"
    if name == "torch":
        from weft.kernels.twin import TorchKernels

        return TorchKernels(arena, geometry, working_set_bytes_max)
    try:
        import triton
    except ImportError:
        raise KernelsUnavailable("kernels=triton needs the triton package, which is not installed") from None
    if arena.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise KernelsUnavailable("kernels=triton needs a GPU (or TRITON_INTERPRET=1), got an arena on the CPU")
    from weft.kernels.device import TritonKernels

    return TritonKernels(arena, geometry)
