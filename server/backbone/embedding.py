"""The input embedding: what it multiplies its rows by, and the hook that gives rows their adapters' embeddings."""

import torch
from torch import Tensor, nn

from weft.kernels.extras import Kind
from weft.server.backbone.recording import Call
from weft.server.backbone.step import Step, active

KINDS = (Kind.EMBED_ROWS, Kind.EMBED_ENTRIES, Kind.EMBED_PAIR)


def scale_of(call: Call) -> float | None:
    """The number that this call of an embedding multiplied its rows by; None if it did anything else."""
    weight = call.module.weight
    if list(call.inputs) != [0] or not isinstance(weight, Tensor) or call.output is None:
        return None
    rows = weight[call.inputs[0]]
    if rows.shape != call.output.shape or call.inputs[0].is_floating_point():
        return None
    wide, made = rows.double(), call.output.double()
    measured = torch.tensor(float((wide * made).sum() / wide.square().sum())).to(rows.dtype)
    # the number itself has the embedding's dtype, so the measured one is at most a rounding away from it
    near = (torch.nextafter(measured, measured - 1), measured, torch.nextafter(measured, measured + 1))
    for scale in near:
        if torch.equal(rows * scale.to(rows.device), call.output):
            return float(scale)
    return None


def wanted(step: Step) -> bool:
    """Whether any row of a step has an embedding of its own."""
    rows, kernels = step.rows, step.kernels
    if rows is None or kernels is None:
        return False
    return bool(step.soft) or any(kernels.has(rows, kind, 0) for kind in KINDS)


def override(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """A forward hook: the adapters' rows, and soft prompts, in the place of the embedding's own."""
    step = active()
    if wanted(step):
        assert step.rows is not None
        assert step.kernels is not None
        step.kernels.embed(output[0], args[0][0], step.rows, step.soft)
