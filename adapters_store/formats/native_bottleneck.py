"""Our own ``X_BOTTLENECK``: h += gate · scale · (act(norm(tap) downᵀ + bias) upᵀ + bias) behind any sublayers.

Tensors at ``base_model.model.<place>.`` (``native_places``): ``down.weight`` [r, d], ``up.weight`` [d, r]; where wanted
``down.bias`` [r], ``up.bias`` [d], ``norm_before.weight`` and ``norm_before.bias`` [d] of a layer norm with epsilon
1e-5, ``gate.weight`` [1, d] and ``gate.bias`` [1] on the tap. A map of Compacter's kind, x Σ kron(S_i, L_i R_i), has in
the place of its weight ``down.phm.rule`` S [n, n, n], ``left`` L [n, in/n, k] and ``right`` R [n, k, out/n]. Settings:
``tap`` (h, h+x_res, x_res, ln_x: the sublayer's output, that and the residual stream, the stream, the sublayer's normed
input), ``act``, ``scale``, ``gate_scope``, and those of ``native_common``.
"""

from dataclasses import dataclass

from weft.adapters_store.errors import expected, quoted
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import DIALECT, only_one_of, read_common, times
from weft.adapters_store.formats.native_places import by_place, read_tap, require_tap
from weft.adapters_store.formats.phm_terms import kron_term, turned
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import Roles, missing_tensor, require_shape
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import Bottleneck, Gate, KronSum, Matrix
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, HiddenInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

METHOD = "X_BOTTLENECK"

NORM_WEIGHT, NORM_BIAS, GATE_WEIGHT, GATE_BIAS = "norm_before.weight", "norm_before.bias", "gate.weight", "gate.bias"
MAPS = ("down", "up")
OF_MAP = ("weight", "bias", "phm.rule", "phm.left", "phm.right")
ROLES = (*(f"{which}.{end}" for which in MAPS for end in OF_MAP), NORM_WEIGHT, NORM_BIAS, GATE_WEIGHT, GATE_BIAS)

# names that libraries use for them: those of ``weft.kernels.activation``
ACTS = {
    "identity": "identity",
    "linear": "identity",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leaky_relu": "leaky_relu",
    "leakyrelu": "leaky_relu",
}
NORM_EPSILON = 1e-5
PER_CALL = "per_call"

SERVES = (
    Served("Houlsby adapter", "1902.00751", "bottleneck", "weft X_BOTTLENECK", survey=True),
    Served("Pfeiffer adapter", "2005.00247", "bottleneck", "weft X_BOTTLENECK", survey=True),
    Served("Parallel adapter", "2110.04366", "bottleneck", "weft X_BOTTLENECK", survey=True),
    Served("AdaMix", "2205.12410", "bottleneck", "weft X_BOTTLENECK, of averaged weights", survey=True),
    Served("SparseAdapter", "2210.04284", "bottleneck", "weft X_BOTTLENECK, of masked weights", survey=True),
    Served("Compacter", "2106.04647", "bottleneck (kron)", "weft X_BOTTLENECK, phm", survey=True),
)


@dataclass(frozen=True, slots=True)
class _Config:
    tap: str
    act: str
    scale: float


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    tap, act, scale = read_tap(settings), settings.text("act", required=True), settings.signed_number("scale")
    if act not in ACTS:
        raise expected("act", f"one of {', '.join(ACTS)}", f'"{quoted(str(act))}"')
    why = "a gate that stays what the prompt made it is not served"
    settings.choice("gate_scope", (PER_CALL,), PER_CALL, why)
    settings.finish(METHOD)
    config = _Config(tap, ACTS[act], scale)
    parts = tuple(_part(config, *found) for found in by_place(header, ROLES, catalogue))
    return ParsedAdapter(METHOD, DIALECT, {}, parts=parts)


