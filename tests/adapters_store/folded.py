"""What a block computes, written out layer by layer: the formulas of its directory and records, in plain torch."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.adapters_store.test_fold_parity import normal_form
from tests.support.catalogues import ModelSites
from weft.adapters_store.banks import shared_digests
from weft.kernels.extras import DELTAS, Extra, Kind
from weft.kernels.layout import directory, unpack, unpack_records


class Folded:
    """One block on one untouched model."""

    def __init__(self, image: Tensor, sites: ModelSites, banks: Mapping[str, Tensor] | None = None):
        """``banks``: the images that ``compile_adapter`` gave away, by digest."""
        self.sites, geometry = sites, sites.geometry()
        found = [(banks or {})[digest] for digest in shared_digests(directory(image))]
        self._banks = [unpack_records(geometry, bank)[0].tensors for bank in found]
        self.terms = unpack(geometry, image)
        self.records = unpack_records(geometry, image)

    def touched(self) -> list[str]:
        """Paths of the modules that it changes."""
        info = self.sites.info
        places = {*self.terms, *(record.place for record in self.records if record.kind in DELTAS)}
        paths = [info.sites[place].path for place in sorted(places)]
        paths += [info.norms[record.place].path for record in self.records if record.kind == Kind.NORM]
        if any(record.kind in (Kind.EMBED_ROWS, Kind.EMBED_ENTRIES, Kind.EMBED_PAIR) for record in self.records):
            assert info.embedding is not None
            paths.append(info.embedding.path)
        return paths

    def output(self, path: str, x: Tensor) -> Tensor:
        """What the module puts out: x are token ids for the input embedding."""
        info, module = self.sites.info, self.sites.model.get_submodule(path)
        if path in info.norm_index:
            return self._norm(module, info.norm_index[path], x)
        if info.embedding is not None and path == info.embedding.path:
            return self._embedding(module, x)
        site = info.index[path]
        y = normal_form(module, self.terms.get(site), x)
        for record in self.records:
            if record.kind in DELTAS and record.place == site:
                y = y + x @ self._matrix(record, info.sites[site].out_features, x.shape[-1]).T
        return y

    def _matrix(self, record: Extra, tall: int, wide: int) -> Tensor:
        first, *rest = [tensor for tensor in record.tensors if tensor is not None]
        delta = torch.zeros(tall, wide)
        match record.kind:
            case Kind.SPARSE:
                delta.view(-1)[first.view(-1).long()] = rest[0].view(-1)
            case Kind.ROWS:
                delta[first.view(-1).long()] = rest[0]
            case Kind.COLUMNS:
                delta[:, first.view(-1).long()] = rest[0].T
            case Kind.DENSE:
                delta = first
            case Kind.SHARED:
                a, b = self._banks[record.options[0]]
                assert a is not None
                assert b is not None
                delta = (rest[0] * b[:, :tall]).T @ (first.T * a[:, :wide])
            case _:
                raise AssertionError(record.kind)
        return delta

    def _norm(self, module: nn.Module, place: int, x: Tensor) -> Tensor:
        changed = copy.deepcopy(module)
        for record in self.records:
            if record.kind == Kind.NORM and record.place == place:
                for name, tensor in zip(("weight", "bias"), record.tensors, strict=True):
                    if tensor is not None:
                        getattr(changed, name).copy_(tensor.view(-1))
        y: Tensor = changed(x)
        return y

    def _embedding(self, module: nn.Module, ids: Tensor) -> Tensor:
        y: Tensor = module(ids).clone()
        for record in self.records:
            if record.kind == Kind.EMBED_ROWS:
                which, rows = record.tensors
                assert which is not None
                assert rows is not None
                for token, row in zip(which.view(-1).tolist(), rows, strict=True):
                    y[ids == token] = row
        return y
