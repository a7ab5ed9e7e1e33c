"""What the residency hands out: leases on blocks, results of preparing, and figures."""

from dataclasses import dataclass

from weft.adapters_store.errors import AdapterError
from weft.adapters_store.report import AdapterReport
from weft.kernels.batch import Block


@dataclass(frozen=True, eq=False)
class Lease:
    """An adapter in use: its block, and the banks that it refers to, stay where they are until it is released."""

    digest: str
    block: Block
    banks: tuple["Lease", ...] = ()


@dataclass(frozen=True)
class PrepareResult:
    """What came of ``prepare``: a report, or the error."""

    digest: str
    report: AdapterReport | None = None
    error: AdapterError | None = None


@dataclass(frozen=True)
class ResidencyStats:
    """Bytes and blocks in the arena now; the others since they were last asked for.

    adapters_bytes:  of all blocks, those being loaded included, but for those of derived versions, composed_bytes, and
                     those that adapters refer to, shared_bytes;  ``adapters_resident``: how many
    load_s:          one per load, from its start on the loader to the last byte
    """

    adapters_bytes: int
    adapters_resident: int
    composed_bytes: int
    shared_bytes: int
    loads: int
    evictions: int
    load_s: tuple[float, ...]
