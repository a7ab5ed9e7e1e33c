"""Hooks on plain models where a sublayer joins the residual stream, and an oracle that decodes step by step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from tests.support.methods.case import GEMMA, GPT2, LLAMA

# per family: where decoder layers are; per sublayer: the norm in front of it, and the module whose output is added
LAYERS = {LLAMA: "model.layers", GPT2: "transformer.h", GEMMA: "model.layers"}
_FRONT_AND_END = {
    LLAMA: {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")},
    GPT2: {"attention": ("ln_1", "attn"), "mlp": ("ln_2", "mlp")},
    GEMMA: {
        "attention": ("input_layernorm", "post_attention_layernorm"),
        "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    },
}
AFTER = ("attention", "mlp")

# (h, x_res, ln_x) → what joins the residual stream instead of h, all [rows, tokens, d]
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


def layer_paths(family: str, model: nn.Module) -> list[str]:
    """Paths of the decoder layers."""
    layers = model.get_submodule(LAYERS[family])
    assert isinstance(layers, nn.ModuleList)
    return [f"{LAYERS[family]}.{i}" for i in range(len(layers))]


def change_sublayer(family: str, model: nn.Module, layer: str, after: str, change: Change) -> None:
    """Change what a sublayer of the decoder layer at this path adds to the residual stream."""
    front, end = (model.get_submodule(f"{layer}.{name}") for name in _FRONT_AND_END[family][after])
    seen: dict[str, Tensor] = {}

    def watch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x_res"], seen["ln_x"] = inputs[0], output

    def act(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, tuple):
            return change(output[0], seen["x_res"], seen["ln_x"]), *output[1:]
        return change(output, seen["x_res"], seen["ln_x"])

    front.register_forward_hook(watch)
    end.register_forward_hook(act)


@dataclass(frozen=True)
class StepByStep:
    """An oracle that runs the whole prompt in one call and then every token in a call of its own, as gates need it.

    shift:  what the positions of the text begin at
    """

    model: PreTrainedModel
    shift: int = 0

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        # a cache that keeps everything, whatever a family's layers look at
        cache, found, done = DynamicCache(), [], 0
        for ids in (list(prompt), *([token] for token in tokens[:-1])):
            positions = torch.arange(done, done + len(ids))[None] + self.shift
            with torch.inference_mode():
                made = self.model(
                    input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, position_ids=positions
                )
            found.append(made.logits[0, -1])
            done += len(ids)
        return torch.stack(found).float()
