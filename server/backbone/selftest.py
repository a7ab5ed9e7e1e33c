"""The load-time proof: the model calls our attention once a layer and, cut into paged pieces, computes what it did."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from weft.server.backbone.errors import UnsupportedBackbone
from weft.server.backbone.step import DecodeSpan, PagedKV, PrefillSpan, Step

Forward = Callable[[Tensor, Tensor, Tensor, Step], Tensor]
KVShape = tuple[int, int, int]

# share of the largest logit; on the families of the test suite the difference stays below a tenth of these
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class Census:
    """What attends, by layer: (kv heads, key size, value size), and the path of the module that asks for it."""

    shapes: list[KVShape]
    attentions: tuple[str, ...]


def census(model: PreTrainedModel, forward: Callable[[], Any]) -> Census:
    """Count the attention calls of one forward pass.

    Raises UnsupportedBackbone when a layer attends by other means than transformers' attention interface.
    """
    shapes: dict[int, KVShape] = {}
    modules: dict[int, nn.Module] = {}
    windows: dict[int, int | None] = {}
    family = model.config.model_type

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if options.get("s_aux") is not None:
            raise UnsupportedBackbone(f"{family} uses attention sinks, which are not served")
        if mask is not None:
            raise UnsupportedBackbone(f"{family} makes an attention mask of its own, which paged batches cannot use")
        layer = module.layer_idx
        assert isinstance(layer, int)
        shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
        modules[layer] = module
        windows[layer] = options.get("sliding_window")
        # only shapes matter here, so any values do
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("weft_census", note)
    model.set_attn_implementation("weft_census")
    with torch.inference_mode():
        forward()
    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    if sorted(shapes) != list(range(layers)):
        raise UnsupportedBackbone(
            f"{family} ignores transformers' attention interface: "
            f"expected attention calls from {layers} layers, got {len(shapes)}"
        )
    problem = _hidden_in_the_mask(config, windows) or _shared_by_the_batch(config)
    if problem is not None:
        raise UnsupportedBackbone(f"{family} {problem}")
    names = {module: name for name, module in model.named_modules()}
    return Census([shapes[i] for i in range(layers)], tuple(names[modules[i]] for i in range(layers)))


def _hidden_in_the_mask(config: PreTrainedConfig, windows: Mapping[int, int | None]) -> str | None:
    """What only the mask would have said: the probe is too short to meet a window, and no mask is ever made."""
    if getattr(config, "attention_chunk_size", None):
        return "attends in chunks, which paged batches cannot see"
    if getattr(config, "sliding_window", None) is None:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(windows)
    silent = [i for i, kind in enumerate(kinds) if "sliding" in kind and windows.get(i) is None]
    if not silent:
        return None
    return f"has a sliding window of {config.sliding_window} that layers {silent[:4]} do not tell their attention"


def _shared_by_the_batch(config: PreTrainedConfig) -> str | None:
    """Rope whose frequencies follow the longest sequence of a batch: a neighbour would change a request's answer."""
    found = set(_rope_types(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)))
    shared = sorted(found & {"dynamic", "longrope"})
    return f"uses {shared[0]} rope, whose frequencies depend on the other requests in a batch" if shared else None


def _rope_types(parameters: object) -> Iterator[str]:
    """Every ``rope_type`` in a configuration's rope parameters, which some families keep per kind of layer."""
    if isinstance(parameters, Mapping):
        kind = parameters.get("rope_type", parameters.get("type"))
        if isinstance(kind, str):
            yield kind
        for value in parameters.values():
            yield from _rope_types(value)


def paged_logits(forward: Forward, probe: Tensor, shapes: list[KVShape], dtype: torch.dtype) -> Tensor:
    """Logits of every token of the probe, computed twice: in pieces (two chunks, one token) and whole beside them.

    probe:    [tokens] int64, at least 4
    returns:  [2, tokens, vocabulary] fp32
    """
    tokens, device = probe.numel(), probe.device
    kv = PagedKV(shapes, 1 + 2 * tokens, dtype, device)
    own = torch.arange(1, tokens + 1, device=device)
    copy = own + tokens
    first, last = tokens - 3, tokens - 1

    def run(ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        keep = torch.arange(ids.numel(), device=device)
        return forward(ids, positions, keep, step).float()

    spans = (PrefillSpan(0, first, own[:first]), PrefillSpan(first, first + tokens, copy))
    both = torch.cat([probe[:first], probe]), torch.cat([own[:first], own]) - 1
    a = run(*both, Step(kv, torch.cat([own[:first], copy]), (), spans))
    b = run(
        probe[first:last],
        own[first:last] - 1,
        Step(kv, own[first:last], (), (PrefillSpan(0, 2, own[:last]),)),
    )
    length = torch.tensor([tokens], device=device)
    decode = DecodeSpan(None, own, length, torch.zeros(1, tokens, dtype=torch.bool, device=device))
    c = run(probe[last:], own[last:] - 1, Step(kv, own[last:], (decode,), ()))
    pieces = torch.cat([a[:first], b, c])
    return torch.stack([pieces, a[first:]])


def difference(reference: Tensor, logits: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with ``logits``, or None when they agree with the model's own within the dtype's tolerance."""
    scale = reference.abs().max().item()
    error = (reference - logits).abs().max().item()
    allowed = TOLERANCE[dtype] * scale
    if error <= allowed:
        return None
    return f"logits differ by {error:.3g}, expected at most {allowed:.3g}"
