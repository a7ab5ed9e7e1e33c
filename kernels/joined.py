"""Sparse deltas of many single rows at once, as one weighted sum of entries, on a device that the torch twins run on.

What makes a row's sums quick is not in an adapter's block: where in its input every entry reads, and where every output
begins. For the rows of a batch that decode together both are worked out once per site and kept, under a budget, for as
long as the same adapters stand together. A row's sum has its own entries in their own order, whoever stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.bags import Chosen, bag
from weft.kernels.extras import Kind
from weft.kernels.kept import Kept
from weft.kernels.parts import Carried


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of these rows, one row's behind another's.

    index:   elements of x [rows, in], flat;  ``values``: what they are multiplied by
    starts:  the first entry of each output, and the end
    """

    rows: Chosen
    index: Tensor
    starts: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.index, self.starts, self.values))


def add(kept: Kept, y: Tensor, x: Tensor, site: int, carried: Sequence[Carried]) -> list[Carried]:
    """Add to y [tokens, out] in place what single rows gain from x [tokens, in]; the segments that are left."""
    # a row's first record; those beyond it, which one sum per row cannot hold, are added like long segments'
    first = {each.segment.start: each for each in reversed(carried) if each.single}
    single = list(reversed(first.values()))
    if not single:
        return list(carried)
    key = Kind.SPARSE, site, tuple((each.block_key, each.segment.start) for each in single)
    blocks = frozenset(each.block_key for each in single)
    entries = kept.get(key, blocks, lambda: _join(single, x.shape[1], y.shape[1]))
    table = entries.rows.take(x).float().reshape(-1, 1)
    gained = bag(table, entries.index, entries.starts, entries.values).view(len(single), -1)
    entries.rows.add(y, gained)
    return [each for each in carried if first.get(each.segment.start) is not each]


def _join(single: Sequence[Carried], wide: int, tall: int) -> Entries:
    index, starts, values, at = [], [], [], 0
    for row, each in enumerate(single):
        flat, value = each.pieces
        assert flat is not None
        assert value is not None
        firsts = torch.arange(0, tall * wide, wide, device=flat.device)
        index.append(flat[0] % wide + row * wide)
        starts.append(torch.searchsorted(flat[0], firsts).int() + at)
        values.append(value[0].float())
        at += flat.shape[1]
    starts.append(torch.tensor([at], dtype=torch.int32, device=starts[0].device))
    rows = Chosen([each.segment.start for each in single], index[0].device)
    return Entries(rows, torch.cat(index), torch.cat(starts), torch.cat(values))
