"""A folder's weights under the names that the backbone has for them, and two such folders side by side."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from weft.adapters_store.errors import quoted, some
from weft.server.convert.checkpoints import Checkpoint
from weft.server.convert.outline import Kind, Outline, Parameter, outline_of
from weft.server.convert.problems import expected


class Side:
    """One of the two folders.

    tied:       whether the output embedding is the input embedding, as transformers decides it when it loads
    strangers:  tensors that are neither parameters nor buffers of the model as transformers builds it now
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.outline = outline_of(checkpoint.folder)
        self._names: dict[str, str] = {}
        self.strangers: list[str] = []
        for name in checkpoint.names:
            found = self.outline.resolve(name)
            if found is not None:
                self._names[found] = name
            elif not self.outline.is_buffer(name):
                self.strangers.append(name)
        self.tied = self._is_tied()

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._names

    @property
    def label(self) -> str:
        """What messages call the folder."""
        return self.checkpoint.folder.name

    def read(self, parameter: str) -> Tensor:
        """A parameter as it is stored."""
        tied = self.tied and parameter == self.outline.head_weight
        return self.checkpoint.weight(self._names[self.outline.embedding_weight if tied else parameter])

    def require_shapes(self) -> None:
        """The tensors have the shapes that the config says."""
        for parameter, name in self._names.items():
            wanted, got = self.outline.parameters[parameter].shape, self.checkpoint.shape(name)
            if wanted != got:
                raise expected(f"{self.label}: {name}", f"shape {list(wanted)}, as its config.json says", list(got))

    def _is_tied(self) -> bool:
        head, embedding = self.outline.head_weight, self.outline.embedding_weight
        if not self.outline.tied or embedding not in self._names:
            return False
        if head not in self._names:
            return True
        return torch.equal(self.checkpoint.read(self._names[head]), self.checkpoint.read(self._names[embedding]))


class Sides:
    """Base and tuned. CannotConvert where they are not the same architecture."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.tuned = Side(base), Side(tuned)
        self.outline: Outline = self.base.outline
        self._require_same_parameters()
        for side in (self.base, self.tuned):
            side.require_shapes()
        self.compared_alike = self._compare_strangers()

    @property
    def tied(self) -> str | None:
        """What formats say of embeddings that share a weight in the base: whether they still do when tuned."""
        if not self.base.tied:
            return None
        return "shared" if self.tuned.tied else "independent"

    def parameters(self) -> Iterator[Parameter]:
        """All that is to be compared, in the order of the model."""
        for parameter in self.outline.parameters.values():
            shared = parameter.name == self.outline.head_weight and self.tied == "shared"
            # parts that transformers names otherwise than their checkpoint are compared as strangers
            if not shared and self._is_there(parameter.name):
                yield parameter

    def changed(self, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """(base, tuned) of a parameter, None where they are equal."""
        base, tuned = self.base.read(parameter.name), self.tuned.read(parameter.name)
        if torch.equal(base, tuned) if base.dtype == tuned.dtype else torch.equal(base.float(), tuned.float()):
            return None
        for side, found in ((self.base, base), (self.tuned, tuned)):
            if not bool(torch.isfinite(found).all()):
                raise expected(f"{side.label}: {parameter.name}", "finite numbers", "NaN or infinity")
        if parameter.kind == Kind.OTHER:
            wanted = "changes of linear modules, norms and the input embedding"
            raise expected(f"{self.tuned.label}: {parameter.name}", wanted, "one of this", "weft cannot adapt it")
        return base, tuned

    def _is_there(self, name: str) -> bool:
        there = [name in side or (side.tied and name == self.outline.head_weight) for side in (self.base, self.tuned)]
        if there[0] != there[1]:
            side = self.tuned if there[0] else self.base
            raise expected(f"{side.label}: {name}", "this parameter, which the other folder has", "none")
        return there[0]

    def _require_same_parameters(self) -> None:
        base, tuned = self.outline.parameters, self.tuned.outline.parameters
        for name in sorted(base.keys() | tuned.keys()):
            shapes = [str(list(each[name].shape)) if name in each else "none" for each in (base, tuned)]
            if shapes[0] != shapes[1]:
                wanted = f"the architecture of {self.base.label}, where this is {shapes[0]}"
                raise expected(f"{self.tuned.label}: {name}", wanted, shapes[1])

    def _compare_strangers(self) -> int:
        alone = sorted(set(self.base.strangers) ^ set(self.tuned.strangers))
        if alone:
            side = self.base if alone[0] in self.base.strangers else self.tuned
            why = "the other folder has no such tensor"
            raise expected(f"{side.label}: {some(alone)}", "parameters of the model in its config.json", "others", why)
        for name in self.base.strangers:
            if not torch.equal(self.base.checkpoint.read(name), self.tuned.checkpoint.read(name)):
                wanted = "equal tensors where transformers gives parameters other names than the files"
                raise expected(f"{self.tuned.label}: {quoted(name)}", wanted, "a change, which weft cannot adapt")
        return len(self.base.strangers)


def same_folder(a: Path, b: Path) -> bool:
    """Whether two paths lead to one place."""
    return a.resolve() == b.resolve()
