"""Adapter files written by hand for the tiny llama of the tests, valid until a test breaks them. Needs no torch.

The model has two layers, hidden size 32, 16 outputs of k_proj and v_proj, 48 inner features, 101 tokens.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.adapters_store.files import CONFIG, WEIGHTS

HIDDEN, KV, INNER, LAYERS, RANK = 32, 16, 48, 2, 4
P = "base_model.model."
Q0 = f"{P}model.layers.0.self_attn.q_proj"
V1 = f"{P}model.layers.1.self_attn.v_proj"
NUMPY = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Tensor:
    """One tensor as the header says it."""

    shape: tuple[int, ...]
    data: bytes
    dtype: str = "F32"


@dataclass(frozen=True)
class Files:
    """What is sent: a config and tensors, or, where a test wants that, bytes that are neither."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    config_bytes: bytes | None = None
    weights_bytes: bytes | None = None
    notes: tuple[str, ...] = field(default=())

    def encode(self) -> tuple[bytes, bytes]:
        """The two files."""
        config = json.dumps(self.config).encode() if self.config_bytes is None else self.config_bytes
        weights = safetensors(self.tensors) if self.weights_bytes is None else self.weights_bytes
        return config, weights

    def write(self, folder: Path) -> Path:
        """Put both files in a folder and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        config, weights = self.encode()
        (folder / CONFIG).write_bytes(config)
        (folder / WEIGHTS).write_bytes(weights)
        return folder

    def configured(self, **values: Any) -> "Files":
        """With these settings; ``...`` removes one."""
        merged = {**self.config, **values}
        return replace(self, config={k: v for k, v in merged.items() if v is not ...})

    def with_tensor(self, name: str, tensor: Tensor | None) -> "Files":
        """With one more tensor, or without it."""
        merged = {**self.tensors, name: tensor}
        return replace(self, tensors={k: v for k, v in merged.items() if v is not None})

    def renamed(self, name: str, other: str) -> "Files":
        """With one tensor under another name."""
        return self.with_tensor(other, self.tensors[name]).with_tensor(name, None)


def safetensors(tensors: Mapping[str, Tensor], metadata: Any = None) -> bytes:
    """A file in the order given."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    at = 0
    for name, tensor in tensors.items():
        offsets = [at, at := at + len(tensor.data)]
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    return with_header(json.dumps(entries).encode(), b"".join(t.data for t in tensors.values()))


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A file with this header, whatever it says."""
    return struct.pack("<Q", len(header)) + header + data


def noise(shape: tuple[int, ...], seed: int = 0, dtype: str = "F32") -> Tensor:
    """Seeded normal values."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape) * 0.4
    return Tensor(shape, values.astype(NUMPY[dtype]).tobytes(), dtype)


def filled(shape: tuple[int, ...], value: float) -> Tensor:
    """One value everywhere."""
    return Tensor(shape, np.full(shape, value, np.float32).tobytes())


def _sites(modules: Mapping[str, int]) -> dict[str, int]:
    return {f"{P}model.layers.{layer}.{m}": out for layer in range(LAYERS) for m, out in modules.items()}


def lora(rank: int = RANK, seed: int = 0) -> Files:
    """LORA on q_proj and v_proj."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    tensors: dict[str, Tensor] = {}
    for i, (site, out) in enumerate(_sites({"self_attn.q_proj": HIDDEN, "self_attn.v_proj": KV}).items()):
        tensors[f"{site}.lora_A.weight"] = noise((rank, HIDDEN), 2 * i + seed)
        tensors[f"{site}.lora_B.weight"] = noise((out, rank), 2 * i + 1 + seed)
    return Files(config, tensors)


def lokr() -> Files:
    """LOKR on q_proj with a low-rank second factor."""
    config = {"peft_type": "LOKR", "r": 2, "alpha": 3, "target_modules": ["q_proj"]}
    tensors: dict[str, Tensor] = {}
    for site in _sites({"self_attn.q_proj": HIDDEN}):
        parts = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}
        tensors |= {f"{site}.{part}": noise(shape) for part, shape in parts.items()}
    return Files(config, tensors)


def ia3() -> Files:
    """IA3 on the outputs of k_proj and the inputs of down_proj."""
    config = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    tensors = {f"{site}.ia3_l": noise((KV, 1)) for site in _sites({"self_attn.k_proj": KV})}
    tensors |= {f"{site}.ia3_l": noise((1, INNER)) for site in _sites({"mlp.down_proj": HIDDEN})}
    return Files(config, tensors)


def krona(terms: int | None = None) -> Files:
    """X_KRONA on up_proj, in = 4·8, out = 12·4."""
    config = {"peft_type": "X_KRONA", "format_version": 1, "scale": 0.5}
    lead = () if terms is None else (terms,)
    tensors: dict[str, Tensor] = {}
    for site in _sites({"mlp.up_proj": INNER}):
        tensors[f"{site}.krona_A"] = noise((*lead, 4, 12))
        tensors[f"{site}.krona_B"] = noise((*lead, 8, 4))
    return Files(config, tensors)


VALID: Mapping[str, Callable[[], Files]] = {"lora": lora, "lokr": lokr, "ia3": ia3, "krona": krona}
