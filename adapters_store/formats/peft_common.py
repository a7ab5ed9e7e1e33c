"""What every PEFT config says beside its method, and the parts of a PEFT file that several methods share."""

from collections.abc import Iterable, Mapping

from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.tensors import Roles
from weft.adapters_store.tensor_refs import TensorRef

DIALECT = "peft"
TASK_TYPE = "CAUSAL_LM"
COPY_ROLES = ("base_layer.weight", "weight")


def read_common(settings: Settings) -> None:
    """Keys that PEFT writes for every method. None of them is ever opened, imported or looked up."""
    settings.choice("task_type", (TASK_TYPE,), TASK_TYPE, "the backbone is a causal language model")
    for opaque in ("base_model_name_or_path", "revision", "peft_version"):
        settings.text(opaque)
    settings.flag("inference_mode")
    # written when no task type is set: the class the adapter was trained on
    settings.ignore("auto_mapping")
    settings.refuse("modules_to_save", "full copies of modules are not served")


def copies(found: Mapping[str, Roles]) -> tuple[tuple[TensorRef, str], ...]:
    """Weights of the backbone that PEFT saves along: each with the parameter that it must equal."""
    return tuple(
        (tensors[role], f"{module}.weight")
        for module, tensors in found.items()
        for role in COPY_ROLES
        if role in tensors
    )


def fan_in_fan_out_notes(settings: Settings, kinds: Iterable[str]) -> tuple[str, ...]:
    """``fan_in_fan_out`` says how the backbone stores its weights; PEFT itself corrects it where it is wrong."""
    said, transposed = settings.flag("fan_in_fan_out"), "conv1d" in set(kinds)
    if said == transposed:
        return ()
    return (f"fan_in_fan_out={show(said)} does not describe this backbone and has no effect, as in PEFT",)
