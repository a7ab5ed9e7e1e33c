"""Find a model's sites by watching one forward pass: which linears run, in which order, and which share an input."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weft.adapters_store.sites import CatalogueInfo, SideInfo, SiteInfo
from weft.server.backbone.linears import AdaptedLinear, LinearGroup
from weft.server.backbone.places import Places


@dataclass(frozen=True, slots=True)
class Found:
    """Paths of the linears in the order of their calls, in runs that share an input; the output head is last."""

    runs: tuple[tuple[str, ...], ...]
    head: str | None


def watch(model: PreTrainedModel, forward: Callable[[], Any], tokens: int) -> Found:
    """Run ``forward``, which keeps the logits of one row of several, and note every plain linear that it calls.

    Linears that it does not reach, or that see the kept row only, are no sites: an adapter there would do nothing,
    or be given rows that are not the batch's.
    """
    head = model.get_output_embeddings()
    names = {m: n for n, m in model.named_modules() if _is_plain_linear(m) and m is not head}
    calls: list[tuple[str, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == tokens * inputs[0].shape[-1]:
            calls.append((names[module], inputs[0]))

    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    head_name = next((n for n, m in model.named_modules() if m is head and _is_plain_linear(m)), None)
    return Found(tuple(_runs(calls)), head_name)


def _runs(calls: list[tuple[str, Tensor]]) -> list[tuple[str, ...]]:
    """Neighbouring calls of sibling modules on the very same tensor are one run; repeated calls count once."""
    runs: list[list[str]] = []
    seen: set[str] = set()
    last: Tensor | None = None
    for name, x in calls:
        if name in seen:
            last = None
            continue
        seen.add(name)
        siblings = bool(runs) and runs[-1][-1].rpartition(".")[0] == name.rpartition(".")[0]
        if x is last and siblings:
            runs[-1].append(name)
        else:
            runs.append([name])
        last = x
    return [tuple(run) for run in runs]


def _is_plain_linear(module: nn.Module) -> bool:
    """Linears that override forward do more than a product; adapters cannot be proven right on them."""
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def adapt(model: PreTrainedModel, found: Found, fuse: bool) -> tuple[LinearGroup, ...]:
    """Put an ``AdaptedLinear`` in the place of every site; without ``fuse`` every site is a group of its own."""
    runs = [*found.runs, *([(found.head,)] if found.head else [])]
    if not fuse:
        runs = [(name,) for run in runs for name in run]
    groups: list[LinearGroup] = []
    site = 0
    for run in runs:
        members = []
        for name in run:
            module = model.get_submodule(name)
            linear = module if isinstance(module, AdaptedLinear) else AdaptedLinear(module, site)
            linear.site = site
            linear.slice = slice(0, linear.out_features)
            members.append(linear)
            site += 1
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
        groups.append(LinearGroup(len(groups), members, head=run == (found.head,)))
    return tuple(groups)


def catalogue(
    model: PreTrainedModel,
    groups: tuple[LinearGroup, ...],
    head: str | None,
    digest: str,
    places: Places,
    sides: tuple[SideInfo, ...] = (),
) -> CatalogueInfo:
    """Describe the sites and other places for those who have no weights."""
    names = {module: name for name, module in model.named_modules()}
    sites = tuple(
        SiteInfo(
            path=names[member],
            in_features=member.in_features,
            out_features=member.out_features,
            has_bias=member.bias is not None,
            kind="lm_head" if names[member] == head else "conv1d" if member.transposed else "linear",
        )
        for group in groups
        for member in group.members
    )
    paths = {site.path for site in sites}
    return CatalogueInfo(
        digest=digest,
        dtype=str(model.dtype).removeprefix("torch."),
        sites=sites,
        groups=tuple(len(group.members) for group in groups),
        modules=frozenset(name for name, _ in model.named_modules() if name),
        family=model.config.model_type,
        norms=places.norm_infos(model),
        hidden=places.hidden_infos(),
        layers=places.layers,
        embedding=places.embedding,
        declared=tuple(name for name, _ in model.named_modules() if name in paths),
        sides=sides,
        experts=places.experts_infos(),
    )


def digest(model: PreTrainedModel) -> str:
    """sha256 over the names, shapes, dtypes and bytes of all parameters and the configuration's family."""
    found = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        found.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return found.hexdigest()
