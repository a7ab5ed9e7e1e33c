"""Which linears an AdapterHub ``LoRAConfig`` means: its flags, matrices of the attention, layers left out."""

from collections.abc import Iterator
from dataclasses import dataclass

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.hub_common import Context, MemberSettings
from weft.adapters_store.sites import SiteInfo

KIND = "loras"
MATRICES = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class Which:
    """What the config says.

    matrices:  numbers of queries, keys and values that it adapts, in their order
    """

    matrices: tuple[int, ...]
    intermediate: bool
    output: bool
    left_out: frozenset[int]


@dataclass(frozen=True, slots=True)
class Place:
    """A linear; ``parts`` are the thirds of it that are adapted, where it is queries, keys and values in one."""

    site: SiteInfo
    parts: tuple[int, ...] = ()


def read_places(settings: MemberSettings) -> Which:
    """The settings that say where."""
    named = settings.names("attn_matrices")
    listed = named if isinstance(named, tuple) else ("q", "v") if named is None else tuple(named)
    strangers = sorted(set(listed) - set(MATRICES))
    if strangers:
        why = "AdapterHub wraps no other module of the attention in the families that weft serves"
        raise expected("config.attn_matrices", f"some of {', '.join(MATRICES)}", some(strangers), why)
    attention = settings.truth("selfattn_lora", True)
    matrices = tuple(i for i, name in enumerate(MATRICES) if attention and name in listed)
    which = Which(
        matrices,
        settings.truth("intermediate_lora", False),
        settings.truth("output_lora", False),
        settings.layers_left_out(),
    )
    if not (which.matrices or which.intermediate or which.output):
        raise expected("config", "a linear to adapt", "none", "selfattn_lora, intermediate_lora and output_lora")
    return which


def places(context: Context, which: Which) -> Iterator[Place]:
    """The linears, layer by layer."""
    names = context.places
    for _, layer in context.layers(which.left_out):
        if names.fused and which.matrices:
            yield Place(_site(context, f"{layer.attention}.{names.fused}"), which.matrices)
        elif which.matrices:
            for matrix in which.matrices:
                yield Place(_site(context, f"{layer.attention}.{names.attention[matrix]}"))
        if which.intermediate:
            yield Place(_site(context, f"{layer.path}.{names.intermediate}"))
        if which.output:
            yield Place(_site(context, f"{layer.path}.{names.output}"))


def _site(context: Context, path: str) -> SiteInfo:
    index = context.catalogue.index.get(path)
    if index is None:
        raise expected("config", f"a backbone with the linear {path}", "one without", "its family should have it")
    return context.catalogue.sites[index]
