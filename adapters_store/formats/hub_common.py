"""What files of AdapterHub's ``adapters`` have in common: settings inside ``config``, tensors by the adapter's name.

Tensors are named as parameters of the model that was saved, with or without the name of its base model in front:
``model.layers.0.mlp.up_proj.loras.<adapter>.lora_A``. The config says which there must be, so each is asked for by
its name and shape, and what nobody asked for is refused.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from weft.adapters_store.errors import AdapterInvalid, expected, quoted
from weft.adapters_store.formats.hub_families import Places
from weft.adapters_store.formats.settings import NUMBER_MAX, Settings, show
from weft.adapters_store.formats.tensors import require_kind, require_shape
from weft.adapters_store.operators import SiteOperators
from weft.adapters_store.parts import Gate, Part
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, LayerInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

DIALECT = "adapterhub"

# names of transformers' functions, and the library's one own: those of ``weft.kernels.activation``
ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "identity",
    "leakyrelu": "leaky_relu",
}

# how files of adapter-transformers 1 call places that later have one name
_LEGACY = ("attention_text_task_adapters", "attention_text_lang_adapters", "layer_text_task_adapters")
# every attention holds the prefixes of all of them, and a bottleneck its first norm under two names
_POOL = re.compile(r"^(.*)\.(?:layers|h)\.\d+\.[^.]+\.prefix_tuning\.pool\.prefix_tunings\.")
_NORM = re.compile(r"\.adapter_norm_before\.(weight|bias)$")

_STRANGERS = {
    "invertible_adapters.": "invertible adapters are not served",
    ".refts.": "ReFT is not served",
    ".prompt_tunings.": "AdapterHub has no prompt tuning for this family",
    "adapter_fusion_layer.": "AdapterFusion is not served",
    "heads.": "prediction heads are not served",
}


class MemberSettings(Settings):
    """Settings inside ``config``; messages name them with where they stand."""

    def __init__(self, values: dict[str, Any], at: str) -> None:
        super().__init__({f"{at}.{key}": value for key, value in values.items()})
        self._at = at

    def truth(self, key: str, default: bool) -> bool:
        """true or false, or what the library takes when the file is silent."""
        found: bool = self.choice(key, (True, False), default)
        return found

    def layers_left_out(self) -> frozenset[int]:
        """``leave_out``: numbers of layers that have nothing of this member."""
        return frozenset(self.integers("leave_out") or ())

    def activation(self, default: str | None = None) -> str:
        """``non_linearity`` as ``weft.kernels.activation`` calls it."""
        said = self.text("non_linearity", required=default is None) or default or ""
        if said.lower() not in ACTIVATIONS:
            raise expected(f"{self._at}.non_linearity", f"one of {', '.join(ACTIVATIONS)}", show(said))
        return ACTIVATIONS[said.lower()]

    def number_or(self, key: str, words: tuple[str, ...]) -> float | str:
        """A number, or one of these words."""
        value = self._take(key, True)
        if isinstance(value, str) and value in words:
            return value
        if isinstance(value, str):
            self._refuse(key, f"a number, or one of {', '.join(words)}", value)
        return self._number(key, value, -NUMBER_MAX)

    def is_number(self, key: str) -> bool:
        """Whether there is a number rather than nothing."""
        value = self._take(key, False)
        return value is not None and self._number(key, value, -NUMBER_MAX) == value

    def number_by_layer(self, key: str, layers: int) -> list[float]:
        """A positive number, or an object of some by number of layer, with one for the others as ``default``."""
        value = self._take(key, True)
        said: dict[str, Any] = value if isinstance(value, dict) else {"default": value}
        for number in said.values():
            if self._number(key, number, 0.0) == 0.0:
                self._refuse(key, "numbers above 0", value)
        missing = [layer for layer in range(layers) if str(layer) not in said and "default" not in said]
        if missing:
            self._refuse(key, f"a number for layer {missing[0]}, or a default", value)
        return [float(said[key if (key := str(layer)) in said else "default"]) for layer in range(layers)]

    def refuse_value(self, key: str, wanted: str, got: object, why: str) -> NoReturn:
        """Refuse what cannot be served in sum."""
        self._refuse(key, wanted, got, why)

    def ignore(self, *keys: str) -> None:
        super().ignore(*(f"{self._at}.{key}" for key in keys))

    def _take(self, key: str, required: bool) -> Any:
        return super()._take(f"{self._at}.{key}", required)

    def _refuse(self, key: str, wanted: str, value: object, why: str = "") -> NoReturn:
        super()._refuse(f"{self._at}.{key}", wanted, value, why)


class Shelf:
    """The tensors of a file, each to be taken once."""

    def __init__(self, header: Header, adapter: str, base: str) -> None:
        self.adapter, self.base = adapter, base
        self._left: dict[str, TensorRef] = {}
        self._taken: set[str] = set()
        whole = any(name.startswith(f"{base}.") for name in header.tensors)
        for name, tensor in header.tensors.items():
            path = self._path(name if whole else f"{base}.{name}")
            if path in self._left:
                why = f"it is another name of {quoted(self._left[path].name)}, which modules share"
                raise expected(name, "a shared tensor to be stored once", "a second copy", why)
            self._left[path] = tensor

    def take(self, module: str, kind: str, role: str, shape: tuple[int, ...], why: str = "") -> TensorRef:
        """The tensor ``role`` of this adapter at a module, in the library's dictionary of that kind."""
        path = f"{module}.{kind}.{self.adapter}.{role}"
        tensor = self._left.pop(path, None)
        if tensor is None and path in self._taken:
            raise expected(path, "one member of a union to have it", "two", "the library has one of a kind at a place")
        if tensor is None:
            raise expected(path, "this tensor", "none", why or "the config asks for it")
        self._taken.add(path)
        require_kind(tensor)
        require_shape(tensor, shape, why)
        return tensor

    def gate(self, module: str, kind: str, outputs: int, width: int, role: str = "gate.") -> Gate:
        """A gate with as many outputs, on inputs of this width."""
        weight = self.take(module, kind, f"{role}weight", (outputs, width), "use_gating is true")
        return Gate(weight, self.take(module, kind, f"{role}bias", (outputs,), "use_gating is true"))

    def finish(self) -> None:
        """Refuse what is left."""
        for path, tensor in self._left.items():
            raise self._stranger(path, tensor.name)

    def _path(self, name: str) -> str:
        for old in _LEGACY:
            name = name.replace(old, "adapters")
        name = _POOL.sub(rf"{self.base}.prefix_tuning.prefix_tunings.", name)
        return _NORM.sub(r".adapter_down.0.\1", name)

    def _stranger(self, path: str, name: str) -> AdapterInvalid:
        why = next((why for part, why in _STRANGERS.items() if part in path), "")
        wanted = "only tensors that the config speaks of"
        got = "one more" if f".{self.adapter}." in path else f"one of no adapter called {quoted(self.adapter)}"
        return expected(name, wanted, got, why)


@dataclass(frozen=True)
class Context:
    """What a member's reader works with."""

    shelf: Shelf
    places: Places
    catalogue: CatalogueInfo

    def layers(self, left_out: Iterable[int] = ()) -> list[tuple[int, LayerInfo]]:
        """Decoder layers and their numbers, without those left out."""
        without = set(left_out)
        return [(i, layer) for i, layer in enumerate(self.catalogue.layers) if i not in without]


@dataclass(frozen=True)
class Member:
    """What one config made: a whole adapter, or a member of a union."""

    method: str
    sites: Mapping[str, SiteOperators] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()


def times(value: Value, factor: float) -> Value:
    """The tensor times a number; itself where that is 1."""
    if factor == 1.0:
        return value

    def formula(t: "Tensor") -> "Tensor":
        return t * factor

    return Computed(value.name, value.shape, formula, (value,))


def piece_of(value: TensorRef, start: int, stop: int) -> TensorRef:
    """Rows [start, stop) of a tensor, so that no more than these is read."""
    size = (value.stop - value.start) // value.shape[0]
    name = f"{value.name}[{start}:{stop}]"
    shape = (stop - start, *value.shape[1:])
    return TensorRef(name, shape, value.dtype, value.start + start * size, value.start + stop * size)
