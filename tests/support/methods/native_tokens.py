"""X_SPARSE of an embedding: whole rows of a few tokens, and single entries that nobody counted by rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.methods.case import Case
from tests.support.methods.native_deltas import change_entries, is_tied
from tests.support.methods.native_files import Content, Draw, Tensors, by_hand


def _embedding(whole_rows: bool) -> Content:
    """Every third row whole, or one entry of five."""

    def content(model: PreTrainedModel, draw: Draw) -> tuple[Tensors, dict[str, Any]]:
        weight = model.get_input_embeddings().weight
        (path,) = (name for name, parameter in model.named_parameters() if parameter is weight)
        assert isinstance(weight, Tensor)
        rows, wide = weight.shape
        places = torch.arange(rows * wide).view(rows, wide)
        index = places[::3].flatten() if whole_rows else (draw(rows * wide) > 0.4).nonzero().flatten()
        tensors = {f"{path}.sparse_indices": index, f"{path}.sparse_values": draw(len(index))}
        counted = {"embedding_rows": len(places[::3])} if whole_rows else {}
        return tensors, {**counted, **({"tied": "independent"} if is_tied(model) else {})}

    return content


CASES: Sequence[Case] = (
    by_hand("sparse_tokens", "X_SPARSE", _embedding(whole_rows=True), change_entries),
    by_hand("sparse_embedding", "X_SPARSE", _embedding(whole_rows=False), change_entries),
)
