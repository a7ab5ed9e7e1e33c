"""``AdapterService``: uploads in pieces, and the names of the store."""

import asyncio
import base64
import binascii
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator

from weft.adapters_store.entry import Entry
from weft.proto.v1.adapters_pb2 import (
    AdapterHeader,
    DeleteAdapterRequest,
    DeleteAdapterResponse,
    GetAdapterRequest,
    GetAdapterResponse,
    ListAdaptersRequest,
    ListAdaptersResponse,
    RegisterAdapterRequest,
    RegisterAdapterResponse,
)
from weft.proto.v1.common_pb2 import Adapter, AdapterState, SiteReport
from weft.server import validation
from weft.server.doors.edge import Call
from weft.server.errors import DeadlineExceeded, InvalidRequest, UploadInvalid, UploadsBusy, UploadStalled
from weft.server.metrics import Metrics
from weft.server.registration import Arrival, Registrar
from weft.server.relay import Relay

TOKEN_CHECK_BYTES = 8


class AdapterService:
    """Registers, lists and removes adapters."""

    def __init__(
        self,
        relay: Relay,
        registrar: Registrar,
        metrics: Metrics,
        *,
        adapter_bytes_max: int,
        uploads_max: int,
        idle_s_max: float,
        duration_s_max: float,
    ) -> None:
        self._relay = relay
        self._registrar = registrar
        self._metrics = metrics
        self._adapter_bytes_max = adapter_bytes_max
        self._uploads_max = uploads_max
        self._idle_s_max = idle_s_max
        self._duration_s_max = duration_s_max
        self._uploads = 0

    async def RegisterAdapter(
        self, requests: AsyncIterator[RegisterAdapterRequest], call: Call
    ) -> RegisterAdapterResponse:
        """Take an upload; one of a limited number at a time."""
        self._relay.admit()
        duration_s = call.time_s(self._duration_s_max)
        try:
            async with asyncio.timeout(duration_s):
                header = await self._header(requests)
                sha256 = validation.read_header(header, self._adapter_bytes_max)
                return RegisterAdapterResponse(adapter=await self._take(header, sha256, requests))
        except TimeoutError:
            text = f"upload was not done after {duration_s:g} s, its deadline or the server's maximum"
            raise DeadlineExceeded(text) from None

    async def GetAdapter(self, request: GetAdapterRequest, call: Call) -> GetAdapterResponse:
        """Return one adapter with its report."""
        return GetAdapterResponse(adapter=self._message(self._registrar.get(request.name), sites=True))

    async def ListAdapters(self, request: ListAdaptersRequest, call: Call) -> ListAdaptersResponse:
        """Return a page of adapters."""
        size = validation.read_page_size(request.page_size)
        after = _name_of(request.page_token, request.method) if request.page_token else ""
        # one more than asked for tells whether there is another page
        entries = self._registrar.page(after, size + 1, request.method)
        page = entries[:size]
        return ListAdaptersResponse(
            adapters=[self._message(entry, sites=False) for entry in page],
            next_page_token=_token_of(page[-1].name, request.method) if len(entries) > size else "",
        )

    async def DeleteAdapter(self, request: DeleteAdapterRequest, call: Call) -> DeleteAdapterResponse:
        """Forget a name."""
        self._relay.admit()
        await self._registrar.delete(request.name)
        return DeleteAdapterResponse()

    async def _header(self, requests: AsyncIterator[RegisterAdapterRequest]) -> AdapterHeader:
        """The first message, which must say what is coming."""
        first = await self._next(requests)
        if first is None or first.WhichOneof("part") != "header":
            raise UploadInvalid("expected a header as the first message, got none", field="header")
        return first.header

    async def _take(
        self, header: AdapterHeader, sha256: bytes | None, requests: AsyncIterator[RegisterAdapterRequest]
    ) -> Adapter:
        """Register what arrives, unless too many uploads run already."""
        if self._uploads >= self._uploads_max:
            raise UploadsBusy(f"uploads_max is {self._uploads_max}, and as many run")
        self._count(+1)
        try:
            arrival = Arrival(
                name=header.name,
                config=header.config,
                weights=self._chunks(requests),
                weights_bytes=header.weights_size,
                weights_sha256=sha256,
                replace=header.replace,
            )
            return self._message(await self._registrar.register(arrival), sites=True)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._uploads += change
        self._metrics.uploading(change)

    async def _chunks(self, requests: AsyncIterator[RegisterAdapterRequest]) -> AsyncGenerator[bytes, None]:
        """The weights, piece by piece, each of a size that is worth its way."""
        count = 0
        while (request := await self._next(requests)) is not None:
            count += 1
            if request.WhichOneof("part") != "chunk":
                raise UploadInvalid("expected a chunk after the header, got something else", field="chunk")
            if not 1 <= len(request.chunk) <= validation.CHUNK_BYTES_MAX:
                expected = f"1 to {validation.CHUNK_BYTES_MAX} bytes"
                raise UploadInvalid(f"a chunk must have {expected}, got {len(request.chunk)}", field="chunk")
            if count > validation.CHUNKS_MAX:
                raise UploadInvalid(f"expected at most {validation.CHUNKS_MAX} chunks, got more", field="chunk")
            yield request.chunk

    async def _next(self, requests: AsyncIterator[RegisterAdapterRequest]) -> RegisterAdapterRequest | None:
        """The next message, None at the end; a sender that brings nothing for too long loses the upload."""
        try:
            async with asyncio.timeout(self._idle_s_max):
                return await anext(requests, None)
        except TimeoutError:
            text = f"expected the next piece of the upload within {self._idle_s_max:g} s, got none"
            raise UploadStalled(text) from None

    def _message(self, entry: Entry, *, sites: bool) -> Adapter:
        active, reason = self._registrar.state(entry)
        state = AdapterState.ADAPTER_STATE_ACTIVE if active else AdapterState.ADAPTER_STATE_INCOMPATIBLE
        return Adapter(
            name=entry.name,
            method=entry.method,
            dialect=entry.dialect,
            digest=entry.digest,
            disk_bytes=entry.disk_bytes,
            device_bytes=entry.device_bytes,
            site_count=entry.site_count,
            state=state,
            state_reason=reason,
            create_time_ms=entry.create_time_ms,
            sites=_sites(entry) if sites else (),
            notes=entry.notes,
        )


def _sites(entry: Entry) -> list[SiteReport]:
    return [
        SiteReport(module=site.module, operators=site.operators, rank=site.rank, bytes=site.bytes, folds=site.folds)
        for site in entry.report.sites
    ]


def _check(name: str, method: str) -> bytes:
    return hashlib.sha256(f"{name}\0{method}".encode()).digest()[:TOKEN_CHECK_BYTES]


def _token_of(name: str, method: str) -> str:
    """A token that names the last adapter of a page, in a form that nobody is tempted to make up."""
    return base64.urlsafe_b64encode(_check(name, method) + name.encode()).decode()


def _name_of(token: str, method: str) -> str:
    """The name in a token of ours for the same list."""
    try:
        raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        name = raw[TOKEN_CHECK_BYTES:].decode("ascii")
    except (binascii.Error, UnicodeError):
        raw, name = b"", ""
    if not name or raw[:TOKEN_CHECK_BYTES] != _check(name, method):
        text = "expected next_page_token of an answer for the same method, got something else"
        raise InvalidRequest(text, field="page_token")
    return name
