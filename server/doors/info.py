"""``ServerService``: what this server is."""

from weft.adapters_store.formats import PARSERS
from weft.proto.v1.server_pb2 import (
    Backbone,
    GetServerInfoRequest,
    GetServerInfoResponse,
    Limits,
    Memory,
    Runtime,
)
from weft.server.config import ServerConfig
from weft.server.doors.edge import Call
from weft.server.engine.messages import EngineInfo
from weft.server.relay import Relay
from weft.server.text import Tokenizer
from weft.server.version import VERSION


class ServerService:
    """Describes the server, from its config and from what its engine says."""

    def __init__(self, config: ServerConfig, relay: Relay, tokenizer: Tokenizer | None) -> None:
        self._config = config
        self._relay = relay
        self._tokenizer = tokenizer

    async def GetServerInfo(self, request: GetServerInfoRequest, call: Call) -> GetServerInfoResponse:
        """Return the backbone, the limits, the versions and what computes."""
        info = self._relay.engine()
        return GetServerInfoResponse(
            version=VERSION,
            backbone=self._backbone(info),
            limits=self._limits(info),
            runtime=Runtime(device=info.device, kernels=info.kernels, versions=info.versions, notes=info.notes),
            memory=self._memory(),
            methods=sorted(PARSERS),
        )

    def _backbone(self, info: EngineInfo) -> Backbone:
        tokenizer = self._tokenizer
        return Backbone(
            name=self._config.model,
            digest=info.catalogue.digest,
            family=info.family,
            parameters=info.parameters,
            dtype=info.dtype,
            vocabulary=info.vocabulary,
            context_tokens=info.context_tokens,
            site_count=len(info.catalogue.sites),
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.template is not None,
        )

    def _limits(self, info: EngineInfo) -> Limits:
        config = self._config
        return Limits(
            upload_bytes_max=config.adapter_bytes_max,
            uploads_max=config.uploads_max,
            queue_requests_max=config.queue_requests_max,
            queue_tokens_max=config.queue_tokens_max,
            batch_tokens_max=config.batch_tokens_max,
            request_duration_ms_max=int(config.request_duration_s_max * 1000),
            adapter_memory_bytes_max=info.adapter_bytes_max,
            kv_bytes_max=info.kv_bytes_max,
        )

    def _memory(self) -> Memory:
        stats = self._relay.stats
        if stats is None:
            return Memory()
        return Memory(
            backbone_bytes=stats.backbone_bytes,
            adapters_bytes=stats.adapters_bytes,
            adapters_resident=stats.adapters_resident,
            composed_bytes=stats.composed_bytes,
            shared_bytes=stats.shared_bytes,
            kv_bytes=stats.kv_bytes,
            working_set_bytes=stats.working_set_bytes,
        )