def _part(config: _Config, name: str, place: HiddenInfo, tensors: Roles) -> Bottleneck:
    require_tap(config.tap, name, place)
    width = place.features
    down = _map(name, "down", tensors, width, None)
    up = _map(name, "up", tensors, down.shape[0], width)
    up_bias = _bias(tensors, "up", width)
    if isinstance(up, Matrix):
        up = Matrix(times(up.weight, config.scale))
    else:
        up = up.times(lambda w1: times(w1, config.scale))
    return Bottleneck(
        place.layer,
        place.after,
        config.tap,
        config.act,
        down,
        _bias(tensors, "down", down.shape[0]),
        up,
        None if up_bias is None else times(up_bias, config.scale),
        norm=_norm(name, tensors, width),
        gate=_gate(name, tensors, width),
    )


def _map(name: str, which: str, tensors: Roles, wide: int, tall: int | None) -> Matrix | KronSum:
    """One of the two maps, from ``wide`` to ``tall`` features; None: to as many as it says."""
    weight, rule = f"{which}.weight", f"{which}.phm.rule"
    only_one_of(tensors, weight, rule)
    if weight not in tensors:
        return _phm(name, which, tensors, wide, tall)
    stray = next((tensors[r] for end in OF_MAP[3:] if (r := f"{which}.{end}") in tensors), None)
    if stray is not None:
        raise expected(stray.name, "no such tensor", "one", f"{weight} is there")
    tensor = tensors[weight]
    if len(tensor.shape) != 2:
        raise expected(tensor.name, "a matrix", list(tensor.shape))
    rows = tensor.shape[0] if tall is None else tall
    require_shape(tensor, (rows, wide), f"{name} takes {wide} features to {rows} here")
    return Matrix(tensor)


def _phm(name: str, which: str, tensors: Roles, wide: int, tall: int | None) -> KronSum:
    roles = [f"{which}.phm.{part}" for part in ("rule", "left", "right")]
    missing = [role for role in roles if role not in tensors]
    if len(missing) == len(roles):
        raise missing_tensor(name, f"{which}.weight", f"{name} has another tensor")
    if missing:
        raise missing_tensor(name, missing[0], f"{which}.phm is there", len(missing) - 1)
    rule, left, right = (tensors[role] for role in roles)
    n = rule.shape[0] if rule.shape else 0
    require_shape(rule, (n, n, n), "n terms of n by n")
    if wide % n or (tall or n) % n:
        got = f"{wide} to {tall}" if tall else str(wide)
        raise expected(rule.name, f"a number of terms that divides the features, {got}", n)
    for tensor in (left, right):
        if len(tensor.shape) != 3:
            raise expected(tensor.name, "a matrix for each term", list(tensor.shape))
    rank = left.shape[2]
    narrow = right.shape[2] if tall is None else tall // n
    require_shape(left, (n, wide // n, rank), f"{n} terms, {wide} features")
    require_shape(right, (n, rank, narrow), f"{n} terms, {narrow * n} features, rank {rank} as {roles[1]} has")
    rules = [Computed(rule.name, (n, n), turned(i), (rule,)) for i in range(n)]
    return KronSum(tuple(kron_term(rules[i], (left, right), i) for i in range(n)))


def _bias(tensors: Roles, which: str, length: int) -> TensorRef | None:
    bias = tensors.get(f"{which}.bias")
    if bias is not None:
        require_shape(bias, (length,), f"the map {which} leads to {length} features")
    return bias


def _norm(name: str, tensors: Roles, width: int) -> tuple[TensorRef, TensorRef, float] | None:
    there = [role for role in (NORM_WEIGHT, NORM_BIAS) if role in tensors]
    if not there:
        return None
    for role in (NORM_WEIGHT, NORM_BIAS):
        if role not in tensors:
            raise missing_tensor(name, role, f"{there[0]} is there")
        require_shape(tensors[role], (width,), f"{name} is {width} wide")
    return tensors[NORM_WEIGHT], tensors[NORM_BIAS], NORM_EPSILON


def _gate(name: str, tensors: Roles, width: int) -> Gate | None:
    weight, bias = tensors.get(GATE_WEIGHT), tensors.get(GATE_BIAS)
    if weight is None:
        if bias is not None:
            raise missing_tensor(name, GATE_WEIGHT, f"{GATE_BIAS} is there")
        return None
    require_shape(weight, (1, width), f"{name} is {width} wide")
    if bias is not None:
        require_shape(bias, (1,), "one gate")
    return Gate(weight, bias)
