"""Our own ``X_KRONA_B``: KronA^B and KronA^B_res, a Kronecker product beside a feed-forward part, with no function.

    mlp(..) + scale·tap (A ⊗ B) + bias  (+ residual_scale·tap)

Tensors at ``base_model.model.<decoder layer>.mlp.``: ``krona_A`` [a1, a2] and ``krona_B`` [b1, b2] with
a1·b1 = a2·b2 = d, where wanted ``bias`` [d], and with ``variant`` ``B_res`` ``residual_scale``, one number. Settings:
``scale``; ``tap``, ``ln_x`` or ``x_res``; ``variant``, ``B`` or ``B_res``; those of ``native_common``.
"""

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import DIALECT, read_common
from weft.adapters_store.formats.native_places import by_place, read_tap, require_tap
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.tensors import Roles, missing_tensor, require_shape
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import MLP, Bottleneck, KronSum
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, HiddenInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

METHOD = "X_KRONA_B"

A, B, BIAS, RESIDUAL = "krona_A", "krona_B", "bias", "residual_scale"
VARIANTS = ("B", "B_res")
TAPS = ("ln_x", "x_res")

SERVES = (
    Served("KronA^B", "2212.10650", "bottleneck (kron)", "weft X_KRONA_B", survey=True),
    Served("KronA^B_res", "2212.10650", "bottleneck (kron, skip)", "weft X_KRONA_B, variant B_res", survey=True),
)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    scale, tap = settings.signed_number("scale"), read_tap(settings, TAPS)
    variant = settings.text("variant", required=True)
    if variant not in VARIANTS:
        raise expected("variant", f"one of {', '.join(VARIANTS)}", show(variant))
    settings.finish(METHOD)
    found = by_place(header, [A, B, BIAS, RESIDUAL], catalogue)
    parts = tuple(_part(scale, tap, variant == VARIANTS[1], *place) for place in found)
    return ParsedAdapter(METHOD, DIALECT, {}, parts=parts)


def _part(scale: float, tap: str, residual: bool, name: str, place: HiddenInfo, tensors: Roles) -> Bottleneck:
    if place.after != MLP:
        raise expected(next(iter(tensors.values())).name, "the mlp of a decoder layer", name)
    require_tap(tap, name, place)
    for role in (A, B, *([RESIDUAL] if residual else [])):
        if role not in tensors:
            raise missing_tensor(name, role, f"{name} has another tensor")
    skip, bias = tensors.get(RESIDUAL), tensors.get(BIAS)
    if skip is not None:
        if not residual:
            raise expected(skip.name, "no such tensor", "one", "variant is B")
        if skip.elements != 1:
            raise expected(skip.name, "one number", list(skip.shape))
    if bias is not None:
        require_shape(bias, (place.features,), f"{name} is {place.features} wide")
    product = _product(tensors[A], tensors[B], place.features, scale)
    return Bottleneck(place.layer, MLP, tap, "identity", product, bias, None, None, skip)


def _product(a: TensorRef, b: TensorRef, width: int, scale: float) -> KronSum:
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            raise expected(tensor.name, "a matrix", list(tensor.shape))
    (a1, a2), (b1, b2) = a.shape, b.shape
    if (a1 * b1, a2 * b2) != (width, width):
        got = f"{A} [{a1}, {a2}] and {B} [{b1}, {b2}]"
        raise expected(a.name, f"factors of a [{width}, {width}] matrix (in, out)", got)
    w1 = Computed(a.name, (a2, a1), lambda t: t.T * scale, (a,))
    w2 = Computed(b.name, (b2, b1), lambda t: t.T, (b,))
    return KronSum(((w1, w2),))
