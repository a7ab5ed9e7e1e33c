"""Stands in for the kernels: says that places are touched, changes rows there by known formulas, and takes notes."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from weft.kernels.extras import Kind
from weft.kernels.norms import Norm, normed


def new_weight(place: int, width: int) -> tuple[Tensor, Tensor]:
    """The weight and bias [width] that norm ``place`` is given, whatever its own are."""
    generator = torch.Generator().manual_seed(100 + place)
    weight = 1 + 0.5 * torch.randn(width, generator=generator)
    return weight, 0.5 * torch.randn(width, generator=generator)


def changed_norm(x: Tensor, place: int, norm: Norm) -> Tensor:
    """What norm ``place`` makes of x [.., d] with its new weight, and bias where it has one."""
    weight, bias = new_weight(place, x.shape[-1])
    made = normed(x, norm) * (norm.offset + weight)
    return made if norm.bias is None else made + bias


def changed_hidden(h: Tensor, x_res: Tensor, ln_x: Tensor | None) -> Tensor:
    """What a sublayer's output becomes: every tap has a part in it."""
    changed = 0.7 * h + 0.5 * torch.tanh(x_res)
    return changed if ln_x is None else changed + 0.3 * torch.sin(ln_x)


def changed_embedding(out: Tensor, ids: Tensor) -> Tensor:
    """What the embedding [.., d] of these ids becomes."""
    return 0.8 * out + 0.3 * torch.sin(ids.to(out.dtype))[..., None]


@dataclass
class Spy:
    """The methods of ``Kernels`` that hooks call.

    touched:  ``norms``, ``hidden``, ``embedding``: what adapters act on
    prefixes: by layer, whether the prefix there has a gate
    asked:    names of the methods that were called
    softs:    what was handed on as soft prompts
    rows:     the batch that it knows
    order:    ("norm" or "hidden", place) in the order of the calls that change something
    """

    touched: frozenset[str] = frozenset()
    prefixes: dict[int, bool] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    order: list[tuple[str, int]] = field(default_factory=list)
    softs: list[Any] = field(default_factory=list)
    rows: object = field(default_factory=object)

    def touches(self, rows: object, group: int) -> bool:
        """No linear has an adapter."""
        return False

    def input_scaled(self, rows: object, site: int) -> tuple[tuple[int, int], ...]:
        """No linear has an adapter."""
        return ()

    def has(self, rows: object, kind: Kind, place: int) -> bool:
        """As ``Kernels.has``."""
        assert rows is self.rows
        self.asked.add("has")
        if kind is Kind.PREFIX:
            return place in self.prefixes
        return {Kind.NORM: "norms", Kind.EMBED_ROWS: "embedding"}.get(kind, "") in self.touched

    def carried(self, rows: object, kind: Kind, place: int) -> list[SimpleNamespace]:
        """Prefixes: keys, values, gate, gate bias."""
        assert kind is Kind.PREFIX
        gate = torch.zeros(1) if self.prefixes[place] else None
        return [SimpleNamespace(pieces=(torch.zeros(1), torch.zeros(1), None, None)),
                SimpleNamespace(pieces=(torch.zeros(1), torch.zeros(1), gate, None))]  # fmt: skip

    def touches_hidden(self, rows: object, place: int) -> bool:
        """As ``Kernels.touches_hidden``."""
        assert rows is self.rows
        self.asked.add("touches_hidden")
        return "hidden" in self.touched

    def override_norm(self, out: Tensor, x: Tensor, rows: object, place: int, norm: Norm) -> None:
        """Change all rows."""
        assert rows is self.rows
        assert out.dim() == x.dim() == 3
        assert out.is_contiguous()
        self.asked.add("override_norm")
        self.order.append(("norm", place))
        out.copy_(changed_norm(x, place, norm))

    def hidden(self, h: Tensor, x_res: Tensor | None, ln_x: Tensor | None, rows: object, place: int) -> None:
        """Change all rows."""
        assert rows is self.rows
        assert x_res is not None
        assert h.dim() == x_res.dim() == 2
        self.asked.add("hidden")
        self.order.append(("hidden", place))
        h.copy_(changed_hidden(h, x_res, ln_x))

    def embed(self, out: Tensor, ids: Tensor, rows: object, soft: Any) -> None:
        """Change all rows."""
        assert rows is self.rows
        assert out.shape[:1] == ids.shape
        self.asked.add("embed")
        self.softs.append(soft)
        out.copy_(changed_embedding(out, ids))
