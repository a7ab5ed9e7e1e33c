"""PEFT ``TRAINABLE_TOKENS``: rows of the input embedding, or of the output head, that are replaced.

Tensor at ``base_model.model.<module>.``: ``trainable_tokens_delta`` [n, d], the new rows in spite of its name; the
token ids stand in the config only. Where the backbone ties its head to the embedding, the head follows, and PEFT saves
the rows once more under its name.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_common import DIALECT, read_common
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.targets import target_modules
from weft.adapters_store.formats.tensors import by_module, require_exactly, require_shape
from weft.adapters_store.operators import ParsedAdapter, Rows, SiteOperators
from weft.adapters_store.parts import RowOverride
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, EmbeddingInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "TRAINABLE_TOKENS"
SERVES = (Served("Trainable tokens", "PEFT 0.21", "row_override, rows", "PEFT TRAINABLE_TOKENS"),)

ROWS, INNER_ROWS = "trainable_tokens_delta", "base_layer.trainable_tokens_delta"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings)
    settings.ignore("init_weights")
    embedding, ids = catalogue.embedding, settings.integers("token_indices")
    targets = target_modules(settings, catalogue, by_layer=False)
    settings.finish(METHOD)
    if embedding is None:
        raise expected("target_modules", "a backbone whose input embedding can be adapted", some(targets))
    if not ids or len(set(ids)) != len(ids) or max(ids) >= embedding.rows:
        wanted = f"token ids from 0 to {embedding.rows - 1} that stand once each"
        raise expected("token_indices", wanted, show(list(ids or ())))
    heads = [site.path for site in catalogue.sites if site.kind == "lm_head"]
    strangers = [path for path in targets if path not in (embedding.path, *heads)]
    if strangers:
        raise expected("target_modules", f"{embedding.path} or an output head", some(strangers))
    found = by_module(header, [ROWS, INNER_ROWS], catalogue)
    again: tuple[TensorRef, ...] = ()
    head = embedding.tied_head
    if embedding.path in targets and head:
        again = tuple(found.pop(head, {}).values())
        targets = [embedding.path]
    require_exactly(found, targets, [ROWS])
    require_exactly(found, (), [INNER_ROWS])
    return _adapter({path: found[path][ROWS] for path in targets}, ids, embedding, again, catalogue)


def _adapter(
    found: dict[str, TensorRef],
    ids: tuple[int, ...],
    embedding: EmbeddingInfo,
    again: tuple[TensorRef, ...],
    catalogue: CatalogueInfo,
) -> ParsedAdapter:
    sites: dict[str, SiteOperators] = {}
    parts: list[RowOverride] = []
    for path, rows in found.items():
        for tensor in (rows, *again):
            require_shape(tensor, (len(ids), embedding.features), f"token_indices lists {len(ids)}")
        head = path
        if path == embedding.path:
            parts.append(RowOverride(ids, rows))
            head = embedding.tied_head
        if head:
            if catalogue.sites[catalogue.index[head]].has_bias:
                raise expected("target_modules", "a head without a bias", head, "PEFT leaves out the bias there")
            sites[head] = SiteOperators((_follow(rows, again, head, ids),), ("rows value - base",))
    return ParsedAdapter(METHOD, DIALECT, sites, parts=tuple(parts))


def _follow(rows: TensorRef, again: tuple[TensorRef, ...], head: str, ids: tuple[int, ...]) -> Rows:
    """What the rows change at a head; those that are in the file again must be the same."""

    def listed() -> "Tensor":
        import torch

        return torch.tensor(ids)

    def change(rows: "Tensor", *rest: "Tensor") -> "Tensor":
        for copy, ref in zip(rest, again, strict=False):
            if not copy.equal(rows):
                raise expected(ref.name, f"a copy of {rows_name}", "other values", "the head is tied to the embedding")
        return rows - rest[-1][list(ids)]

    rows_name = rows.name
    index = Computed(rows.name, (len(ids),), listed, ())
    delta = Computed(rows.name, rows.shape, change, (rows, *again), (f"{head}.weight",))
    return Rows(index, delta, replaces=True)
