# mypy: disable-error-code="type-arg"
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "backbone", "limits", "runtime", "memory", "methods")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    version: str
    backbone: Backbone
    limits: Limits
    runtime: Runtime
    memory: Memory
    methods: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., backbone: _Optional[_Union[Backbone, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., runtime: _Optional[_Union[Runtime, _Mapping]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., methods: _Optional[_Iterable[str]] = ...) -> None: ...

class Backbone(_message.Message):
    __slots__ = ("name", "digest", "family", "parameters", "dtype", "vocabulary", "context_tokens", "site_count", "has_tokenizer", "has_chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SITE_COUNT_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    family: str
    parameters: int
    dtype: str
    vocabulary: int
    context_tokens: int
    site_count: int
    has_tokenizer: bool
    has_chat_template: bool
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., family: _Optional[str] = ..., parameters: _Optional[int] = ..., dtype: _Optional[str] = ..., vocabulary: _Optional[int] = ..., context_tokens: _Optional[int] = ..., site_count: _Optional[int] = ..., has_tokenizer: bool = ..., has_chat_template: bool = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("upload_bytes_max", "uploads_max", "queue_requests_max", "queue_tokens_max", "batch_tokens_max", "request_duration_ms_max", "adapter_memory_bytes_max", "kv_bytes_max")
    UPLOAD_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_MAX_FIELD_NUMBER: _ClassVar[int]
    QUEUE_REQUESTS_MAX_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DURATION_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_MEMORY_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    upload_bytes_max: int
    uploads_max: int
    queue_requests_max: int
    queue_tokens_max: int
    batch_tokens_max: int
    request_duration_ms_max: int
    adapter_memory_bytes_max: int
    kv_bytes_max: int
    def __init__(self, upload_bytes_max: _Optional[int] = ..., uploads_max: _Optional[int] = ..., queue_requests_max: _Optional[int] = ..., queue_tokens_max: _Optional[int] = ..., batch_tokens_max: _Optional[int] = ..., request_duration_ms_max: _Optional[int] = ..., adapter_memory_bytes_max: _Optional[int] = ..., kv_bytes_max: _Optional[int] = ...) -> None: ...

class Runtime(_message.Message):
    __slots__ = ("device", "kernels", "versions", "notes")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    device: str
    kernels: str
    versions: _containers.ScalarMap[str, str]
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, device: _Optional[str] = ..., kernels: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("backbone_bytes", "adapters_bytes", "adapters_resident", "kv_bytes", "working_set_bytes", "composed_bytes", "shared_bytes")
    BACKBONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKING_SET_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPOSED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    backbone_bytes: int
    adapters_bytes: int
    adapters_resident: int
    kv_bytes: int
    working_set_bytes: int
    composed_bytes: int
    shared_bytes: int
    def __init__(self, backbone_bytes: _Optional[int] = ..., adapters_bytes: _Optional[int] = ..., adapters_resident: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., working_set_bytes: _Optional[int] = ..., composed_bytes: _Optional[int] = ..., shared_bytes: _Optional[int] = ...) -> None: ...
