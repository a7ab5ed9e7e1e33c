"""The threads that touch disk and bytes, so that the engine's does not: one makes images, one fills blocks.

They keep no books: a job says where to write, a result says what came of it. Compiling takes seconds and loading takes
milliseconds, so neither waits for the other; each kind of job is done in the order in which it was given, so that a
plan may count on the plans before it. On a GPU, bytes go through pinned memory and a stream of their own, behind
whatever the engine had launched when the job was given.
"""

import logging
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from weft.adapters_store.arena import Move, copy_overlapping
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.composition import Members, Source, read_composed
from weft.adapters_store.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterTooLarge,
    StoreBug,
)
from weft.adapters_store.files import COMPOSED, read_version
from weft.adapters_store.formats import parse_adapter
from weft.adapters_store.images import ImageFile, ImageMissing, Images
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.report import AdapterReport
from weft.adapters_store.sites import SiteCatalogue
from weft.kernels.layout import Directory, Geometry, directory

PINNED_BYTES = 8 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareJob:
    """Compile a version and store its image."""

    digest: str


@dataclass(frozen=True)
class MakeJob:
    """Store the image of a version that was registered, and say how large its block is.

    members:  of a derived version
    source:   of a bank: a version that refers to it, and the members of that if it is a derived one
    anew:     also if there is one: it is damaged
    """

    digest: str
    members: Members = ()
    source: Source | None = None
    anew: bool = False


@dataclass(frozen=True)
class RemoveJob:
    """Delete the image of a version."""

    digest: str
    members: Members = ()


@dataclass(frozen=True)
class SizeJob:
    """Say how large a version's block is."""

    digest: str
    members: Members = ()


@dataclass(frozen=True)
class MoveJob:
    """Copy the block of a version to where its place is now."""

    digest: str
    move: Move
    ready: "torch.cuda.Event | None"


@dataclass(frozen=True)
class LoadJob:
    """Fill the block at ``offset``."""

    digest: str
    offset: int
    nbytes: int
    ready: "torch.cuda.Event | None"
    members: Members = ()


ImageJob = PrepareJob | MakeJob | RemoveJob
BlockJob = SizeJob | MoveJob | LoadJob
Job = ImageJob | BlockJob


@dataclass(frozen=True)
class Done:
    """What came of a job: an error, or what it asked for.

    nbytes:     of the block
    report:     of a PrepareJob, and of a MakeJob that compiled the version itself
    directory:  of a LoadJob
    unusable:   whether a SizeJob or LoadJob found no image, or a damaged one
    """

    job: Job
    seconds: float = 0.0
    error: AdapterError | None = None
    nbytes: int = 0
    report: AdapterReport | None = None
    directory: Directory | None = None
    unusable: bool = False


