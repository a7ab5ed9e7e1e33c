"""What adapters can change beyond linears: a model's norms, sublayers' outputs, attention inputs, embedding, experts.

Everything is found by watching one forward pass and proven on its numbers, so any family works, or says honestly that
it has no such place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from weft.adapters_store.sites import EmbeddingInfo, ExpertsInfo, HiddenInfo, LayerInfo, NormInfo
from weft.server.backbone import embedding, experts, norms, sublayers
from weft.server.backbone.experts import ExpertsPlace
from weft.server.backbone.norms import NormPlace
from weft.server.backbone.recording import Call, rows_of
from weft.server.backbone.selftest import Census
from weft.server.backbone.sublayers import Argument, HiddenPlace, Pass


@dataclass(frozen=True)
class Places:
    """The places of one model.

    inputs:  by layer, who is given the attention's input; None where no argument holds it
    """

    norms: tuple[NormPlace, ...]
    hidden: tuple[HiddenPlace, ...]
    layers: tuple[LayerInfo, ...]
    inputs: tuple[Argument | None, ...]
    embedding: EmbeddingInfo | None
    experts: tuple[ExpertsPlace, ...] = ()

    def norm_infos(self, model: nn.Module) -> tuple[NormInfo, ...]:
        """The norms as a catalogue tells of them."""
        modules = [model.get_submodule(norm.path) for norm in self.norms]
        has_bias = [getattr(module, "bias", None) is not None for module in modules]
        return tuple(NormInfo(n.path, n.features, bias) for n, bias in zip(self.norms, has_bias, strict=True))

    def experts_infos(self) -> tuple[ExpertsInfo, ...]:
        """The modules of experts as a catalogue tells of them."""
        return tuple(place.info for place in self.experts)

    def hidden_infos(self) -> tuple[HiddenInfo, ...]:
        """The hidden places as a catalogue tells of them."""
        return tuple(HiddenInfo(place.layer, place.after, place.features, place.taps) for place in self.hidden)


def find(model: PreTrainedModel, calls: Sequence[Call], tokens: int, attends: Census, head: str | None) -> Places:
    """The places of a model whose pass over so many tokens was recorded before its linears were adapted.

    head:  the output head, where that is a site
    """
    found_norms = norms.find(calls, tokens)
    watched = Pass(calls, tokens, frozenset(norm.path for norm in found_norms))
    paths = [layer_of(model, attention) for attention in attends.attentions]
    by_path = {call.path: call for call in calls}
    given = [_input(by_path.get(attention), tokens) for attention in attends.attentions]
    layers = [
        LayerInfo(path, attention, kv_heads, key_size, value_size, 0 if found is None else found[1])
        for path, attention, (kv_heads, key_size, value_size), found in zip(
            paths, attends.attentions, attends.shapes, given, strict=True
        )
    ]
    inputs = tuple(None if found is None else found[0] for found in given)
    hidden = sublayers.find(watched, paths, attends.attentions)
    inside = experts.find(calls, tokens)
    return Places(found_norms, hidden, tuple(layers), inputs, _embedding(model, by_path, head), inside)


def layer_of(model: nn.Module, attention: str) -> str:
    """The decoder layer around an attention: the innermost module that stands in a list of modules, else itself."""
    parts = attention.split(".")
    for stop in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: stop - 1])), nn.ModuleList):
            return ".".join(parts[:stop])
    return attention


def _input(call: Call | None, tokens: int) -> tuple[Argument, int] | None:
    """The first argument of a call that has a row for each token, and its width."""
    if call is None:
        return None
    rows = ((name, rows_of(tensor, tokens)) for name, tensor in call.inputs.items())
    return next(((Argument(call.path, name), x.shape[1]) for name, x in rows if x is not None), None)


def _embedding(model: PreTrainedModel, calls: dict[str, Call], head: str | None) -> EmbeddingInfo | None:
    module = model.get_input_embeddings()
    call = next((call for call in calls.values() if call.module is module), None)
    scale = None if call is None else embedding.scale_of(call)
    if call is None or scale is None:
        return None
    weight = module.weight
    assert isinstance(weight, Tensor)
    tied = head is not None and model.get_submodule(head).weight is weight
    return EmbeddingInfo(call.path, weight.shape[0], weight.shape[1], head if head is not None and tied else "", scale)


def probe_tokens(heads: Sequence[int]) -> int:
    """How many tokens to record: a number that no count of heads can be mistaken for."""
    return next(count for count in (5, 7, 3) if count not in heads)
