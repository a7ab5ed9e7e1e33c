"""Which way the Kronecker terms of a site go: fused (``kron``), or in two stages (``kron_staged``).

In two stages where the fused kernel would multiply at least twice as often. Per column of X w2^T that is, over terms,

    fused     cdiv(o1, height) * round_up(i1, height) * round_up(i2, depth) + 2 * o1 * i1
    staged                                         i1 * round_up(i2, depth) + 2 * o1 * i1

for fused tiles of ``height`` rows whose products are ``depth`` deep: every row of tiles makes X w2^T anew, and no less
of it than a tile holds. The mix by w1 counts twice because it is two products (``kron.mixed_dot``). So the rule reads a
site's own shapes and nothing else: which way a row goes does not depend on its neighbours.
"""

# a kernel's types are those of its launch
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import triton
import triton.language as tl

from weft.kernels.layout import KRON_WORDS, KronTerm, round_up

_TERM = tl.constexpr(KRON_WORDS)


def is_staged(terms: Sequence[KronTerm], height: int, depth: int) -> bool:
    """The rule on the host."""
    fused = once = 0
    for _, _, o1, i1, _, i2 in terms:
        deep, mix = round_up(i2, depth), 2 * o1 * i1
        fused += -(-o1 // height) * round_up(i1, height) * deep + mix
        once += i1 * deep + mix
    return fused >= 2 * once > 0


@triton.jit
def staged(terms, count, HEIGHT: tl.constexpr, DEPTH: tl.constexpr):
    """The rule in a kernel, for ``count`` terms of a kron table."""
    fused = tl.full((), 0, tl.int64)
    once = tl.full((), 0, tl.int64)
    t = 0
    while t < count:
        term = terms + t * _TERM
        o1, i1, i2 = tl.load(term + 2).to(tl.int64), tl.load(term + 3), tl.load(term + 5)
        deep = (i2 + DEPTH - 1) // DEPTH * DEPTH
        rows = (i1 + HEIGHT - 1) // HEIGHT * HEIGHT
        mix = 2 * o1 * i1
        fused += (o1 + HEIGHT - 1) // HEIGHT * rows * deep + mix
        once += (i1 * deep).to(tl.int64) + mix
        t += 1
    return fused >= 2 * once
