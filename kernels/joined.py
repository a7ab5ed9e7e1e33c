"""Sparse deltas of many single rows at once, as one weighted sum of entries, on a device that the torch twins run on.

What makes a row's sums quick is not in an adapter's block: where in its input every entry reads, and where every output
begins. For the rows of a batch that decode together both are worked out once per site and kept, under a budget, for as
long as the same adapters stand together. A row's sum has its own entries in their own order, whoever stands beside it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels.bags import Chosen, bag
from weft.kernels.parts import Carried

Key = tuple[int, tuple[tuple[int, int], ...]]


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


class Joined:
    """Entries by site and rows, least recently used first; never more than ``bytes_max``."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._kept: OrderedDict[Key, Entries] = OrderedDict()
        self.nbytes = 0

    def add(self, y: Tensor, x: Tensor, site: int, carried: Sequence[Carried]) -> list[Carried]:
        """Add to y [tokens, out] in place what single rows gain; the segments that are left to others.

        x:  [tokens, in]
        """
        # a row's first record; those beyond it, which one sum per row cannot hold, are added like long segments'
        first = {each.segment.start: each for each in reversed(carried) if each.span[1] - each.span[0] == 1}
        single = list(reversed(first.values()))
        if not single:
            return list(carried)
        entries = self._of(site, single, x.shape[1], y.shape[1])
        table = entries.rows.take(x).float().reshape(-1, 1)
        gained = bag(table, entries.index, entries.starts, entries.values).view(len(single), -1)
        part = entries.rows.take(y)
        part.copy_(part.float() + gained)
        entries.rows.give(y, part)
        return [each for each in carried if first.get(each.segment.start) is not each]

    def forget(self, key: int) -> None:
        """Drop what was made of the block with this key."""
        for known in [known for known in self._kept if any(block == key for block, _ in known[1])]:
            self.nbytes -= self._kept.pop(known).nbytes

    def _of(self, site: int, single: Sequence[Carried], wide: int, tall: int) -> Entries:
        key = site, tuple((each.block_key, each.segment.start) for each in single)
        entries = self._kept.pop(key, None)
        if entries is None:
            entries = _join(single, wide, tall)
            if entries.nbytes > self._bytes_max:
                # worked out anew at every step: slower, equal bit for bit
                return entries
            self.nbytes += entries.nbytes
            while self.nbytes > self._bytes_max:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[key] = entries
        return entries


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
