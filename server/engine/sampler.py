"""Pick a token from each row of logits; a row's choice depends on its own logits, seed and position alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.server.engine.messages import Sampling

# so many tokens of a row are sorted before all are: where top_p keeps fewer, as it mostly does, the rest stays unsorted
SORTED_FIRST = 256
# logits that are turned to probabilities at once: what a CPU's cache holds, what is little of a GPU's memory
TOGETHER_CPU, TOGETHER = 1 << 17, 1 << 24


def pick(logits: Tensor, sampling: Sequence[Sampling], positions: Sequence[int]) -> list[int | None]:
    """Return one token per row, or None where a row's logits are not finite.

    logits:     [rows, vocabulary], any float dtype
    sampling:   how to pick, per row
    positions:  index of the token to be picked in its sequence, per row; with the seed it fixes the random number
    """
    # one pass: a sum over numbers that are finite is finite, over any other it is not
    finite = torch.isfinite(logits.sum(dim=-1, dtype=torch.float32))
    best = logits.argmax(dim=-1)
    tokens: list[int | None] = [
        int(token) if ok else None for token, ok in zip(best.tolist(), finite.tolist(), strict=True)
    ]
    like: dict[tuple[int, bool], list[int]] = {}
    for row, choice in enumerate(sampling):
        if choice.temperature > 0 and tokens[row] is not None:
            top_k = choice.top_k if choice.top_k < logits.shape[1] else 0
            like.setdefault((top_k, choice.top_p < 1), []).append(row)
    step = max(1, (TOGETHER_CPU if logits.device.type == "cpu" else TOGETHER) // logits.shape[1])
    for (top_k, nucleus), rows in like.items():
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            draw = _Draw.of([sampling[row] for row in some], [positions[row] for row in some], logits.device)
            for row, token in zip(some, draw.tokens(logits[some], top_k, nucleus).tolist(), strict=True):
                tokens[row] = token
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position alone (Philox, counter = position)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position))
    return float(generator.random())


@dataclass(frozen=True, eq=False)
class _Draw:
    """One draw for each of some rows that keep tokens in the same way: the inverse of the distribution function.

    All are [rows, 1] in fp64.
    """

    temperature: Tensor
    top_p: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, sampling: Sequence[Sampling], positions: Sequence[int], device: torch.device) -> "_Draw":
        """With the random numbers of these positions."""
        numbers = [
            (choice.temperature, choice.top_p, uniform(choice.seed, position))
            for choice, position in zip(sampling, positions, strict=True)
        ]
        return cls(*torch.split(torch.tensor(numbers, dtype=torch.float64).to(device), 1, dim=1))

    def tokens(self, logits: Tensor, top_k: int, nucleus: bool) -> Tensor:
        """[rows] int64, of logits [rows, vocabulary]."""
        if top_k:
            values, ids = _largest(logits, top_k)
            return ids.gather(1, self._places(self._probabilities(values), nucleus))[:, 0]
        probabilities = self._probabilities(logits)
        if not nucleus:
            return self._places(probabilities, nucleus)[:, 0]
        count = min(SORTED_FIRST, logits.shape[1])
        _, ids = _largest(logits, count)
        first = probabilities.gather(1, ids)
        tokens = ids.gather(1, self._places(first, nucleus))[:, 0]
        # sorting more would change nothing if the last that is kept is larger than all that was not sorted
        last = first.gather(1, self._last(first.cumsum(dim=-1)))
        unsure = (last <= first[:, -1:])[:, 0].nonzero()[:, 0]
        if count < logits.shape[1] and len(unsure):
            ordered, ids = probabilities[unsure].sort(dim=-1, descending=True, stable=True)
            tokens[unsure] = ids.gather(1, self._some(unsure)._places(ordered, nucleus))[:, 0]
        return tokens

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.double() / self.temperature, dim=-1)

    def _places(self, probabilities: Tensor, nucleus: bool) -> Tensor:
        """[rows, 1], where the random numbers fall among the kept of these probabilities [rows, n]."""
        sums = probabilities.cumsum(dim=-1)
        last = self._last(sums) if nucleus else torch.full_like(sums[:, :1], sums.shape[1] - 1, dtype=torch.int64)
        threshold = self.uniform * sums.gather(1, last)
        return torch.minimum(torch.searchsorted(sums, threshold, right=True), last)

    def _last(self, sums: Tensor) -> Tensor:
        """[rows, 1], the last token of the smallest set that reaches top_p."""
        return (sums < self.top_p).sum(dim=-1, keepdim=True).clamp(max=sums.shape[1] - 1)

    def _some(self, rows: Tensor) -> "_Draw":
        return _Draw(self.temperature[rows], self.top_p[rows], self.uniform[rows])


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row in order, and where they were: of equal ones, the first comes first."""
    ids = values.topk(count, dim=-1).indices.sort(dim=-1).values
    found, order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return found, ids.gather(1, order)
