"""Pick a token from each row of logits; a row's choice depends on its own logits, seed and position alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from weft.server.engine.messages import Sampling


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
    for row, choice in enumerate(sampling):
        if choice.temperature > 0 and tokens[row] is not None:
            tokens[row] = _draw(logits[row], choice, positions[row])
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position alone (Philox, counter = position)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position))
    return float(generator.random())


def _draw(logits: Tensor, sampling: Sampling, position: int) -> int:
    """Invert the distribution function over the kept tokens; sorts only where what is kept depends on the order."""
    scores, ids = logits.double() / sampling.temperature, None
    if 0 < sampling.top_k < scores.numel():
        scores, ids = scores.topk(sampling.top_k)
    elif sampling.top_p < 1:
        scores, ids = scores.sort(descending=True, stable=True)
    weights = torch.softmax(scores, dim=0).cumsum(dim=0)
    if sampling.top_p < 1:
        # the smallest set that reaches top_p: everything before the first token at which the sum does
        weights = weights[: int((weights < sampling.top_p).sum()) + 1]
    threshold = uniform(sampling.seed, position) * weights[-1]
    index = min(int(torch.searchsorted(weights, threshold, right=True)), weights.numel() - 1)
    return index if ids is None else int(ids[index])
