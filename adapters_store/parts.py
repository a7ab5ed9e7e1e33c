"""What files say about places that are no linears: norms, sublayers, attention, embeddings. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass

from weft.adapters_store.tensor_refs import Value

ATTENTION, MLP = "attention", "mlp"
# what a prefix's gate may read of a call
GATE_INPUTS = ("mean", "first_token", "last_token")
# what a bottleneck may read: the sublayer's output, that plus the residual, the residual, the sublayer's normed input
TAPS = ("h", "h+x_res", "x_res", "ln_x")


@dataclass(frozen=True, slots=True)
class Gate:
    """sigmoid(weight x + bias), averaged over the tokens of a call: weight [k, d], bias [k]."""

    weight: Value
    bias: Value | None = None


@dataclass(frozen=True, slots=True)
class NormOverride:
    """The weight [d] and bias [d] of a norm in the place of its own; None leaves it."""

    path: str
    weight: Value | None = None
    bias: Value | None = None


@dataclass(frozen=True, slots=True)
class Matrix:
    """x weightᵀ with weight [out, in]."""

    weight: Value

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out_features, in_features = self.weight.shape
        return out_features, in_features


@dataclass(frozen=True, slots=True)
class KronSum:
    """x times the sum over terms of kron(w1, w2), transposed: w1 [o1, i1], w2 [o2, i2], one (o1, o2) for all terms.

    terms:  (w1, w2), or (w1, left [o2, k], right [k, i2]) where w2 is their product, which is then never written out
    """

    terms: tuple[tuple[Value, Value] | tuple[Value, Value, Value], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        (o1, i1), o2, i2 = self.terms[0][0].shape, self.terms[0][1].shape[0], self.terms[0][-1].shape[1]
        return o1 * o2, i1 * i2

    def times(self, change: Callable[[Value], Value]) -> "KronSum":
        """With the first factor of every term changed: its multiple makes that of the whole."""
        return KronSum(tuple((change(t[0]), t[1]) if len(t) == 2 else (change(t[0]), t[1], t[2]) for t in self.terms))


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """h += gate · (act(norm(tap) down + down_bias) up + up_bias + skip · tap), before h joins the residual stream.

    after:     ``attention`` or ``mlp``, the sublayer of decoder layer ``layer`` whose output h is
    down, up:  up None: the first map alone, whose output is as wide as h, and no function
    norm:      weight and bias of a layer norm of the tap, with epsilon
    skip:      a number [1]
    """

    layer: int
    after: str
    tap: str
    act: str
    down: Matrix | KronSum
    down_bias: Value | None
    up: Matrix | KronSum | None
    up_bias: Value | None
    skip: Value | None = None
    norm: tuple[Value, Value, float] | None = None
    gate: Gate | None = None

    @property
    def plain(self) -> bool:
        """Whether the kernels of low-rank pairs compute it: two matrices with a function between them."""
        whole = isinstance(self.down, Matrix) and isinstance(self.up, Matrix)
        return whole and self.skip is None and self.norm is None and self.gate is None


@dataclass(frozen=True, slots=True)
class KVPrefix:
    """Keys and values [p, kv heads · size] that every token of the text attends to as well, unrotated.

    shifts:  whether the text's positions begin at p rather than at 0
    gate:    weight [k, d] on the attention's input, k = 1: one number for both; 2: one for keys, one for values
    gate_per_token:  k = p: a number per prefix token, for its key and value
    gate_input:      one of GATE_INPUTS
    """

    layer: int
    keys: Value
    values: Value
    shifts: bool
    gate: Gate | None = None
    gate_per_token: bool = False
    gate_input: str = GATE_INPUTS[0]


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """Rows [v, d] that stand in front of the text's embeddings; the text's positions begin at v."""

    rows: Value


@dataclass(frozen=True, slots=True)
class RowOverride:
    """Rows [n, d] in the place of the input embedding's weights, for the token ids [n]; its scale acts on them too."""

    ids: Value | tuple[int, ...]
    rows: Value


@dataclass(frozen=True, slots=True)
class EmbeddingEntries:
    """The input embedding's flat weight += ``values`` [n] at ``index`` [n], ascending; its scale acts on them too."""

    index: Value
    values: Value


@dataclass(frozen=True, slots=True)
class EmbeddingPair:
    """The input embedding's weight += scale · (b a)ᵀ with a [r, vocabulary], b [d, r]; its scale acts on that too.

    outer:  [d], multiplies the weight's columns beforehand
    """

    a: Value
    b: Value
    scale: float
    outer: Value | None = None


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The adapter acts from the last place on where the prompt has these tokens, and nowhere without them."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SideNet:
    """A narrower network z [d / reduction] that reads the backbone's layers and puts its own end before the head.

        z = first(input of the first layer);  for each of ``layers``: z = block(gate z + down(the layer's output));
        what the head reads = up(norm(z))

    gates:   [len(layers)]
    first, up, downs:  weight and bias
    norm, blocks:      parameters in the order of ``SideInfo``
    """

    reduction: int
    layers: tuple[int, ...]
    gates: Value
    first: tuple[Value, Value]
    up: tuple[Value, Value]
    norm: tuple[Value, ...]
    downs: tuple[tuple[Value, Value], ...]
    blocks: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """The weight of expert e, of those that one parameter of a module holds, += scale · b[e] a[e].

    a:  [experts, r, in];  b: [experts, out, r]
    """

    path: str
    parameter: str
    a: Value
    b: Value
    scale: float


Part = (
    NormOverride
    | Bottleneck
    | KVPrefix
    | SoftPrompt
    | RowOverride
    | EmbeddingEntries
    | EmbeddingPair
    | TokenMask
    | SideNet
    | ExpertPair
)
