"""``weft convert pickle``: a folder whose tensors lie in a pickle, as the same folder with safetensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from weft.adapters_store.errors import quoted
from weft.adapters_store.files import CONFIG, WEIGHTS, WEIGHTS_ELSEWHERE
from weft.server.convert.folders import check_written, new_folder, read_config
from weft.server.convert.pickles import read_state_dict
from weft.server.convert.problems import expected

# what PEFT and AdapterHub call the same tensors as a pickle and as safetensors
HUB_PICKLE = "pytorch_adapter.bin"
PICKLES = {"adapter_model.bin": WEIGHTS, HUB_PICKLE: WEIGHTS_ELSEWHERE}
HEAD = "pytorch_model_head.bin"
# what weft reads: see ``safetensors_header``
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Converted:
    """What became of a file: where it lies, what it holds, and what the reader should know."""

    out: str
    read_from: str
    tensors: int
    bytes: int
    notes: tuple[str, ...]


def convert_pickle(source: Path, out: Path) -> Converted:
    """Write ``out`` with the config as it is and the tensors as they are. CannotConvert says what stands against it."""
    raw, _ = read_config(source)
    name = _the_pickle(source)
    found = read_state_dict(source / name)
    kept = once(found) if name == HUB_PICKLE else found
    tensors, notes = writable(kept, name)
    if len(kept) < len(found):
        notes.append(f"{len(found) - len(kept)} further names of tensors that modules share are left out")
    if (source / HEAD).exists():
        notes.append(f"{HEAD} is left out: prediction heads are not served")
    with new_folder(out) as folder:
        (folder / CONFIG).write_bytes(raw)
        save_tensors(tensors, folder / PICKLES[name])
    return Converted(str(out), name, len(tensors), (out / PICKLES[name]).stat().st_size, tuple(notes))


def once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of several names of one and the same tensor, the shortest.

    AdapterHub saves prefixes once for every attention that holds them, and a bottleneck's first norm twice.
    """
    kept: dict[tuple[object, ...], str] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        tensor = tensors[name]
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # tensors without values lie nowhere
        kept.setdefault(place if tensor.numel() else (name,), name)
    names = set(kept.values())
    return {name: tensor for name, tensor in tensors.items() if name in names}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of weights and read all of it back."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    check_written(path, tensors)


def writable(tensors: Mapping[str, Tensor], subject: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors that own their memory, in dtypes that weft reads, and notes of what had to change for that."""
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    shared = len(places) - len(set(places))
    wide = [name for name, tensor in tensors.items() if tensor.dtype == torch.float64]
    for name, tensor in tensors.items():
        if tensor.dtype not in (*DTYPES, torch.float64):
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise expected(subject, f"dtypes {names} or float64", f"{tensor.dtype} at {quoted(name)}")
    notes = [f"{len(wide)} tensors of float64 are rounded to float32: {quoted(wide[0])}"] if wide else []
    if shared:
        notes.append(f"{shared} tensors that shared memory with others have their own now")
    # a copy of each, for safetensors knows no sharing and no strides
    return {
        name: _rounded(tensor).clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }, notes


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _the_pickle(folder: Path) -> str:
    found = [name for name in PICKLES if (folder / name).is_file()]
    ready = [name for name in PICKLES.values() if (folder / name).exists()]
    if ready:
        raise expected(str(folder), f"a folder without {ready[0]}", "one that has it", "it needs no conversion")
    if len(found) != 1:
        got = "none" if not found else " and ".join(found)
        raise expected(str(folder), f"a folder with {' or '.join(PICKLES)}", f"one with {got}")
    return found[0]
