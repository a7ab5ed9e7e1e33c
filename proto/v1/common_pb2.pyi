# mypy: disable-error-code="type-arg"
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_ACTIVE: _ClassVar[AdapterState]
    ADAPTER_STATE_INCOMPATIBLE: _ClassVar[AdapterState]
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_ACTIVE: AdapterState
ADAPTER_STATE_INCOMPATIBLE: AdapterState

class SiteReport(_message.Message):
    __slots__ = ("module", "operators", "rank", "bytes", "folds")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FOLDS_FIELD_NUMBER: _ClassVar[int]
    module: str
    operators: _containers.RepeatedScalarFieldContainer[str]
    rank: int
    bytes: int
    folds: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, module: _Optional[str] = ..., operators: _Optional[_Iterable[str]] = ..., rank: _Optional[int] = ..., bytes: _Optional[int] = ..., folds: _Optional[_Iterable[str]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "method", "dialect", "digest", "disk_bytes", "device_bytes", "site_count", "state", "state_reason", "create_time_ms", "sites", "notes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    DIALECT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SITE_COUNT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_REASON_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    method: str
    dialect: str
    digest: str
    disk_bytes: int
    device_bytes: int
    site_count: int
    state: AdapterState
    state_reason: str
    create_time_ms: int
    sites: _containers.RepeatedCompositeFieldContainer[SiteReport]
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., method: _Optional[str] = ..., dialect: _Optional[str] = ..., digest: _Optional[str] = ..., disk_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., site_count: _Optional[int] = ..., state: _Optional[_Union[AdapterState, str]] = ..., state_reason: _Optional[str] = ..., create_time_ms: _Optional[int] = ..., sites: _Optional[_Iterable[_Union[SiteReport, _Mapping]]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...
