"""The backbone's linears with adapters on them: sites that share an input run as one linear over joined weights.

Model code keeps calling ``q_proj``, ``k_proj``, ``v_proj`` one by one with the same tensor; the first call computes all
three, the others take their slice. So one base product and one adapter launch serve the group, in any model family.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.kernels.batch import Rows
from weft.kernels.dispatch import Kernels
from weft.server.backbone.packed import Packed, pack
from weft.server.backbone.step import active

Scaled = tuple[tuple["AdaptedLinear", tuple[tuple[int, int], ...]], ...]


class AdaptedLinear(nn.Module):
    """Stands where a linear stood, under the same parameter names; computes through its group."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, first_site: int):
        super().__init__()
        assert isinstance(linear.weight, nn.Parameter)
        self.transposed = isinstance(linear, Conv1D)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias if isinstance(linear.bias, nn.Parameter) else None)
        self.site = first_site
        shape = self.weight.shape
        self.in_features, self.out_features = shape if self.transposed else (shape[1], shape[0])
        self.group: LinearGroup  # set by the group that takes it in
        self.slice = slice(0, self.out_features)

    def rows_weight(self) -> Tensor:
        """The weight as [out, in], whatever the module stores."""
        return self.weight.t() if self.transposed else self.weight

    def stored_weight(self) -> Tensor:
        """The weight as transformers stores it; a copy where the group holds it packed."""
        if self.group.packed is None:
            return self.weight
        part = self.group.packed.dense()[self.slice]
        return part.t() if self.transposed else part

    def forward(self, x: Tensor) -> Tensor:
        """y = σ ⊙ Linear(σ_in ⊙ x) + Σ LowRank(x) + Σ Kron(x) + β, operators by row."""
        return self.group.output(x, self)


class LinearGroup:
    """Neighbouring sites computed together; ``index`` is the group's place in the geometry."""

    def __init__(self, index: int, members: Sequence[AdaptedLinear], head: bool = False):
        self.index = index
        self.members = tuple(members)
        self.head = head
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._scaled: tuple[Rows, Scaled] | None = None
        self.weight, self.bias = self._join()
        self.packed: Packed | None = None

    def output(self, x: Tensor, member: AdaptedLinear) -> Tensor:
        """The member's slice of the group's output for ``x``, computed once for all members."""
        if x is not self._input or self._output is None:
            y = self._compute(x.reshape(-1, x.shape[-1]))
            self._input, self._output = x, y.view(*x.shape[:-1], y.shape[-1])
        found = self._output[..., member.slice]
        if member is self.members[-1]:
            self._input = self._output = None
        return found

    def pack(self) -> bool:
        """Hold the joined weight in the order that multiplies fastest, and in no other; whether it does."""
        self.packed = pack(self.weight)
        if self.packed is not None:
            self.weight = self.weight.new_empty(0)
            for member in self.members:
                member.weight = nn.Parameter(self.weight, requires_grad=False)
        return self.packed is not None

    def _product(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.linear(x, self.bias)
        return F.linear(x, self.weight, self.bias)

    def _compute(self, x: Tensor) -> Tensor:
        step = active()
        rows, kernels = step.head_rows if self.head else step.rows, step.kernels
        if rows is None or kernels is None:
            return self._product(x)
        y = self._scaled_linear(x, rows, kernels)
        if kernels.touches(rows, self.index):
            kernels.apply(y, x, rows, self.index)
        return y

    def _scaled_linear(self, x: Tensor, rows: Rows, kernels: Kernels) -> Tensor:
        """Linear(σ_in ⊙ x): rows whose adapter scales the input of one member recompute that member's slice."""
        scaled = self._scaled_members(rows, kernels)
        if scaled and len(self.members) == 1:
            return self._product(kernels.scale_input(x, rows, self.members[0].site))
        y = self._product(x)
        for member, ranges in scaled:
            # all rows and slices, so that the product has one shape whatever the neighbours carry
            scaled_y = self._product(kernels.scale_input(x, rows, member.site))
            for start, stop in ranges:
                y[start:stop, member.slice] = scaled_y[start:stop, member.slice]
        return y

    def _scaled_members(self, rows: Rows, kernels: Kernels) -> Scaled:
        """Which members' inputs are scaled, and in which rows; worked out once for as long as the rows last."""
        if self._scaled is None or self._scaled[0] is not rows:
            found = tuple((m, ranges) for m in self.members if (ranges := kernels.input_scaled(rows, m.site)))
            self._scaled = (rows, found)
        return self._scaled[1]

    def _join(self) -> tuple[Tensor, Tensor | None]:
        """Lay the members' weights side by side; each member keeps a view, so nothing is held twice."""
        for member in self.members:
            member.group = self
        if len(self.members) == 1:
            only = self.members[0]
            return only.rows_weight(), only.bias
        weight = torch.cat([member.rows_weight() for member in self.members])
        biases = [m.bias if m.bias is not None else weight.new_zeros(m.out_features) for m in self.members]
        bias = torch.cat(biases) if any(m.bias is not None for m in self.members) else None
        start = 0
        for member in self.members:
            member.slice = slice(start, start + member.out_features)
            part = weight[member.slice]
            member.weight = nn.Parameter(part.t() if member.transposed else part, requires_grad=False)
            if member.bias is not None and bias is not None:
                member.bias = nn.Parameter(bias[member.slice], requires_grad=False)
            start += member.out_features
        return weight, bias
