"""``weft convert diff``: what fine-tuning changed in a model, as the smallest adapter that says it.

Parameters are compared one after the other; only one is ever in memory. The error of a parameter is
‖change - said‖ / ‖change‖ in the Frobenius norm, the change being tuned - base in fp32; without an error that is
allowed, what is said is the change. Vectors (biases, norms) are always said whole.

A change that is sparse, or of few rows, is found as such whatever trained it: DiffPruning, FishMask with its mask,
LT-SFT and FAR need no converter of their own where base and tuned model are at hand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weft.adapters_store.files import WEIGHTS
from weft.server.convert.checkpoints import Checkpoint
from weft.server.convert.folders import check_written, new_folder
from weft.server.convert.forms import CHOICES, LOW_RANK, SPARSE, Change, relative, smallest, smallest_of_embedding
from weft.server.convert.members import Members
from weft.server.convert.outline import Kind, Parameter
from weft.server.convert.problems import expected
from weft.server.convert.sides import Sides, same_folder
from weft.server.convert.spool import Spool

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """What is asked of the result.

    error:   the largest error of a parameter
    form:    one of ``forms.CHOICES``
    device:  where singular values are computed
    """

    error: float = 0.0
    form: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 <= self.error < 1:
            raise expected("error", "a number from 0 to below 1", self.error)
        if self.form not in CHOICES:
            raise expected("form", ", ".join(CHOICES), self.form)
        if self.form == LOW_RANK and not self.error:
            raise expected("error", "more than 0 with form low-rank", 0, "a product of matrices is never exact")


@dataclass(frozen=True)
class Line:
    """What became of one parameter. ``bytes`` are those on the device."""

    name: str
    form: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Report:
    """What became of a model. ``device_bytes`` hold in the dtype of the base; ``error`` is that of all parameters."""

    out: str
    peft_type: str
    parameters: tuple[Line, ...]
    unchanged: int
    device_bytes: int
    file_bytes: int
    error: float
    notes: tuple[str, ...]


def convert_diff(base: Path, tuned: Path, out: Path, options: Options, progress: Progress) -> Report:
    """Write ``out``. CannotConvert says what stands against it."""
    if same_folder(base, tuned):
        raise expected("tuned", "another folder than base", "the same one")
    with Checkpoint(base) as one, Checkpoint(tuned) as other, new_folder(out) as folder, Spool(folder) as spool:
        sides = Sides(one, other)
        work = _Work(sides, Members(spool, base.name), options)
        todo = list(sides.parameters())
        total = sum(_elements(parameter) for parameter in todo)
        done = 0
        for parameter in todo:
            work.compare(parameter)
            done += _elements(parameter)
            progress(done, total)
        if not work.lines:
            raise expected(tuned.name, f"weights that differ from those of {base.name}", "the same in every parameter")
        peft_type = work.members.write(folder)
        check_written(folder / WEIGHTS)
    return work.report(out, peft_type)


class _Work:
    """The parameters that have been compared."""

    def __init__(self, sides: Sides, members: Members, options: Options) -> None:
        self._sides, self.members, self._options = sides, members, options
        self.lines: list[Line] = []
        self._unchanged = 0
        self._lost, self._norm = 0.0, 0.0

    def compare(self, parameter: Parameter) -> None:
        """Say what changed in one."""
        pair = self._sides.changed(parameter)
        if pair is None:
            self._unchanged += 1
            return
        base, tuned = pair
        if parameter.kind == Kind.VECTOR:
            nbytes = self.members.vector(parameter, base, tuned)
            self._norm += Change(tuned.float() - base.float(), base.dtype, 0.0).norm
            self.lines.append(Line(parameter.name, "vector", nbytes, 0.0))
        else:
            self._compare_matrix(parameter, tuned.float() - base.float(), base.dtype)

    def report(self, out: Path, peft_type: str) -> Report:
        """All of them."""
        notes = []
        if self._sides.compared_alike:
            count = self._sides.compared_alike
            notes.append(f"{count} tensors that transformers names otherwise are equal in both folders")
        return Report(
            str(out),
            peft_type,
            tuple(self.lines),
            self._unchanged,
            sum(line.bytes for line in self.lines),
            (out / WEIGHTS).stat().st_size,
            relative(self._lost, self._norm),
            tuple(notes),
        )

    def _compare_matrix(self, parameter: Parameter, delta: Tensor, dtype: torch.dtype) -> None:
        options, outline = self._options, self._sides.outline
        turned = parameter.kind == Kind.CONV1D
        whole = Change(delta.T.contiguous() if turned else delta, _served(dtype), 0.0)
        norm = whole.norm
        change = Change(whole.delta, whole.dtype, norm * options.error**2)
        if parameter.name in (outline.embedding_weight, outline.head_weight) and self._sides.tied is not None:
            self.members.tied = self._sides.tied
        if parameter.kind == Kind.EMBEDDING:
            said = smallest_of_embedding(change, options.form, self._sides.tied == "shared")
            self.members.embedding(parameter, said)
        else:
            found = smallest(change, options.form, options.device)
            if found is None:
                raise self._refusal(parameter)
            said = found
            self.members.linear(parameter, said)
        self._lost, self._norm = self._lost + said.lost, self._norm + norm
        self.lines.append(Line(parameter.name, said.words, said.nbytes, relative(said.lost, norm)))

    def _refusal(self, parameter: Parameter) -> Exception:
        if self._options.form == SPARSE:
            return expected(parameter.name, "a change of at most half of the entries with form sparse", "more")
        wanted = f"a change that factors say with an error of at most {self._options.error:g}"
        return expected(parameter.name, wanted, "one that they say in no fewer bytes than all of it")


def _served(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def _elements(parameter: Parameter) -> int:
    count = 1
    for size in parameter.shape:
        count *= size
    return count
