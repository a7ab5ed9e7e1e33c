"""DoRA, as PEFT computes it: rows of W + s·B A brought to the length m [out] that was learned, the bias left alone.

    y = c ⊙ (W x + s·B A x) + b  with  c = m / ‖W + s·B A‖ by rows
      = c ⊙ Linear(x) + (c ⊙ s·B) A x + (1 − c) ⊙ b

The length is that of the served weight, untouched by any other adapter, in fp32. Of an embedding, c goes along its
features: one number per column of its weight.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.peft_lora_factors import Pair
from weft.adapters_store.formats.tensors import require_shape
from weft.adapters_store.operators import Bias, LowRank, Operator, Scale
from weft.adapters_store.parts import EmbeddingPair
from weft.adapters_store.sites import EmbeddingInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

MAGNITUDE = "lora_magnitude_vector"
ROWS = 4096


def operators(site: SiteInfo, pair: Pair, magnitude: TensorRef, bias: Bias | None) -> list[Operator]:
    """What a site does, behind the replacement of its bias where there is one."""
    require_shape(magnitude, (site.out_features,), f"{site.path} has {site.out_features} outputs")
    scale = _scale(magnitude, pair, site.path)
    said: list[Operator] = [Scale(scale, of_input=False), LowRank(pair.a, _scaled(pair, scale))]
    if site.has_bias:
        old, paths = ((bias.vector,), ()) if bias is not None else ((), (f"{site.path}.bias",))
        said.append(Bias(Computed(magnitude.name, magnitude.shape, lambda c, b: (1 - c) * b, (scale, *old), paths)))
    return said


def of_embedding(embedding: EmbeddingInfo, pair: Pair, magnitude: TensorRef) -> EmbeddingPair:
    """The same of the input embedding, with a [r, vocabulary] and b [d, r]."""
    require_shape(magnitude, (embedding.features,), f"{embedding.path} has {embedding.features} features")
    scale = _scale(magnitude, pair, embedding.path, transposed=True)
    return EmbeddingPair(pair.a, _scaled(pair, scale), 1.0, scale)


def _scale(magnitude: TensorRef, pair: Pair, path: str, transposed: bool = False) -> Computed:
    """c, from the weight at this path and the pair on it."""

    def formula(m: "Tensor", a: "Tensor", b: "Tensor", stored: "Tensor") -> "Tensor":
        import torch

        weight, scaled = stored.T if transposed else stored, b * pair.scale
        # a few rows at a time: the sum is as large as the weight
        chunks = [slice(at, at + ROWS) for at in range(0, len(weight), ROWS)]
        lengths = torch.cat([(weight[rows] + scaled[rows] @ a).norm(dim=1) for rows in chunks])
        if not bool((lengths > 0).all()):
            why = f"DoRA divides by the lengths of the rows of {path}"
            raise expected(magnitude.name, "an adapter that makes no row of zeros", "one that does", why)
        return m / lengths

    return Computed(magnitude.name, magnitude.shape, formula, (magnitude, pair.a, pair.b), (f"{path}.weight",))


def _scaled(pair: Pair, scale: Computed) -> Computed:
    return Computed(pair.b.name, pair.b.shape, lambda c, b: c[:, None] * b * pair.scale, (scale, pair.b))
