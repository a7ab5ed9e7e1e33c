"""The adapter that a difference becomes: one format where one says all of it, else a union of several.

X_SPARSE   entries of matrices and of the embedding; vectors whole, as ``abs``
X_ROWS     rows, and in a member of its own columns, of linears
LORA       linears as products of two matrices, in PEFT's own form
X_DENSE    whole matrices; vectors too where nothing else is needed
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.adapters_store.files import WEIGHTS
from weft.adapters_store.formats.tensors import PREFIX
from weft.server.convert.folders import write_config
from weft.server.convert.forms import COLUMNS, DENSE, LOW_RANK, ROWS, SPARSE, Said
from weft.server.convert.outline import Kind, Parameter
from weft.server.convert.spool import Entry, Spool

UNION = "X_UNION"
# by form, in the order in which members stand
TYPES = {SPARSE: "X_SPARSE", ROWS: "X_ROWS", COLUMNS: "X_ROWS", LOW_RANK: "LORA", DENSE: "X_DENSE"}
VECTOR_BYTES = 4


@dataclass
class Members:
    """What has been said so far.

    label:  of the backbone, for ``base_model_name_or_path``
    tied:   what formats say of embeddings that share a weight, None where none is changed or none share
    """

    spool: Spool
    label: str
    tied: str | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    transposed: bool = False
    embedding_rows: int | None = None
    vectors: list[tuple[Parameter, Tensor, Tensor]] = field(default_factory=list)

    def linear(self, parameter: Parameter, said: Said) -> None:
        """The change of a linear's weight, said as [out, in]."""
        turned = parameter.kind == Kind.CONV1D
        module, tensors = parameter.module, said.tensors
        match said.form:
            case "sparse":
                index, values = tensors["index"], tensors["values"]
                self._entries(parameter, *(_turned(index, values, parameter.shape) if turned else (index, values)))
            case "rows":
                self._add(ROWS, {f"{module}.row_indices": tensors["index"], f"{module}.rows_delta": tensors["values"]})
            case "columns":
                names = f"{module}.col_indices", f"{module}.cols_delta"
                self._add(COLUMNS, dict(zip(names, (tensors["index"], tensors["values"]), strict=True)))
            case "low-rank":
                self.ranks[module] = said.count
                self.transposed = self.transposed or turned
                self._add(LOW_RANK, {f"{module}.lora_A.weight": tensors["a"], f"{module}.lora_B.weight": tensors["b"]})
            case _:
                delta = tensors["values"]
                self._add(DENSE, {f"{parameter.name}.delta": delta.T if turned else delta})

    def embedding(self, parameter: Parameter, said: Said) -> None:
        """The change of the input embedding's weight, or of an output embedding's that is told like it."""
        if said.form == DENSE:
            self._add(DENSE, {f"{parameter.name}.delta": said.tensors["values"]})
            return
        index = said.tensors["index"]
        self.embedding_rows = len(set((index // parameter.shape[1]).tolist()))
        self._entries(parameter, index, said.tensors["values"])

    def vector(self, parameter: Parameter, base: Tensor, tuned: Tensor) -> int:
        """The change of a norm's or a bias's vector; returns what it takes on the device."""
        self.vectors.append((parameter, base, tuned))
        return tuned.numel() * VECTOR_BYTES

    def write(self, folder: Path) -> str:
        """Make the two files, and return the ``peft_type``."""
        self._add_vectors()
        members = [form for form in TYPES if any(entry.member == form for entry in self.spool.entries)]
        configs = [self._config(form) for form in members]
        if len(members) == 1:
            write_config(folder, configs[0])
            self.spool.write(folder / WEIGHTS, lambda entry: entry.name)
            return TYPES[members[0]]
        write_config(folder, {"peft_type": UNION, **self._native(), "members": configs})

        def name_of(entry: Entry) -> str:
            return f"member.{members.index(entry.member)}.{entry.name}"

        self.spool.write(folder / WEIGHTS, name_of)
        return UNION

    def _add_vectors(self) -> None:
        alone = {entry.member for entry in self.spool.entries} == {DENSE}
        for parameter, base, tuned in self.vectors:
            if alone:
                self._add(DENSE, {f"{parameter.name}.delta": tuned.float() - base.float()})
            else:
                whole = tuned.float() if tuned.dtype == torch.float64 else tuned
                self._add(SPARSE, {f"{parameter.name}.abs": whole})
        self.vectors.clear()

    def _entries(self, parameter: Parameter, index: Tensor, values: Tensor) -> None:
        self._add(SPARSE, {f"{parameter.name}.sparse_indices": index, f"{parameter.name}.sparse_values": values})

    def _add(self, form: str, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.spool.add(form, PREFIX + name, tensor)

    def _native(self) -> dict[str, Any]:
        return {"format_version": 1, "base_model_name_or_path": self.label}

    def _config(self, form: str) -> dict[str, Any]:
        if form == LOW_RANK:
            return self._lora()
        config = {"peft_type": TYPES[form], **self._native()}
        if form in (ROWS, COLUMNS):
            return config | {"axis": "out" if form == ROWS else "in"}
        if self.tied is not None:
            config["tied"] = self.tied
        if form == SPARSE and self.embedding_rows is not None:
            config["embedding_rows"] = self.embedding_rows
        return config

    def _lora(self) -> dict[str, Any]:
        usual = Counter(self.ranks.values()).most_common(1)[0][0]
        others = {module: rank for module, rank in self.ranks.items() if rank != usual}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.label,
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,
            # the scale alpha / r is 1 everywhere
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": list(self.ranks),
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": self.transposed,
        }


def _turned(index: Tensor, values: Tensor, stored: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Entries of [out, in] as entries of the [in, out] that a Conv1D stores."""
    wide, tall = stored
    flat = index.long()
    place = flat % wide * tall + flat // wide
    order = place.argsort()
    return place[order].to(torch.int32), values[order]
