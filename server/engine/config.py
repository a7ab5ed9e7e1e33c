"""What the engine process is told at its start. Derived values live with whoever derives them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The operator's choices that reach the engine; sizes in bytes or tokens as named."""

    model: str
    store: str
    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"
    adapter_memory_bytes_max: int = 1 << 30
    working_set_bytes_max: int = 2 << 30
    kv_bytes_max: int = 1 << 30
    batch_tokens_max: int = 2048
    batch_requests_max: int = 256
    page_tokens: int = 16
    log_level: str = "info"
