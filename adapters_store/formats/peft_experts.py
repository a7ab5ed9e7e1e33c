"""PEFT ``LORA`` inside experts, ``target_parameters``: parameters that hold one weight [out, in] for each of E experts.

Tensors at the path of their module: ``lora_A.weight`` [E·r, in], expert after expert, and ``lora_B.weight`` [out, r·E],
whose columns are the experts' in turn: ΔW[e] = s · B[:, :, e] A[e], however the parameter itself lies. PEFT wraps one
parameter after the other in the order of the module: the last has these names, those before it ``base_layer.`` in front
of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.targets import suffixes
from weft.adapters_store.formats.tensors import Roles, require_exactly, require_shape
from weft.adapters_store.parts import ExpertPair
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.tensor_refs import Computed

if TYPE_CHECKING:
    from torch import Tensor

KEY = "target_parameters"
A, B = "lora_A.weight", "lora_B.weight"
INNER_A, INNER_B = f"base_layer.{A}", f"base_layer.{B}"
WHY = f"{KEY} names parameters of its module"


def target_parameters(settings: Settings, catalogue: CatalogueInfo) -> tuple[str, ...]:
    """Full names of the parameters that are targeted, in the order of the backbone; none where none are asked for."""
    named = settings.names(KEY)
    if not named:
        return ()
    if isinstance(named, str):
        raise expected(KEY, "a list of names", show(named))
    known = [f"{experts.path}.{name}" for experts in catalogue.experts for name, _ in experts.parameters]
    if not known:
        why = f"{catalogue.family or 'this backbone'} has no experts that weft adapts"
        raise expected(KEY, "null", show(list(named)), why)
    ends = {name: set(suffixes(name)) for name in known}
    missing = sorted(set(named).difference(*ends.values()))
    if missing:
        raise expected(KEY, f"parameters of experts, like {known[0]}", some(missing), "no others are served")
    return tuple(name for name in known if ends[name].intersection(named))


def require_alone(parameters: Sequence[str], said: Mapping[str, object]) -> None:
    """No setting is set that PEFT has no meaning for beside ``target_parameters``."""
    for key, value in said.items() if parameters else ():
        if value:
            raise expected(key, "null, false or 0", show(value), f"PEFT has none together with {KEY}")


def parts(
    found: Mapping[str, Roles],
    parameters: Sequence[str],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    catalogue: CatalogueInfo,
) -> Iterator[ExpertPair]:
    """The pairs of all targeted parameters. AdapterInvalid if a tensor is missing, too many, or of another shape."""
    targeted: dict[str, list[str]] = {}
    for parameter in parameters:
        targeted.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    inner = [path for path, names in targeted.items() if len(names) > 1]
    require_exactly({path: found.get(path, {}) for path in targeted}, targeted, (A, B), WHY)
    require_exactly(found, inner, (INNER_A, INNER_B), WHY)
    for path, names in targeted.items():
        tensors = found[path]
        for name in names:
            a, b = (A, B) if name == names[-1] else (INNER_A, INNER_B)
            yield _pair(tensors, (a, b), name, ranks[name], scales[name], catalogue)


def _pair(
    tensors: Roles, roles: tuple[str, str], name: str, rank: int, scale: float, catalogue: CatalogueInfo
) -> ExpertPair:
    path, _, parameter = name.rpartition(".")
    module = catalogue.experts[catalogue.experts_index[path]]
    (tall, wide), count = dict(module.parameters)[parameter], module.experts
    a, b = (tensors[role] for role in roles)
    why = f"r is {rank} here, {name} has {count} experts of {wide} -> {tall}"
    require_shape(a, (count * rank, wide), why)
    require_shape(b, (tall, rank * count), why)

    def by_expert(a: "Tensor") -> "Tensor":
        return a.reshape(count, rank, wide)

    def in_turn(b: "Tensor") -> "Tensor":
        return b.reshape(tall, rank, count).permute(2, 0, 1)

    first = Computed(a.name, (count, rank, wide), by_expert, (a,))
    second = Computed(b.name, (count, tall, rank), in_turn, (b,))
    return ExpertPair(path, parameter, first, second, scale)
