"""What a PEFT file may bring beside its method: parameters of the backbone, whole, in the place of its own.

``bias="all"`` and ``"<method>_only"`` bring biases, ``modules_to_save`` copies of modules under their plain names, and
``trainable_token_indices`` rows of the input embedding or of the output head (``token_adapter.trainable_tokens_delta``
[n, d], replacements in spite of the name; the ids stand in the config only). Where the backbone ties head and
embedding, rows act on both, and copies do with ``ensure_weight_tying``.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected, some
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.formats.tensors import Roles, missing_tensor, require_shape, require_site
from weft.adapters_store.operators import Bias, Dense, Operator, Rows
from weft.adapters_store.parts import NormOverride, Part, RowOverride
from weft.adapters_store.sites import CatalogueInfo, EmbeddingInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

# of a module that an adapter wraps, of any other, and what PEFT writes again of modules that are saved whole
BASE_BIAS, BIAS = "base_layer.bias", "bias"
AGAIN = ("original_module.bias", "modules_to_save.bias")
WEIGHT = "weight"
TOKENS = "token_adapter.trainable_tokens_delta"
ROLES = (BASE_BIAS, BIAS, *AGAIN, TOKENS)
# the only embeddings that PEFT ties adapters of, by their names
TIED_NAMES = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class Beside:
    """The settings.

    bias:      ``none``, ``all``, or anything else for those of the modules that the method wraps
    saved:     paths of the modules that are saved whole
    named:     what ``modules_to_save`` says
    tokens:    ids whose rows are replaced, by the path of the module whose tensor has them
    tied:      the head that follows the embedding, empty if none does
    """

    bias: str = "none"
    saved: frozenset[str] = frozenset()
    named: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: str = ""

    @property
    def nothing(self) -> bool:
        """Whether the file brings the method only."""
        return self.bias == "none" and not self.saved and not self.tokens


def read_beside(settings: Settings, catalogue: CatalogueInfo, only: str, tying: bool = False) -> Beside:
    """The settings, judged.

    only:   what the method calls its own biases: ``lora_only``
    tying:  ``ensure_weight_tying``
    """
    bias: str = settings.choice("bias", ("none", "all", only), "none")
    saved, named = _saved(settings, catalogue)
    tokens, follows = _tokens(settings, catalogue, tying)
    both = sorted(saved.intersection(tokens))
    if both:
        raise expected("trainable_token_indices", "rows of modules that modules_to_save does not name", some(both))
    head, embedding = tied_head(catalogue, tying), catalogue.embedding
    if embedding is None or not head or not saved.intersection((head, embedding.path)):
        return Beside(bias, saved, named, tokens, follows)
    if embedding.path not in saved:
        raise expected(
            "modules_to_save", f"{embedding.path} as well", some(sorted(saved)), "ensure_weight_tying is true"
        )
    return Beside(bias, saved | {head}, named, tokens, head)


def tied_head(catalogue: CatalogueInfo, tying: bool) -> str:
    """The head whose adapters PEFT ties to those of the input embedding when it is asked to; empty if there is none."""
    embedding = catalogue.embedding
    if not tying or embedding is None or embedding.path.rpartition(".")[2] not in TIED_NAMES:
        return ""
    return embedding.tied_head


def without_saved(beside: Beside, names: Iterable[str]) -> list[str]:
    """The targets that are left: PEFT wraps nothing that is saved whole, nor what is inside of it."""
    # the names are endings of this backbone's paths, so they hold nothing that could backtrack
    inside = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in beside.named]
    left = [path for path in names if not any(pattern.match(path) for pattern in inside)]
    both = [path for path in left if path in beside.saved]
    if both:
        raise expected("modules_to_save", "modules that target_modules does not name", some(both))
    return left


@dataclass
class Brought:
    """What came of it: operators of linears, absolute biases first, and overrides."""

    operators: dict[str, list[Operator]] = field(default_factory=dict)
    norms: dict[str, NormOverride] = field(default_factory=dict)
    rows: list[Part] = field(default_factory=list)

    def norm(self, path: str, weight: Value | None = None, bias: Value | None = None) -> None:
        """A norm's new weight or bias; the other stays as it was said before."""
        said = self.norms.get(path, NormOverride(path))
        self.norms[path] = replace(said, weight=weight or said.weight, bias=bias or said.bias)

    def parts(self, catalogue: CatalogueInfo) -> tuple[Part, ...]:
        """The overrides, in the order of the backbone."""
        return (*sorted(self.norms.values(), key=lambda part: catalogue.norm_index[part.path]), *self.rows)


