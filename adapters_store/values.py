"""Reads the numbers of an adapter's tensors, out of bytes that are ours already, and refuses those that are none."""

import torch
from torch import Tensor

from weft.adapters_store.errors import AdapterInvalid, expected
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.sites import SiteCatalogue, weight_of
from weft.adapters_store.tensor_refs import INTEGERS, Computed, TensorRef, Value

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I8": torch.int8,
}
LARGE = 1e4

_BITS = {2: torch.int16, 4: torch.int32}
_COMPARE_BYTES = 64 << 20


class Values:
    """The tensors of one parsed adapter, a site at a time.

    dtypes:  of the tensors read so far
    large:   the largest value read so far and its tensor, if that is suspicious
    """

    def __init__(self, parsed: ParsedAdapter, catalogue: SiteCatalogue) -> None:
        if parsed.weights is None:
            raise ValueError("expected an adapter whose data was read, got its header only")
        self._weights, self.catalogue = parsed.weights, catalogue
        self._site: dict[str, Tensor] = {}
        # by identity, with the value itself so that the identity stays its own
        self._computed: dict[int, tuple[Computed, Tensor]] = {}
        self.dtypes: set[torch.dtype] = set()
        self.large: tuple[float, str] = (LARGE, "")

    def next_site(self) -> None:
        """Let go of the tensors read so far."""
        self._site.clear()
        self._computed.clear()

    def read(self, value: Value) -> Tensor:
        """The tensor in fp32, or a formula's integers, not to be written to. AdapterInvalid unless it is finite."""
        return self._compute(value) if isinstance(value, Computed) else self._read(value)

    def indices(self, ref: Value, below: int, ascending: bool = True) -> Tensor:
        """An integer tensor, flat, as int64: each in [0, below), each once, in ascending order where that is asked."""
        index = (self._formula(ref) if isinstance(ref, Computed) else self._source(ref)).long().reshape(-1)
        wrong = index[(index < 0) | (index >= below)]
        if len(wrong):
            raise expected(ref.name, f"indices from 0 to {below - 1}", int(wrong[0]))
        steps = index.diff() if ascending else index.sort().values.diff()
        if bool((steps <= 0).any()):
            wanted = "indices in ascending order, each once" if ascending else "indices that stand once each"
            raise expected(ref.name, wanted, "others")
        return index

    def _compute(self, value: Computed) -> Tensor:
        if id(value) not in self._computed:
            result = self._formula(value)
            # indices stay integers: fp32 counts to 2^24 only
            result = result.float() if result.is_floating_point() else result
            if not bool(torch.isfinite(result).all()):
                raise expected(value.name, "values that the method's formula can use", "NaN or infinity from it")
            self._computed[id(value)] = (value, result)
        return self._computed[id(value)][1]

    def _formula(self, value: Computed) -> Tensor:
        sources = [self._source(source) for source in value.sources]
        parameters = [weight_of(self.catalogue, path) for path in value.parameters]
        result = value.formula(*sources, *parameters)
        assert tuple(result.shape) == value.shape, f"{value.name}: the formula gives {list(result.shape)}"
        return result

    def _source(self, source: Value) -> Tensor:
        if isinstance(source, TensorRef) and source.dtype in INTEGERS:
            return self._raw(source.start, source.stop, source.dtype).view(source.shape)
        return self.read(source)

    def _read(self, ref: TensorRef) -> Tensor:
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

    def require_zeros(self, ref: TensorRef) -> None:
        """The tensor holds nothing else."""
        if bool(self._read(ref).any()):
            raise expected(ref.name, "zeros: the settings say that there is nothing", "other values")
        self.next_site()

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
