"""``grpc.reflection.v1alpha.ServerReflection``: the standard servicer behind our edge."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from weft.server.doors.edge import Call

SERVICE = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]


class Reflection:
    """Tells tools which services there are and what their messages look like."""

    def __init__(self, services: Sequence[str]) -> None:
        self._servicer = aio.ReflectionServicer(services)

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[ServerReflectionRequest], call: Call
    ) -> AsyncGenerator[ServerReflectionResponse, None]:
        """Answer one question after the other."""
        async for response in self._servicer.ServerReflectionInfo(requests, None):
            yield response
