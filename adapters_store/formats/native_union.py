"""Our own ``X_UNION``: several adapters of any served types as one (MAM, UniPELT, S4), each in layers of its own.

Settings: ``members``, a list of whole configs, PEFT's, AdapterHub's or weft's own, and those of ``native_common``. A
member's config may have ``layers``, numbers of decoder layers, ascending: the member then knows no other part of the
backbone, and counts the layers of the list from 0. Tensors: ``member.<k>.`` in front of the names that member k's own
format has, and each keeps the dialect of that. At a linear the members act one after the other, in the order of the
list (``merge``).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from weft.adapters_store import formats
from weft.adapters_store.errors import AdapterInvalid, expected, quoted
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import DIALECT, read_common
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.merge import Member, merge
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.parts import Bottleneck, KVPrefix, NormOverride, Part
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo

METHOD = "X_UNION"

MEMBERS_MAX = 64
_NAME = re.compile(r"member\.(0|[1-9][0-9]{0,3})\.(.+)")

_OPERATORS = "those of its members"
SERVES = (
    Served("MAM adapter", "2110.04366", _OPERATORS, "weft X_UNION", survey=True),
    Served("S4", "2301.01821", _OPERATORS, "weft X_UNION, members with layers", survey=True),
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One member as the file says it: its config, its layers or None for the whole backbone, its tensors."""

    number: int
    values: dict[str, Any]
    layers: tuple[int, ...] | None
    header: Header

    @property
    def label(self) -> str:
        """For messages and notes."""
        return f"members[{self.number}] ({quoted(str(self.values.get('peft_type', 'AdapterHub')), 40)})"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    listed = settings.objects("members")
    settings.finish(METHOD)
    if not 1 <= len(listed) <= MEMBERS_MAX:
        raise expected("members", f"1 to {MEMBERS_MAX} configs", len(listed))
    headers = _headers(header, len(listed))
    asked = [_asked(number, values, headers[number], catalogue) for number, values in enumerate(listed)]
    members = [Member(member.label, _said_so(_parsed(member, catalogue))) for member in asked]
    dialects = dict.fromkeys((DIALECT, *(member.parsed.dialect for member in members)))
    union = merge(members, METHOD, ", ".join(dialects))
    paths = sorted(union.sites, key=catalogue.index.__getitem__)
    return replace(union, sites={path: union.sites[path] for path in paths})


def _headers(header: Header, members: int) -> list[Header]:
    """The tensors of each member by the names that its own format has; messages name them in full."""
    found: list[dict[str, Any]] = [{} for _ in range(members)]
    for name, tensor in header.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) >= members:
            raise expected(name, f"a name that begins with member. and a number below {members}", "another")
        found[int(match[1])][match[2]] = tensor
    for number, tensors in enumerate(found):
        if not tensors:
            raise expected(f"members[{number}]", f"tensors named member.{number}.", "none")
    return [Header(tensors, header.data_start) for tensors in found]


def _asked(number: int, values: Mapping[str, Any], header: Header, catalogue: CatalogueInfo) -> _Asked:
    config, at = dict(values), f"members[{number}]"
    if config.get("peft_type") == METHOD:
        raise expected(f"{at}.peft_type", "a type that is no union", METHOD, "list the members of both")
    layers = Settings({f"{at}.layers": config.pop("layers", None)}).integers(f"{at}.layers")
    if layers is None:
        return _Asked(number, config, None, header)
    count = len(catalogue.layers)
    if not layers or layers[-1] >= count or any(a >= b for a, b in pairwise(layers)):
        wanted = f"numbers of decoder layers from 0 to {count - 1}, ascending"
        raise expected(f"{at}.layers", wanted, show(list(layers)))
    return _Asked(number, config, layers, header)


def _parsed(asked: _Asked, catalogue: CatalogueInfo) -> ParsedAdapter:
    known = catalogue if asked.layers is None else _within(catalogue, asked.layers)
    try:
        parsed = formats.parse_values(dict(asked.values), asked.header, known)
    except AdapterInvalid as error:
        raise _named(error, asked) from None
    if asked.layers is None:
        return parsed
    parts = tuple(_renumbered(part, asked) for part in parsed.parts)
    return replace(parsed, parts=parts)


def _said_so(parsed: ParsedAdapter) -> ParsedAdapter:
    """The member with its own dialect, where that is another than the union's, among the folds of its linears."""
    if parsed.dialect == DIALECT:
        return parsed
    fold = f"read as {parsed.dialect}"
    return replace(parsed, sites={p: replace(s, folds=(*s.folds, fold)) for p, s in parsed.sites.items()})


def _named(error: AdapterInvalid, asked: _Asked) -> AdapterInvalid:
    """The refusal of a member, with its number: under the full name of a tensor, or that of a setting."""
    prefix, field = f"member.{asked.number}.", error.field
    if field in asked.header.tensors:
        field = f"{prefix}{field}"
    elif field and not field.startswith(prefix):
        field = f"members[{asked.number}].{field}"
    return AdapterInvalid(f"{asked.label}: {error.message}", field)


def _within(catalogue: CatalogueInfo, layers: Sequence[int]) -> CatalogueInfo:
    """What a backbone of these layers alone would have."""
    kept = [catalogue.layers[number] for number in layers]
    numbers = {number: new for new, number in enumerate(layers)}

    def inside(path: str) -> bool:
        return any(path == layer.path or path.startswith(f"{layer.path}.") for layer in kept)

    groups, at = [], 0
    for size in catalogue.groups:
        groups.append(sum(inside(site.path) for site in catalogue.sites[at : at + size]))
        at += size
    return replace(
        catalogue,
        sites=tuple(site for site in catalogue.sites if inside(site.path)),
        groups=tuple(size for size in groups if size),
        modules=frozenset(path for path in catalogue.modules if inside(path)),
        norms=tuple(norm for norm in catalogue.norms if inside(norm.path)),
        hidden=tuple(replace(p, layer=numbers[p.layer]) for p in catalogue.hidden if p.layer in numbers),
        layers=tuple(kept),
        embedding=None,
        declared=tuple(path for path in catalogue.declared if inside(path)),
    )


def _renumbered(part: Part, asked: _Asked) -> Part:
    """The part with the number that its layer has in the whole backbone."""
    assert asked.layers is not None
    if isinstance(part, Bottleneck | KVPrefix):
        return replace(part, layer=asked.layers[part.layer])
    if isinstance(part, NormOverride):
        return part
    what = type(part).__name__
    raise expected(f"members[{asked.number}].layers", "none", show(list(asked.layers)), f"a {what} is in no layer")