def gather(found: Mapping[str, Roles], beside: Beside, wrapped: Iterable[str], catalogue: CatalogueInfo) -> Brought:
    """The tensors that the settings promise, as operators and overrides. AdapterInvalid if any is missing or too many.

    wrapped:  the sites that the method itself acts on
    """
    brought = Brought()
    _biases(brought, found, beside, set(wrapped), catalogue)
    for path in sorted(beside.saved):
        _whole(brought, path, found, beside, catalogue)
    for path in sorted({path for path, tensors in found.items() if TOKENS in tensors} | set(beside.tokens)):
        _rows(brought, path, found.get(path, {}), beside, set(wrapped), catalogue)
    return brought


def _saved(settings: Settings, catalogue: CatalogueInfo) -> tuple[frozenset[str], tuple[str, ...]]:
    named = settings.names("modules_to_save")
    if not named:
        return frozenset(), ()
    if isinstance(named, str):
        raise expected("modules_to_save", "a list of names", show(named))
    names = sorted(catalogue.modules.union(catalogue.index))
    # PEFT takes any ending, so that "norm" also means input_layernorm
    missing = [name for name in named if not any(path.endswith(name) for path in names)]
    if missing:
        why = "heads of other tasks are not served"
        raise expected("modules_to_save", "names of this backbone's modules", some(missing), why)
    found = [path for path in names if path.endswith(named)]
    places = {*catalogue.norm_index, *_heads(catalogue)}
    if catalogue.embedding is not None:
        places.add(catalogue.embedding.path)
    strangers = [path for path in found if path not in places]
    if strangers:
        why = "whole copies of other modules are not adapters any more; weft convert diff makes one of them"
        wanted = "the output head, the input embedding and norms"
        raise expected("modules_to_save", wanted, some(strangers), why)
    return frozenset(found), named


def _heads(catalogue: CatalogueInfo) -> list[str]:
    return [site.path for site in catalogue.sites if site.kind == "lm_head"]


def _tokens(settings: Settings, catalogue: CatalogueInfo, tying: bool) -> tuple[dict[str, tuple[int, ...]], str]:
    """Ids by the module whose tensor has them, and the head that follows the embedding."""
    key = "trainable_token_indices"
    said, embedding = settings.integers_by_name(key), catalogue.embedding
    if not said:
        return {}, ""
    if embedding is None:
        raise expected(key, "null", "token ids", "this backbone has no input embedding that can be adapted")
    listed = said if isinstance(said, dict) else {embedding.path: said}
    places = [embedding.path, *_heads(catalogue)]
    tokens: dict[str, tuple[int, ...]] = {}
    for name, ids in listed.items():
        hit = [path for path in sorted(catalogue.modules.union(places)) if path.endswith(name)]
        if len(hit) != 1 or hit[0] not in places:
            raise expected(key, f"{' or '.join(places)}", show(name))
        if not ids or len(set(ids)) != len(ids) or max(ids) >= embedding.rows:
            raise expected(key, f"token ids from 0 to {embedding.rows - 1} that stand once each", show(list(ids)))
        tokens[hit[0]] = ids
    head = embedding.tied_head
    if not head or embedding.path not in tokens:
        return tokens, ""
    if head in tokens and tokens[head] != tokens[embedding.path]:
        if tying:
            raise expected(
                key, f"the same ids for {embedding.path} and {head}", "others", "ensure_weight_tying is true"
            )
        return tokens, ""
    tokens.pop(head, None)
    return tokens, head


def _biases(
    brought: Brought, found: Mapping[str, Roles], beside: Beside, wrapped: set[str], catalogue: CatalogueInfo
) -> None:
    """Biases in the place of the backbone's, of linears and norms."""
    for module, tensors in found.items():
        again = next((tensors[role] for role in AGAIN if role in tensors), None)
        if again is not None and (module not in beside.saved or beside.bias != "all"):
            raise expected(again.name, "no such tensor", "one", "modules_to_save does not name its module")
        for role in (BASE_BIAS, BIAS):
            tensor = tensors.get(role)
            if tensor is None or (role == BIAS and module in beside.saved):
                continue
            if beside.bias == "none":
                raise expected(tensor.name, "no such tensor", "one", "bias is none")
            if (role == BASE_BIAS) != (module in wrapped) or (role == BIAS and beside.bias != "all"):
                raise expected(tensor.name, f"the biases that bias={beside.bias} saves", "another")
            _bias(brought, module, tensor, catalogue)
    if beside.bias == "none":
        return
    linears = [site.path for site in catalogue.sites if site.has_bias]
    norms = [norm.path for norm in catalogue.norms if norm.has_bias] if beside.bias == "all" else []
    due = [path for path in linears if beside.bias == "all" or path in wrapped] + norms
    missing = [p for p in due if p not in brought.operators and p not in brought.norms and p not in beside.saved]
    if missing:
        role = BASE_BIAS if missing[0] in wrapped else BIAS
        raise missing_tensor(missing[0], role, f"bias is {beside.bias}", len(missing) - 1)


