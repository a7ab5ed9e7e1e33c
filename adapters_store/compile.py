"""Compiles a parsed adapter: reads its values, folds them to the normal form, proves the fold, lays out the image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import frexp

import torch
from torch import Tensor

from weft.adapters_store.banks import REFERENCE_WORDS, bank_bytes, bank_image, banks_of, counted, reference
from weft.adapters_store.errors import AdapterTooLarge, StoreBug
from weft.adapters_store.fold import (
    Folded,
    bottleneck_bytes,
    fold_bottleneck,
    fold_site,
    kron_becomes_low_rank,
    record_words,
    site_bytes,
)
from weft.adapters_store.operators import Bank, Kron, LowRank, ParsedAdapter, SiteOperators
from weft.adapters_store.parts import TAPS, Bottleneck, Part
from weft.adapters_store.plans import RecordPlan, module_of, plan_part
from weft.adapters_store.proof import prove
from weft.adapters_store.report import AdapterReport, SiteSummary
from weft.adapters_store.sites import CatalogueInfo, SiteCatalogue
from weft.adapters_store.traits import traits_of
from weft.adapters_store.values import Values, name_of
from weft.kernels.extras import Extra
from weft.kernels.layout import (
    ALIGN,
    HEADER_WORDS,
    KRON_WORDS,
    SITE_WORDS,
    UNIT,
    Geometry,
    SiteTerms,
    directory,
    pack,
    round_up,
    unpack,
    unpack_records,
)

WORD_BYTES = 4


Keep = Callable[[str, Tensor], None]


def compile_adapter(
    parsed: ParsedAdapter,
    catalogue: SiteCatalogue,
    geometry: Geometry,
    bytes_max: int,
    keep: Keep | None = None,
) -> tuple[Tensor, AdapterReport]:
    """The block of an adapter, uint8 on the host, and the report of what became of it.

    bytes_max:  the most a block and the banks that it refers to may take; judged from shapes, before anything is
                allocated
    keep:       given the digest and the image of each bank, once the block is made
    AdapterInvalid if a value cannot be served, AdapterTooLarge if the block would not fit.
    """
    _require_room(parsed, catalogue, geometry, bytes_max)
    values = Values(parsed, catalogue)
    for ref, path in parsed.copies:
        values.require_copy(ref, path, catalogue)
    for ref in parsed.zeros:
        values.require_zeros(ref)
    block = _Block(catalogue, geometry, values, banks_of(parsed))
    shared = [bank_image(bank, values, geometry) for bank in block.banks]
    block.records += [reference(number, digest) for number, (digest, _) in enumerate(shared)]
    for path, said in parsed.sites.items():
        block.add_site(path, said)
    for part in parsed.parts:
        block.add_part(part)
    image = block.image()
    if keep is not None:
        for digest, shared_image in shared:
            keep(digest, shared_image)
    notes = *parsed.notes, *_notes(parsed, values, geometry.dtype), *_shared_notes(shared)
    traits = traits_of(directory(image))
    banks = tuple(digest for digest, _ in shared)
    summaries = tuple(block.summaries)
    return image, AdapterReport(parsed.method, parsed.dialect, image.numel(), summaries, notes, traits, banks)


def _require_room(parsed: ParsedAdapter, catalogue: SiteCatalogue, geometry: Geometry, bytes_max: int) -> None:
    shared = sum(bank_bytes(bank, geometry) for bank in banks_of(parsed))
    nbytes = block_bytes(parsed, geometry, catalogue) + shared
    if nbytes > bytes_max:
        raise AdapterTooLarge(f"device memory: expected a block of at most {bytes_max} bytes, got one of {nbytes}")


@dataclass
class _Block:
    """What goes into an image, while it is gathered."""

    catalogue: SiteCatalogue
    geometry: Geometry
    values: Values
    banks: list[Bank]
    terms: dict[int, SiteTerms] = field(default_factory=dict)
    records: list[Extra] = field(default_factory=list)
    summaries: list[SiteSummary] = field(default_factory=list)

    def add_site(self, path: str, said: SiteOperators) -> None:
        """The operators of one linear."""
        info, dtype = self.catalogue.info, self.geometry.dtype
        index = info.index[path]
        folded = fold_site(info.sites[index], said, self.values, self.catalogue, dtype)
        prove(folded, said, self.values, self.catalogue)
        if not folded.empty:
            self.terms[index] = folded.rounded(dtype)
        for plan in folded.deltas:
            number = None if plan.bank is None else self.banks.index(plan.bank)
            self.records.append(counted(plan.fill(self.values), number))
        self.summaries.append(_summary(folded, site_bytes(said, folded.site, dtype)))
        self.values.next_site()

    def add_part(self, part: Part) -> None:
        """What is no linear."""
        info, dtype = self.catalogue.info, self.geometry.dtype
        plan = plan_part(part, info, dtype)
        if plan is not None:
            self.records.append(plan.fill(self.values))
            self.summaries.append(_record_summary(plan))
        else:
            assert isinstance(part, Bottleneck)
            index = len(info.sites) + info.hidden_index[part.layer, part.after]
            self.terms[index] = fold_bottleneck(part, self.values, dtype, TAPS.index(part.tap))
            self.summaries.append(_bottleneck_summary(part, info, dtype))
        self.values.next_site()

    def image(self) -> Tensor:
        """All of it, laid out and read back."""
        self.records.sort(key=lambda record: (record.kind, record.place))
        image = pack(self.geometry, self.terms, self.records)
        _check_image(image, self.geometry, self.terms, self.records)
        return image


def _shared_notes(shared: Sequence[tuple[str, Tensor]]) -> list[str]:
    return [
        f"{image.numel()} bytes of factors are shared with every adapter that has the same ({digest[:12]})"
        for digest, image in shared
    ]


def block_bytes(parsed: ParsedAdapter, geometry: Geometry, catalogue: SiteCatalogue) -> int:
    """Length of the block that an adapter compiles to, from shapes alone."""
    info = catalogue.info
    words = HEADER_WORDS + len(geometry.sites) * SITE_WORDS
    body = 0
    for path in sorted(parsed.sites, key=info.index.__getitem__):
        site, said = info.sites[info.index[path]], parsed.sites[path]
        body += site_bytes(said, site, geometry.dtype)
        krons = sum(
            isinstance(operator, Kron) and not kron_becomes_low_rank(operator, site, geometry.dtype)
            for operator in said.operators
        )
        if krons:
            words = round_up(words, UNIT // WORD_BYTES) + krons * KRON_WORDS
    words += REFERENCE_WORDS * len(banks_of(parsed))
    for path, said in parsed.sites.items():
        words += record_words(said.operators, info.sites[info.index[path]], geometry.dtype)
    for part in parsed.parts:
        plan = plan_part(part, info, geometry.dtype)
        if plan is not None:
            words, body = words + plan.head_words, body + plan.nbytes
        else:
            assert isinstance(part, Bottleneck)
            body += bottleneck_bytes(part, geometry.dtype)
    return round_up(round_up(words * WORD_BYTES, ALIGN) + body, ALIGN)


def _summary(folded: Folded, size: int) -> SiteSummary:
    return SiteSummary(folded.site.path, tuple(folded.words), folded.rank, size, tuple(folded.folds))


def _record_summary(plan: RecordPlan) -> SiteSummary:
    return SiteSummary(plan.module, (plan.words,), plan.rank, plan.nbytes)


def _bottleneck_summary(part: Bottleneck, info: CatalogueInfo, dtype: torch.dtype) -> SiteSummary:
    assert part.plain
    rank = part.down.shape[0]
    words = (f"bottleneck r={rank} {part.act} of {part.tap}",)
    return SiteSummary(module_of(part, info), words, rank, bottleneck_bytes(part, dtype))


def _notes(parsed: ParsedAdapter, values: Values, dtype: torch.dtype) -> list[str]:
    operators = [operator for said in parsed.sites.values() for operator in said.operators]
    # vectors stay in fp32
    if dtype == torch.float32 or not any(isinstance(operator, LowRank | Kron) for operator in operators):
        return _large(values)
    notes = [
        f"{name_of(source)} factors rounded once to {name_of(dtype)}"
        for source in sorted(values.dtypes, key=str)
        if source != dtype
    ]
    scales = {operator.scale for operator in operators if isinstance(operator, LowRank | Kron)}
    if dtype in values.dtypes and any(abs(frexp(scale)[0]) != 0.5 for scale in scales):
        notes.append(f"scales folded into {name_of(dtype)} factors, rounded once")
    return notes + _large(values)


def _large(values: Values) -> list[str]:
    largest, name = values.large
    return [f"{name} holds values up to {largest:g}, which is unusual"] if name else []


def _check_image(image: Tensor, geometry: Geometry, terms: Mapping[int, SiteTerms], records: Sequence[Extra]) -> None:
    """What a kernel will read is what was put in, bit for bit."""
    for put, read in zip(records, unpack_records(geometry, image), strict=True):
        pairs = zip(put.tensors, read.tensors, strict=True)
        same = all(
            a is b is None or (a is not None and b is not None and torch.equal(a.view_as(b), b)) for a, b in pairs
        )
        if not same or (put.kind, put.place, put.options) != (read.kind, read.place, read.options):
            raise StoreBug(f"the image does not hold the {put.kind.name} record that was packed for {put.place}")
    found = unpack(geometry, image)
    if found.keys() != terms.keys():
        raise StoreBug("the image does not have the sites that were packed")
    for index, term in terms.items():
        for ours, theirs in zip(_tensors(term), _tensors(found[index]), strict=True):
            if not torch.equal(ours, theirs):
                raise StoreBug(f"the image does not hold what was packed at site {index}")


def _tensors(term: SiteTerms) -> list[Tensor]:
    pairs = [*([term.low_rank] if term.low_rank is not None else []), *term.krons]
    vectors = [v for v in (term.sigma, term.beta, term.sigma_in, term.inner) if v is not None]
    return [tensor for pair in pairs for tensor in pair] + vectors
