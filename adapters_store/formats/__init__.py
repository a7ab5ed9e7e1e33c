"""Files to operators: one parser per method, chosen by ``peft_type``. Imports no torch.

A parser is ``parse(settings, header, catalogue) -> ParsedAdapter``: it takes every setting that it understands,
refuses what would change the maths unseen, and judges every tensor's name and shape. A new method is one such file
and its line in ``PARSERS``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from weft.adapters_store.errors import expected
from weft.adapters_store.files import CONFIG, AdapterFiles
from weft.adapters_store.formats import (
    hub,
    native,
    native_krona,
    peft_adalora,
    peft_ia3,
    peft_lokr,
    peft_lora,
    peft_vblora,
)
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_types import PARSERS as PEFT_PARSERS
from weft.adapters_store.formats.refused import REFUSED
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.strict_json import read_object

Parser = Callable[[Settings, Header, CatalogueInfo], ParsedAdapter]

PARSERS: Mapping[str, Parser] = {
    peft_lora.METHOD: peft_lora.parse,
    peft_adalora.METHOD: peft_adalora.parse,
    peft_lokr.METHOD: peft_lokr.parse,
    peft_ia3.METHOD: peft_ia3.parse,
    native_krona.METHOD: native_krona.parse,
    **PEFT_PARSERS,
    **native.PARSERS,
}
# methods that leave sites out by tensors of rank 0, or out of several weights save all but the last
MAY_BE_EMPTY = {peft_adalora.METHOD, peft_vblora.METHOD}
ALIASES = {"KRONA": native_krona.METHOD}


def read_adapter(folder: Path, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Read and judge the two files of an adapter. Every refusal is an AdapterInvalid: field, expected, got."""
    return parse_adapter(AdapterFiles.read(folder), catalogue)


def parse_adapter(files: AdapterFiles, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Judge files that have been read."""
    parsed = parse_values(read_object(files.config, CONFIG), files.header, catalogue)
    return replace(parsed, weights=files.data)


def parse_values(values: dict[str, Any], header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Judge the content of a config, which is used up, and the tensors beside it."""
    said = values.pop("peft_type", None)
    served = ", ".join(PARSERS)
    if said is None and hub.is_hub(values):
        return hub.parse(values, header, catalogue)
    method = ALIASES.get(said, said) if isinstance(said, str) else None
    parser = PARSERS.get(method) if method is not None else None
    if parser is None:
        raise expected("peft_type", f"one of {served}", show(said), REFUSED.get(method or "", ""))
    if method not in MAY_BE_EMPTY:
        _require_values(header)
    return parser(Settings(values), header, catalogue)


def served() -> tuple[Served, ...]:
    """What the files of this folder say that they serve: the methods of the survey first, each group by name."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    rows: list[Served] = [row for module in modules for row in getattr(module, "SERVES", ())]
    return tuple(sorted(rows, key=lambda row: (not row.survey, row.name.lower())))


def _require_values(header: Header) -> None:
    for name, tensor in header.tensors.items():
        if not tensor.elements:
            raise expected(name, "a shape of sizes that are each at least 1", list(tensor.shape))