class Loader:
    """Two threads, a queue of jobs to each and a queue of results from both. One other thread may call the methods.

    buffer:     the arena's bytes
    bytes_max:  the most that a block may take
    """

    def __init__(
        self, root: Path, catalogue: SiteCatalogue, geometry: Geometry, buffer: Tensor, bytes_max: int
    ) -> None:
        self._root, self._catalogue, self._geometry = root, catalogue, geometry
        self._buffer, self._bytes_max = buffer, bytes_max
        self._images = Images(root, catalogue.info.digest, geometry.dtype)
        self._composed = replace(self._images, folder=COMPOSED)
        self._composed.clear()
        self._device = _Device(buffer) if buffer.is_cuda else None
        self._results: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._open = 0
        self._making, self._loading = _Thread("adapter-compiler", self), _Thread("adapter-loader", self)

    @property
    def busy(self) -> bool:
        """Whether a job is under way or a result has not been taken."""
        return self._open > 0

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._open += 1
        (self._making if isinstance(job, ImageJob) else self._loading).jobs.put(job)

    def take(self) -> list[Done]:
        """Results since the last call, those of each thread in the order of their jobs; never waits."""
        found: list[Done] = []
        with suppress(queue.Empty):
            while True:
                found.append(self._results.get_nowait())
        self._open -= len(found)
        return found

    def close(self) -> None:
        """Finish the jobs under way and stop; jobs behind them are dropped."""
        self._closing.set()
        for each in (self._making, self._loading):
            each.jobs.put(None)
            each.thread.join()

    @property
    def closing(self) -> bool:
        """Whether jobs that are left are dropped."""
        return self._closing.is_set()

    def work(self, job: Job) -> None:
        """Do a job; what came of it, an error included, is among the results. For the loader's own threads."""
        start = time.monotonic()
        try:
            done = self._do(job)
        except AdapterError as error:
            done = Done(job, error=error)
        except Exception:
            # one of the three places: whatever a job trips over, the thread lives to do the next
            incident = secrets.token_hex(6)
            log.exception("incident %s: %s of %.12s", incident, type(job).__name__, job.digest)
            done = Done(job, error=StoreBug(f"a defect of the server, incident {incident}"))
        self._results.put(replace(done, seconds=time.monotonic() - start))

    def _do(self, job: Job) -> Done:
        match job:
            case PrepareJob(digest):
                report = self._prepare(digest)
                return Done(job, nbytes=report.device_bytes, report=report)
            case MakeJob():
                return self._make(job)
            case RemoveJob(digest):
                self._images_of(job).remove(digest)
                return Done(job)
            case MoveJob(_, move, ready):
                with self._behind(ready):
                    copy_overlapping(self._buffer, move)
                return Done(job)
            case SizeJob() | LoadJob():
                return self._from_image(job)

    def _images_of(self, job: SizeJob | MakeJob | LoadJob | RemoveJob) -> Images:
        return self._composed if job.members else self._images

    def _behind(self, ready: "torch.cuda.Event | None") -> AbstractContextManager[None]:
        return self._device.behind(ready) if self._device else nullcontext()

    def _prepare(self, digest: str) -> AdapterReport:
        parsed = parse_adapter(read_version(self._root, digest), self._catalogue.info)
        return self._compile(parsed, digest, self._images)

    def _compose(self, digest: str, members: Members) -> AdapterReport:
        # judged before the bytes of any member are read
        self._require_room(read_composed(self._root, members, self._catalogue.info, data=False))
        return self._compile(read_composed(self._root, members, self._catalogue.info), digest, self._composed)

    def _require_room(self, parsed: ParsedAdapter) -> None:
        nbytes = block_bytes(parsed, self._geometry, self._catalogue)
        if nbytes > self._bytes_max:
            wanted = f"a block of at most {self._bytes_max} bytes"
            raise AdapterTooLarge(f"device memory: expected {wanted}, got one of {nbytes}")

    def _compile(self, parsed: ParsedAdapter, digest: str, images: Images) -> AdapterReport:
        try:
            keep = self._images.write
            block, report = compile_adapter(parsed, self._catalogue, self._geometry, self._bytes_max, keep)
        except MemoryError:
            raise AdapterTooLarge("host memory: expected room to compile this adapter, got none") from None
        images.write(digest, block)
        return report

    def _make(self, job: MakeJob) -> Done:
        """Compile a version unless a job before this one did."""
        images = self._images_of(job)
        if not job.anew:
            with suppress(ImageMissing, AdapterCorrupt):
                return Done(job, nbytes=images.nbytes(job.digest))
        digest, members = job.source or (job.digest, job.members)
        try:
            report = self._compose(digest, members) if members else self._prepare(digest)
        except AdapterInvalid as error:
            if members:
                # each is valid, so it is the list that is not
                raise
            # it was valid when it was registered, so it was for another backbone
            raise AdapterIncompatible(error.message, error.field) from error
        try:
            return Done(job, nbytes=images.nbytes(job.digest), report=None if job.source else report)
        except ImageMissing:
            raise AdapterCorrupt("image: expected what refers to it to make it, got others") from None

    def _from_image(self, job: SizeJob | LoadJob) -> Done:
        try:
            with self._images_of(job).opened(job.digest) as image:
                if isinstance(job, SizeJob):
                    return Done(job, nbytes=image.nbytes)
                return Done(job, nbytes=job.nbytes, directory=self._fill(job, image))
        except ImageMissing:
            return Done(job, unusable=True)
        except AdapterCorrupt:
            log.warning("the image of %.12s is damaged", job.digest)
            return Done(job, unusable=True)

    def _fill(self, job: LoadJob, image: ImageFile) -> Directory:
        if image.nbytes != job.nbytes:
            raise AdapterCorrupt("image: expected its length to stay, got another")
        block = self._buffer[job.offset : job.offset + job.nbytes]
        with self._behind(job.ready):
            if self._device:
                self._device.copy(image, block)
            else:
                image.read_into(block)
            image.verify()
            return directory(block)


class _Thread:
    """A thread that does the jobs of its queue, one by one. It keeps no loader, and no arena, that nobody wants."""

    def __init__(self, name: str, loader: Loader) -> None:
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        own = weakref.ref(loader)
        self.thread = threading.Thread(target=_work, args=(own, self.jobs), name=name, daemon=True)
        self.thread.start()
        weakref.finalize(loader, self.jobs.put, None)


@torch.inference_mode()
def _work(own: "weakref.ref[Loader]", jobs: "queue.SimpleQueue[Job | None]") -> None:
    """What a thread does until it is told to stop, or its loader is gone."""
    # this thread's own setting: a second team of threads would fight the engine's for the cores
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        loader = own()
        if loader is None or loader.closing:
            return
        loader.work(job)
        del loader


class _Device:
    """How bytes reach a GPU: through pinned memory, on a stream that nothing else waits for."""

    def __init__(self, buffer: Tensor) -> None:
        self._stream = torch.cuda.Stream(buffer.device)  # type: ignore[no-untyped-call]
        self._pinned = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)

    @contextmanager
    def behind(self, ready: "torch.cuda.Event | None") -> Iterator[None]:
        """Launch what follows on the copy stream, after ``ready``, and wait until the device has done it."""
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            try:
                yield
            finally:
                # moves that were launched are over before anybody hears of the job, also when it failed
                self._stream.synchronize()

    def copy(self, image: ImageFile, block: Tensor) -> None:
        """The image's bytes to the block."""
        for start in range(0, image.nbytes, PINNED_BYTES):
            part = self._pinned[: min(PINNED_BYTES, image.nbytes - start)]
            image.read_into(part)
            block[start : start + part.numel()].copy_(part, non_blocking=True)
            # the pinned bytes are needed again
            self._stream.synchronize()
