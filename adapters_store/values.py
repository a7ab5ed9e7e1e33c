"""Reads the numbers of an adapter's tensors, out of bytes that are ours already, and refuses those that are none."""

import torch
from torch import Tensor

from weft.adapters_store.errors import AdapterInvalid, expected
from weft.adapters_store.operators import ParsedAdapter, TensorRef
from weft.adapters_store.sites import SiteCatalogue

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LARGE = 1e4

_BITS = {2: torch.int16, 4: torch.int32}
_COMPARE_BYTES = 64 << 20


class Values:
    """The tensors of one parsed adapter, a site at a time.

    dtypes:  of the tensors read so far
    large:   the largest value read so far and its tensor, if that is suspicious
    """

    def __init__(self, parsed: ParsedAdapter) -> None:
        if parsed.weights is None:
            raise ValueError("expected an adapter whose data was read, got its header only")
        self._weights = parsed.weights
        self._site: dict[str, Tensor] = {}
        self.dtypes: set[torch.dtype] = set()
        self.large: tuple[float, str] = (LARGE, "")

    def next_site(self) -> None:
        """Let go of the tensors read so far."""
        self._site.clear()

    def read(self, ref: TensorRef) -> Tensor:
        """The tensor in fp32; not to be written to. AdapterInvalid if a value is not finite."""
        if ref.name in self._site:
            return self._site[ref.name]
        tensor = self._raw(ref.start, ref.stop, ref.dtype)
        self.dtypes.add(tensor.dtype)
        value = tensor.float().view(ref.shape)
        if not bool(torch.isfinite(value).all()):
            raise expected(ref.name, "finite values", "NaN or infinity")
        self.large = max(self.large, (float(value.abs().max()), ref.name))
        self._site[ref.name] = value
        return value

    def require_copy(self, ref: TensorRef, path: str, catalogue: SiteCatalogue) -> None:
        """The tensor equals the backbone's parameter at ``path`` bit for bit, in the dtype that is served."""
        parameter = catalogue.parameter(path)
        wanted = f"a copy of the backbone's {path}"
        if parameter is None:
            raise expected(ref.name, wanted, "one of a parameter that it does not have")
        if tuple(parameter.shape) != ref.shape:
            why = "a resized vocabulary is not served"
            raise expected(ref.name, f"{wanted}, {list(parameter.shape)}", list(ref.shape), why)
        flat, width = parameter.detach().reshape(-1), (ref.stop - ref.start) // ref.elements
        step = _COMPARE_BYTES // width
        for at in range(0, ref.elements, step):
            stop = min(at + step, ref.elements)
            theirs = self._raw(ref.start + at * width, ref.start + stop * width, ref.dtype).to(flat.dtype)
            ours = flat[at:stop].cpu()
            bits = _BITS[ours.dtype.itemsize]
            if not torch.equal(ours.view(bits), theirs.view(bits)):
                why = "trained weights of the backbone, or a resized vocabulary, are not served"
                raise expected(ref.name, f"{wanted}, equal bit for bit", "other values", why)

    def _raw(self, start: int, stop: int, dtype: str) -> Tensor:
        # the data of a file need not be aligned; a copy is
        return torch.frombuffer(bytearray(self._weights[start:stop]), dtype=DTYPES[dtype])


def rounded(tensor: Tensor, dtype: torch.dtype, field: str) -> Tensor:
    """The tensor in the serving dtype, rounded once. AdapterInvalid if a value does not fit it."""
    result = tensor.to(dtype)
    if not bool(torch.isfinite(result).all()):
        largest = float(tensor.abs().max())
        raise AdapterInvalid(
            f"{field}: expected values that {name_of(dtype)} can hold (at most {torch.finfo(dtype).max:g}), "
            f"got {largest:g} with the scale folded in",
            field,
        )
    return result


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` rather than ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