def _bias(brought: Brought, module: str, tensor: TensorRef, catalogue: CatalogueInfo) -> None:
    """One bias in the place of the backbone's own."""
    if module in catalogue.norm_index:
        norm = catalogue.norms[catalogue.norm_index[module]]
        has_bias, size, width = norm.has_bias, norm.features, f"{norm.features} features"
    else:
        site = require_site(module, tensor, catalogue)
        has_bias, size, width = site.has_bias, site.out_features, f"{site.out_features} outputs"
    if not has_bias:
        raise expected(tensor.name, "a bias of the backbone to replace", "a module without one")
    require_shape(tensor, (size,), f"{module} has {width}")
    if module in catalogue.norm_index:
        brought.norm(module, bias=tensor)
    else:
        brought.operators.setdefault(module, []).append(Bias(tensor, absolute=True))


def _whole(brought: Brought, path: str, found: Mapping[str, Roles], beside: Beside, catalogue: CatalogueInfo) -> None:
    """One module that is saved whole."""
    tensors, embedding = found.get(path, {}), catalogue.embedding
    weight = tensors.get(WEIGHT)
    if weight is None:
        raise missing_tensor(path, WEIGHT, "modules_to_save names its module")
    if path in catalogue.norm_index:
        norm = catalogue.norms[catalogue.norm_index[path]]
        require_shape(weight, (norm.features,), f"{path} has {norm.features} features")
        brought.norm(path, weight)
    elif embedding is not None and path == embedding.path:
        require_shape(weight, (embedding.rows, embedding.features), "a resized vocabulary is not served")
        brought.rows.append(RowOverride(_every(embedding, weight), weight))
    else:
        site = catalogue.sites[catalogue.index[path]]
        require_shape(weight, (site.out_features, site.in_features), "a resized vocabulary is not served")
        brought.operators.setdefault(path, []).append(Dense(_changed(weight, path), replaces=True))
        if site.has_bias and path == beside.tied:
            raise expected("ensure_weight_tying", "false", "true", "PEFT leaves out the bias of a head that it ties")
    bias = tensors.get(BIAS)
    if bias is not None:
        _bias(brought, path, bias, catalogue)
    elif _has_bias(path, catalogue):
        raise missing_tensor(path, BIAS, "modules_to_save names its module")


def _has_bias(path: str, catalogue: CatalogueInfo) -> bool:
    if path in catalogue.norm_index:
        return catalogue.norms[catalogue.norm_index[path]].has_bias
    return path in catalogue.index and catalogue.sites[catalogue.index[path]].has_bias


def _rows(
    brought: Brought, path: str, tensors: Roles, beside: Beside, wrapped: set[str], catalogue: CatalogueInfo
) -> None:
    """Rows of the embedding, and of the head where it is tied, or of the head alone."""
    embedding, rows = catalogue.embedding, tensors.get(TOKENS)
    if path not in beside.tokens:
        assert rows is not None
        raise expected(rows.name, "no such tensor", "one", "trainable_token_indices does not name its module")
    if rows is None:
        raise missing_tensor(path, TOKENS, "trainable_token_indices names its module")
    assert embedding is not None
    ids = beside.tokens[path]
    require_shape(rows, (len(ids), embedding.features), f"trainable_token_indices lists {len(ids)} tokens")
    head = path if path != embedding.path else beside.tied
    if path == embedding.path:
        brought.rows.append(RowOverride(ids, rows))
    if not head:
        return
    site = catalogue.sites[catalogue.index[head]]
    if site.has_bias or head in wrapped or head in beside.saved:
        why = "PEFT computes the head from these rows alone there"
        raise expected("trainable_token_indices", f"{head} to have no bias and no other change", "some", why)
    index = Computed(rows.name, (len(ids),), _listed(ids), ())
    brought.operators.setdefault(head, []).append(Rows(index, _changed(rows, head, ids), replaces=True))


def _listed(ids: tuple[int, ...]) -> "Callable[..., Tensor]":
    def formula() -> "Tensor":
        import torch

        return torch.tensor(ids)

    return formula


def _every(embedding: EmbeddingInfo, weight: TensorRef) -> Computed:
    def formula() -> "Tensor":
        import torch

        return torch.arange(embedding.rows)

    return Computed(weight.name, (embedding.rows,), formula, ())


def _changed(new: TensorRef, path: str, ids: tuple[int, ...] | None = None) -> Computed:
    """What these rows of a head, or all of them, differ by from the backbone's."""

    def formula(new: "Tensor", old: "Tensor") -> "Tensor":
        return new - (old if ids is None else old[list(ids)])

    return Computed(new.name, new.shape, formula, (new,), (f"{path}.weight",))
