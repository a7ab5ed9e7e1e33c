"""Sorts the tensors of a file by module and role, and judges their shapes; whatever has no role is refused by name."""

from collections.abc import Iterable, Mapping

from weft.adapters_store.errors import AdapterInvalid, expected, quoted
from weft.adapters_store.formats.targets import names_of_backbone
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import INTEGERS, TensorRef

PREFIX = "base_model.model."

# what a name may end in when it belongs to something that weft does not serve
FOREIGN = {
    ".lora_magnitude_vector": "it is DoRA's",
    ".lora_embedding_A": "it is that of a LoRA of the input embedding",
    ".lora_embedding_B": "it is that of a LoRA of the input embedding",
    ".trainable_tokens_delta": "it is that of trainable tokens beside a LoRA",
    ".lora_diag": "it is KaSA's",
    ".lora_E": "it is AdaLoRA's",
    ".lokr_t2": "LoKr of convolutions is not served",
}

# ends that any name may have
GENERIC = {"weight", "bias"}

Roles = dict[str, TensorRef]


def by_module(
    header: Header, roles: Iterable[str], catalogue: CatalogueInfo, integers: Iterable[str] = ()
) -> dict[str, Roles]:
    """Tensors by module path, then by role. A role is the end of a name, ``lora_A.weight``; the longest one wins.

    integers:  the roles whose tensors are integers; all others are floats
    """
    ordered, whole = sorted(roles, key=len, reverse=True), set(integers)
    found: dict[str, Roles] = {}
    for name, tensor in header.tensors.items():
        path = name.removeprefix(PREFIX)
        role = next((role for role in ordered if path.endswith(f".{role}")), None)
        if path == name or role is None:
            raise _foreign(name, ordered)
        module = path.removesuffix(f".{role}")
        if module not in catalogue.modules and module not in catalogue.index:
            if role in GENERIC:
                raise _foreign(name, ordered)
            wanted = f"a module of this backbone, whose linear modules are {names_of_backbone(catalogue)}"
            raise expected(name, wanted, quoted(module))
        require_kind(tensor, role in whole)
        found.setdefault(module, {})[role] = tensor
    return found


def require_kind(tensor: TensorRef, integer: bool = False) -> None:
    """The tensor holds floats, or integers where those are asked for."""
    if (tensor.dtype in INTEGERS) != integer:
        wanted = "dtype I32 or I64" if integer else "dtype F32 or F16 or BF16"
        raise expected(tensor.name, wanted, tensor.dtype)


def require_site(module: str, tensor: TensorRef, catalogue: CatalogueInfo) -> SiteInfo:
    """The site at this path. AdapterInvalid if the module is none."""
    if module not in catalogue.index:
        raise expected(tensor.name, "a linear module", f"{quoted(module)}, which weft does not adapt")
    return catalogue.sites[catalogue.index[module]]


def require_exactly(
    found: Mapping[str, Roles],
    targets: Iterable[str],
    roles: Iterable[str],
    why: str = "target_modules names its module",
) -> None:
    """Every target has the roles asked for, and no other module has any of them."""
    wanted, asked = tuple(roles), set(targets)
    missing = [(module, role) for module in sorted(asked) for role in wanted if role not in found.get(module, {})]
    if missing:
        raise missing_tensor(*missing[0], why, len(missing) - 1)
    for module, tensors in found.items():
        stray = next((tensors[role] for role in wanted if role in tensors), None)
        if module not in asked and stray is not None:
            raise expected(stray.name, "tensors of the modules that the config targets", "one of another module")


def missing_tensor(module: str, role: str, why: str, more: int = 0) -> AdapterInvalid:
    """The refusal of a file that lacks a tensor."""
    also = f", and {more} more are missing" if more else ""
    return expected(f"{PREFIX}{module}.{role}", "this tensor", "none", f"{why}{also}")


def require_shape(tensor: TensorRef, shape: tuple[int, ...], why: str) -> None:
    """The tensor has exactly this shape."""
    if tensor.shape != shape:
        raise expected(tensor.name, f"shape {list(shape)}", list(tensor.shape), why)


def _foreign(name: str, roles: list[str]) -> AdapterInvalid:
    for ending, why in FOREIGN.items():
        if name.endswith(ending):
            return expected(name, "no such tensor", "one", why)
    if not name.startswith(PREFIX):
        return expected(name, f"a name that begins with {PREFIX}", "another")
    return expected(name, f"a name that ends in {', '.join(sorted(roles))}", "another")
