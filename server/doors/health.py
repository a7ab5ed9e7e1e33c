"""``grpc.health.v1.Health``: whether to send requests here. Setting a status never waits for those who watch it."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse

from weft.server.doors.edge import Call
from weft.server.errors import Overloaded, ServiceUnknown

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]
SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN
# a watch never ends and asks for no token: strangers must not take the places of callers
WATCHES_MAX = 256


class Health:
    """The status of each service, and who watches."""

    def __init__(self, statuses: Mapping[str, bool]) -> None:
        self._statuses = dict(statuses)
        self._changed = asyncio.Event()
        self._ended = False
        self._watches = 0

    def set(self, statuses: Mapping[str, bool]) -> None:
        """Change statuses; whoever watches hears the last one, not every one."""
        self._statuses.update(statuses)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def end(self) -> None:
        """Let those who watch go, after they heard the last status."""
        self._ended = True
        self.set({})

    async def Check(self, request: HealthCheckRequest, call: Call) -> HealthCheckResponse:
        """Return one status."""
        if request.service not in self._statuses:
            raise ServiceUnknown("expected a service of this server, got another one", field="service")
        return HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: HealthListRequest, call: Call) -> HealthListResponse:
        """Return all statuses."""
        return HealthListResponse(
            statuses={each: HealthCheckResponse(status=self._status(each)) for each in self._statuses}
        )

    async def Watch(self, request: HealthCheckRequest, call: Call) -> AsyncGenerator[HealthCheckResponse, None]:
        """Send the status now and whenever it changes; also of services that do not exist yet."""
        if self._watches >= WATCHES_MAX:
            raise Overloaded(f"expected at most {WATCHES_MAX} who watch, got one more")
        self._watches += 1
        try:
            async with aclosing(self._changes(request.service)) as changes:
                async for each in changes:
                    yield HealthCheckResponse(status=each)
        finally:
            self._watches -= 1

    async def _changes(self, service: str) -> AsyncGenerator[HealthCheckResponse.ServingStatus, None]:
        last = None
        while True:
            changed = self._changed
            status = self._status(service)
            if status != last:
                yield status
                last = status
            if self._ended:
                return
            await changed.wait()

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus:
        serving = self._statuses.get(service)
        if serving is None:
            return SERVICE_UNKNOWN
        return SERVING if serving else NOT_SERVING
