"""What lies between the two maps of a bottleneck: h = act(h + inner), in the rows of ``bags``' h that have one.

torch computes the last few numbers of a tensor by other code than the rest, and the two differ in their last bits.
So rows are taken in multiples of PADDING, and in tensors so short that no second thread shares them: what a number
becomes then does not depend on where it lies.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weft.kernels.activation import activate
from weft.kernels.working_set import LANES, WIDTH_MAX, GroupForm, Pool

Ints = npt.NDArray[np.int64]
Lanes = npt.NDArray[np.bool_]

# rows of LANES: whole turns of torch's vector loops
PADDING = 4
# rows of LANES that one thread computes
TOGETHER = 1024

# lanes that no site has, and those of sites whose h stays as it is
_DEAD, _STRAIGHT = -1, -2


@lru_cache(maxsize=512)
def _local(form: GroupForm) -> tuple[tuple[int, Ints, Lanes], ...]:
    """Per function of one form: (its number, chunks of the form's h, their lanes that it bends)."""
    codes = np.full(form.chunks * LANES, _DEAD)
    for site in form.sites:
        codes[site.column : site.column + site.rank] = site.act if site.bent else _STRAIGHT
    table = codes.reshape(-1, LANES)
    found = []
    for code in sorted({site.act for site in form.sites if site.bent}):
        chunks = np.flatnonzero((table == code).any(axis=1))
        found.append((code, chunks, (table[chunks] == code) | (table[chunks] == _DEAD)))
    return tuple(found)


class Bend:
    """One function and the rows of h [.., LANES] that it is applied to.

    rows:    of h;  ``owners``: the row of the batch that each is of
    inner:   the row of each one's section that is added to it, -1 for none
    lanes:   [rows, LANES], which numbers of a row it bends
    """

    def __init__(self, code: int, rows: Ints, owners: Ints, inner: Ints, lanes: Lanes, device: torch.device) -> None:
        spare = np.zeros(-len(rows) % PADDING, dtype=np.int64)
        # over again, to the same end
        order = np.concatenate([np.arange(len(rows)), spare])
        self._code, self._device = code, device
        self._owners, self._inner = owners[order], inner[order]
        self._rows = torch.from_numpy(rows[order]).to(device)
        self._lanes = None if lanes.all() else torch.from_numpy(lanes[order]).to(device)

    def places(self, starts: Ints) -> Tensor:
        """Where inner lies, in rows of LANES floats from the pool's start, for sections that begin at these bytes."""
        zeros = WIDTH_MAX // LANES
        rows = np.where(self._inner < 0, zeros, self._inner + starts[self._owners] // (4 * LANES))
        return torch.from_numpy(rows).to(self._device)

    def apply(self, hidden: Tensor, pool: Pool, places: Tensor) -> None:
        """Bend rows of hidden [.., LANES] in place, in fp32."""
        straight = hidden.index_select(0, self._rows).float()
        # always a sum, so that the sign of a zero does not depend on the neighbours
        raised = straight + pool.vectors.view(-1, LANES).index_select(0, places)
        bent = torch.cat([activate(part, self._code) for part in torch.split(raised, TOGETHER)])
        if self._lanes is not None:
            bent = torch.where(self._lanes, bent, straight)
        hidden.index_copy_(0, self._rows, bent.to(hidden.dtype))


def bends_of(forms: Sequence[GroupForm], hidden: Sequence[int], device: torch.device) -> Iterator[Bend]:
    """The bends of rows with these forms, whose h begin at these rows."""
    parts: dict[int, list[tuple[Ints, Ints, Ints, Lanes]]] = {}
    for owner, (form, first) in enumerate(zip(forms, hidden, strict=True)):
        for code, chunks, lanes in _local(form):
            inner = np.full(len(chunks), -1) if form.inner < 0 else form.inner + chunks
            parts.setdefault(code, []).append((first + chunks, np.full(len(chunks), owner), inner, lanes))
    for code in sorted(parts):
        rows, owners, inners, bent = zip(*parts[code], strict=True)
        joined = [np.concatenate(part) for part in (rows, owners, inners)]
        yield Bend(code, joined[0], joined[1], joined[2], np.concatenate(bent), device)
