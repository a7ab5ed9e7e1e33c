"""Compares a compiled block with a plain model that was changed by hand: every linear, every norm, the embedding."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support.backbones import build
from tests.support.catalogues import ModelSites, sites_of
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.report import AdapterReport
from weft.kernels.extras import DELTAS, Extra, Kind
from weft.kernels.layout import SiteTerms, unpack, unpack_records

TOKENS = 5
# relative, of fp32
TOLERANCE = 2e-6


@dataclass(frozen=True, eq=False)
class Compiled:
    """An adapter's block taken apart again."""

    sites: ModelSites
    terms: dict[int, SiteTerms]
    records: tuple[Extra, ...]
    report: AdapterReport
    nbytes: int

    def of(self, kind: Kind, place: int = 0) -> Extra | None:
        """The one record of a kind at a place."""
        found = [record for record in self.records if (record.kind, record.place) == (kind, place)]
        assert len(found) <= 1
        return found[0] if found else None


def compiled(family: str, folder: Path) -> Compiled:
    """Read, compile and take apart."""
    sites = sites_of(build(family))
    parsed = read_adapter(folder, sites.info)
    image, report = compile_adapter(parsed, sites, sites.geometry(), 1 << 30)
    assert report.device_bytes == image.numel() == block_bytes(parsed, sites.geometry(), sites)
    geometry = sites.geometry()
    return Compiled(sites, unpack(geometry, image), unpack_records(geometry, image), report, image.numel())


def delta_of(record: Extra, out_features: int, in_features: int) -> Tensor:
    """What a record adds to a weight, written out as [out, in] in fp64."""
    first, second = record.tensors[0], record.tensors[-1]
    assert first is not None
    assert second is not None
    delta = torch.zeros(out_features, in_features, dtype=torch.float64)
    if record.kind is Kind.DENSE:
        return first.double()
    index = first[0].long()
    if record.kind is Kind.SPARSE:
        return delta.view(-1).index_add(0, index, second[0].double()).view_as(delta)
    if record.kind is Kind.ROWS:
        return delta.index_add(0, index, second.double())
    assert record.kind is Kind.COLUMNS
    return delta.index_add(1, index, second.double().T)


def site_output(block: Compiled, index: int, x: Tensor) -> Tensor:
    """What a site computes with the adapter, in fp64 from fp32 terms."""
    site, terms = block.sites.info.sites[index], block.terms.get(index, SiteTerms())
    linear = block.sites.model.get_submodule(site.path)
    y: Tensor = linear(x if terms.sigma_in is None else x * terms.sigma_in).double()
    wide = x.double()
    y = y if terms.sigma is None else y * terms.sigma
    if terms.low_rank is not None:
        y = y + wide @ terms.low_rank[0].double().T @ terms.low_rank[1].double().T
    for w1, w2 in terms.krons:
        y = y + wide @ torch.kron(w1.double(), w2.double()).T
    for kind in DELTAS:
        record = block.of(kind, index)
        if record is not None:
            y = y + wide @ delta_of(record, site.out_features, site.in_features).T
    return y if terms.beta is None else y + terms.beta


@dataclass
class Comparison:
    """Errors relative to the size of what is compared; ``changed`` are the paths where the base is something else."""

    error: float = 0.0
    change: float = float("inf")
    changed: set[str] | None = None

    def note(self, path: str, got: Tensor, wanted: Tensor, base: Tensor) -> None:
        """One more place."""
        scale = 1 + float(wanted.abs().max())
        self.error = max(self.error, float((got - wanted).abs().max()) / scale)
        change = float((base - wanted).abs().max()) / scale
        if change > TOLERANCE:
            self.changed = (self.changed or set()) | {path}
            self.change = min(self.change, change)


def compare(block: Compiled, changed: nn.Module) -> Comparison:
    """Everything that a block says of parameters, against a model whose parameters were changed."""
    found, model, info = Comparison(), block.sites.model, block.sites.info
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for index, site in enumerate(info.sites):
            x = torch.randn(TOKENS, site.in_features, generator=random)
            wanted, base = changed.get_submodule(site.path)(x), model.get_submodule(site.path)(x)
            found.note(site.path, site_output(block, index, x), wanted, base)
        for place, norm in enumerate(info.norms):
            record = block.of(Kind.NORM, place)
            new, old = changed.get_submodule(norm.path), model.get_submodule(norm.path)
            for at, name in enumerate(("weight", "bias")):
                base = getattr(old, name, None)
                if base is not None:
                    said = None if record is None else record.tensors[at]
                    found.note(norm.path, base if said is None else said[0], getattr(new, name), base)
        ids = torch.arange(block.sites.model.config.vocab_size)
        base = model.get_input_embeddings()(ids)
        assert isinstance(changed, PreTrainedModel)
        found.note("embedding", embedded(block, base), changed.get_input_embeddings()(ids), base)
    return found


def embedded(block: Compiled, base: Tensor) -> Tensor:
    """The input embedding of every token with the adapter."""
    rows, pair = block.of(Kind.EMBED_ROWS), block.of(Kind.EMBED_PAIR)
    got = base.clone()
    if rows is not None:
        ids, new = rows.tensors
        assert ids is not None
        assert new is not None
        got[ids[0].long()] = new
    entries = block.of(Kind.EMBED_ENTRIES)
    if entries is not None:
        index, values = entries.tensors
        assert index is not None
        assert values is not None
        got.view(-1)[index[0].long()] += values[0]
    if pair is not None:
        a, b, outer = pair.tensors
        assert a is not None
        assert b is not None
        got = (got if outer is None else got * outer[0]) + a @ b
    return got


def applied(block: Compiled, family: str) -> PreTrainedModel:
    """A plain model that computes with what a block says of linears, norms and the embedding."""
    model, info = build(family), block.sites.info
    for index, site in enumerate(info.sites):
        module = model.get_submodule(site.path)
        module.register_forward_hook(
            lambda _, inputs, __, index=index: (
                site_output(block, index, inputs[0].reshape(-1, inputs[0].shape[-1]))
                .float()
                .view(*inputs[0].shape[:-1], -1)
            )
        )
    for place, norm in enumerate(info.norms):
        record = block.of(Kind.NORM, place)
        for at, name in enumerate(("weight", "bias")):
            said = None if record is None else record.tensors[at]
            if said is not None:
                getattr(model.get_submodule(norm.path), name).data.copy_(said[0])
    table = embedded(block, model.get_input_embeddings()(torch.arange(model.config.vocab_size))).detach()
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: table[inputs[0]])
    return model
