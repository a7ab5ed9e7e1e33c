"""One name of the catalog, and how it is written: a record whose last line is the checksum of the lines before it."""

import hashlib
import json
import re
import zlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from weft.adapters_store.errors import AdapterCorrupt, AdapterInvalid, quoted
from weft.adapters_store.files import is_digest
from weft.adapters_store.report import AdapterReport, SiteSummary

FORMAT = 2
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

State = Literal["active", "incompatible"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A name and the version that it points to.

    device_bytes:     of the compiled block, for the backbone it was registered with
    site_count:       modules that the adapter changes
    disk_bytes:       of the files as received
    create_time_ms:   wall clock, since the epoch
    backbone_digest:  the backbone it was registered with
    context_tokens:   of the backbone's context that the adapter takes for itself
    banks:            digests of the blocks that it shares with others
    state, reason:    judged for the backbone that is loaded, not stored
    """

    name: str
    digest: str
    method: str
    dialect: str
    device_bytes: int
    site_count: int
    notes: tuple[str, ...]
    disk_bytes: int
    create_time_ms: int
    backbone_digest: str
    context_tokens: int = 0
    banks: tuple[str, ...] = ()
    state: State = "active"
    reason: str = ""
    # thousands of entries of hundreds of sites: kept small until somebody asks
    packed_sites: bytes = field(default=b"", repr=False)

    @property
    def report(self) -> AdapterReport:
        """The per-site report of registration."""
        rows = json.loads(zlib.decompress(self.packed_sites))
        sites = tuple(
            SiteSummary(module, tuple(operators), rank, size, tuple(folds))
            for module, operators, rank, size, folds in rows
        )
        return AdapterReport(self.method, self.dialect, self.device_bytes, sites, self.notes, banks=self.banks)


def make_entry(
    name: str, digest: str, report: AdapterReport, *, disk_bytes: int, create_time_ms: int, backbone_digest: str
) -> Entry:
    """A new entry from what registration found."""
    rows = [[s.module, s.operators, s.rank, s.bytes, s.folds] for s in report.sites]
    return Entry(
        name=name,
        digest=digest,
        method=report.method,
        dialect=report.dialect,
        device_bytes=report.device_bytes,
        site_count=len(report.sites),
        notes=report.notes,
        disk_bytes=disk_bytes,
        create_time_ms=create_time_ms,
        backbone_digest=backbone_digest,
        context_tokens=report.traits.extra_rows + report.traits.position_offset,
        banks=report.banks,
        packed_sites=_pack(json.dumps(rows, separators=(",", ":")).encode()),
    )


def check_name(name: str, field: str = "name") -> str:
    """The name itself. AdapterInvalid of ``field`` unless it follows the grammar, which knows no paths."""
    if not NAME.fullmatch(name):
        wanted = f"a name that matches {NAME.pattern}"
        raise AdapterInvalid(f"{field}: expected {wanted}, got {quoted(name, 140)!r}", field)
    return name


def record_name(name: str) -> str:
    """File name of a name's record."""
    return f"{hashlib.sha256(name.encode()).hexdigest()}.json"


def encode(entry: Entry) -> bytes:
    """The record of an entry."""
    head = asdict(entry)
    for key in ("state", "reason", "packed_sites"):
        del head[key]
    lines = json.dumps({"format": FORMAT, **head}).encode() + b"\n" + zlib.decompress(entry.packed_sites) + b"\n"
    return lines + hashlib.sha256(lines).hexdigest().encode() + b"\n"


def decode(record: bytes) -> Entry:
    """The entry of a record. AdapterCorrupt if it is torn, damaged or of another format."""
    lines, _, checksum = record.removesuffix(b"\n").rpartition(b"\n")
    lines += b"\n"
    if hashlib.sha256(lines).hexdigest().encode() != checksum:
        raise AdapterCorrupt("record: expected its last line to be the checksum of the others")
    head, _, sites = lines.removesuffix(b"\n").partition(b"\n")
    values: dict[str, Any] = json.loads(head)
    if values.pop("format", None) != FORMAT:
        raise AdapterCorrupt(f"record: expected format {FORMAT}, got another")
    # records of before there were banks are whole without
    values.setdefault("banks", ())
    if values.keys() != {f.name for f in fields(Entry)} - {"state", "reason", "packed_sites"}:
        raise AdapterCorrupt("record: expected the fields of an entry, got others")
    lists = {key: tuple(values[key]) for key in ("notes", "banks")}
    entry = Entry(**{**values, **lists}, packed_sites=_pack(sites))
    if not NAME.fullmatch(entry.name) or not is_digest(entry.digest):
        raise AdapterCorrupt("record: expected a name and a digest, got something else")
    return entry


def _pack(sites: bytes) -> bytes:
    return zlib.compress(sites, 1)
