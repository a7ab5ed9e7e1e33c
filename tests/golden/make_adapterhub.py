"""Makes golden adapters and answers with AdapterHub's ``adapters`` 1.3.0, which needs an older transformers than ours.

Run from the root of the repository, in an environment of its own; every run writes the same bytes:

    python3 -m venv hub
    hub/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6 safetensors
    hub/bin/python tests/golden/make_adapterhub.py

Per family it writes ``tests/golden/adapterhub/<family>/``: ``backbone.safetensors``, a folder per adapter as the
library saves it, and ``answers.safetensors`` with ``<adapter>.prompt`` [p], ``.tokens`` [n] and ``.logits``
[n, vocabulary]: the greedy continuation of one unpadded request and the logits before each of its tokens.

Where the library does not do what it says, it is helped, and nowhere else:

- Attention runs as ``eager``. With ``sdpa`` it masks prefixes away, or shifts the causal mask by their length.
- Its decoder layers name the cache as transformers did before 4.56, so Llama's and Mistral's never see one. They are
  handed it under the old name: gated adapters need one call per token, for a gate is a mean over the tokens of a call.
- It cannot save tensors that it shares between modules (prefixes, norms in front of bottlenecks) as safetensors. They
  are taken from its pickle, each stored once, under the shortest of its names.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

hub: Any = importlib.import_module("adapters")

OUT = Path(__file__).parent / "adapterhub"
NAME = "task"
VOCABULARY, NEW_TOKENS = 101, 10
PROMPT = (5, 71, 38, 9, 64, 22, 90, 17, 45)
# how far whole passes and passes with a cache may differ
CACHE_TOLERANCE = 1e-4

# as tests/support/backbones.py has them
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "attn_implementation": "eager",
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
BACKBONES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, num_hidden_layers=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, num_hidden_layers=2, sliding_window=None)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, num_hidden_layers=2, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**COMMON, num_hidden_layers=3, head_dim=16, sliding_window=8, layer_types=LAYERS)
    ),
}


@dataclass(frozen=True)
class Kind:
    """One adapter: its config, the families it is made for, and the version its file claims to be of."""

    config: Callable[[], Any]
    families: tuple[str, ...]
    version: str | None = None


HOOKED = ("llama", "gpt2", "qwen3")
PATCHED = ("llama", "gpt2")
LINEAR = ("llama", "gpt2", "qwen3", "gemma3")


def _prefix(**settings: Any) -> Any:
    return hub.PrefixTuningConfig(**{"prefix_length": 5, "bottleneck_size": 12, **settings})


BOTTLENECKS: dict[str, Kind] = {
    "houlsby": Kind(lambda: hub.DoubleSeqBnConfig(reduction_factor=8), ("mistral", *HOOKED)),
    "houlsby_gated": Kind(lambda: hub.DoubleSeqBnConfig(reduction_factor=8, use_gating=True), PATCHED),
    "houlsby_some_layers": Kind(
        lambda: hub.DoubleSeqBnConfig(reduction_factor=7, leave_out=[0], non_linearity="leakyrelu"), PATCHED
    ),
    "pfeiffer": Kind(lambda: hub.SeqBnConfig(reduction_factor={"1": 4, "default": 10.5}), HOOKED),
    "pfeiffer_norm": Kind(lambda: hub.SeqBnConfig(reduction_factor=8, ln_before=True), HOOKED),
    "pfeiffer_wide": Kind(
        lambda: hub.SeqBnConfig(reduction_factor=0.5, mh_adapter=True, non_linearity="gelu_new"), ("llama",)
    ),
    "parallel": Kind(lambda: hub.ParBnConfig(reduction_factor=4), HOOKED),
    "parallel_learned": Kind(lambda: hub.ParBnConfig(reduction_factor=4, scaling="learned"), PATCHED),
    "parallel_attention": Kind(
        lambda: hub.ParBnConfig(reduction_factor=4, mh_adapter=True, scaling="channel"), ("llama", "qwen3")
    ),
    "adapter_plus": Kind(lambda: hub.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0), PATCHED),
    "compacter": Kind(lambda: hub.CompacterConfig(reduction_factor=4), HOOKED),
    "compacter_plus": Kind(lambda: hub.CompacterPlusPlusConfig(reduction_factor=4, phm_rank=2), PATCHED),
    "compacter_own_rules": Kind(
        lambda: hub.CompacterPlusPlusConfig(reduction_factor=8, shared_phm_rule=False, phm_bias=False), ("llama",)
    ),
    "compacter_factored_rules": Kind(
        lambda: hub.CompacterConfig(reduction_factor=4, factorized_phm_rule=True, factorized_phm_W=False, scaling=2.0),
        ("llama",),
    ),
    "compacter_shared": Kind(
        lambda: hub.CompacterConfig(reduction_factor=4, shared_W_phm=True, phm_dim=2, use_gating=True), ("llama",)
    ),
}
LORA_EVERYWHERE = {"intermediate_lora": True, "output_lora": True}
LINEARS: dict[str, Kind] = {
    "lora": Kind(lambda: hub.LoRAConfig(r=4, alpha=6, **LORA_EVERYWHERE), ("mistral", *LINEAR)),
    "lora_some": Kind(
        lambda: hub.LoRAConfig(r=3, alpha=4, attn_matrices=["k"], output_lora=True, leave_out=[1]), PATCHED
    ),
    "lora_gated": Kind(
        lambda: hub.LoRAConfig(r=4, alpha=2, attn_matrices=["v", "q"], intermediate_lora=True, use_gating=True), LINEAR
    ),
    # before 1.1.0 the library trained with alpha = r, whatever the config said
    "lora_before_1_1": Kind(lambda: hub.LoRAConfig(r=4, alpha=4), PATCHED, version="adapters.1.0.1"),
    "dora": Kind(lambda: hub.DoRAConfig(r=4, alpha=6, intermediate_lora=True), ("llama", "qwen3", "gemma3")),
    "dora_gated": Kind(lambda: hub.DoRAConfig(r=4, use_gating=True), ("llama",)),
    "ia3": Kind(lambda: hub.IA3Config(), ("mistral", *LINEAR)),
    "ia3_alpha": Kind(lambda: hub.IA3Config(alpha=2, output_lora=True), ("llama", "gpt2")),
    "vera": Kind(lambda: hub.VeraConfig(r=4, alpha=6, attn_matrices=["k", "v"]), ("llama", "gemma3")),
    "dvora": Kind(lambda: hub.DvoRAConfig(r=4, attn_matrices=["q"]), ("llama",)),
}
PREFIXES: dict[str, Kind] = {
    "prefix": Kind(lambda: _prefix(), ("mistral", *PATCHED)),
    "prefix_flat": Kind(lambda: _prefix(flat=True, leave_out=[0]), PATCHED),
    "prefix_gated": Kind(lambda: _prefix(use_gating=True, shared_gating=False), PATCHED),
    "mam": Kind(lambda: hub.MAMConfig(_prefix(), hub.ParBnConfig(reduction_factor=4)), PATCHED),
    "unipelt": Kind(
        lambda: hub.UniPELTConfig(_prefix(prefix_length=3), hub.SeqBnConfig(), hub.LoRAConfig(r=4, alpha=2)), PATCHED
    ),
}
KINDS = {**BOTTLENECKS, **LINEARS, **PREFIXES}


def backbone(family: str) -> Any:
    """A model with weights large enough that logits are far from uniform."""
    model = BACKBONES[family]().eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            if "norm" in name or "ln_" in name:
                parameter.add_(drawn * 0.1)
            elif name.endswith("bias"):
                parameter.copy_(drawn * 0.1)
            else:
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
    return model


def filled(name: str, value: Tensor, scales: bool, random: torch.Generator) -> Tensor:
    """Noise that takes a parameter far from where it was initialised, and logits not far from the usual."""
    drawn = torch.randn(value.shape, generator=random)
    if scales or (name.endswith((".scaling", "norm_before.weight", ".adapter_down.0.weight")) and value.dim() < 2):
        return 1 + 0.5 * drawn
    if name.endswith(".m.weight"):
        return value * (1 + 0.3 * drawn)
    if name.endswith((".vera_D", ".vera_B")):
        return value + 0.3 * drawn
    if ".prefix_tunings." in name or ".gate." in name or ".prefix_gates." in name:
        return drawn
    if "phm_rule" in name or "W_" in name:
        return drawn * 0.9
    return drawn * 0.4


def add(model: Any, kind: Kind, seed: int) -> None:
    """Add the adapter and fill it."""
    hub.init(model)
    config = kind.config()
    model.add_adapter(NAME, config=config, set_active=True)
    model.eval()
    random = torch.Generator().manual_seed(seed)
    scales = config.get("composition_mode") == "scale" if not isinstance(config, hub.ConfigUnion) else False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{NAME}." in name:
                parameter.copy_(filled(name, parameter, scales, random))


def see_the_cache(model: Any) -> None:
    """Hand decoder layers the cache under the name that the library's forward has for it."""
    for layer in getattr(model.base_model, "layers", ()):
        if not hasattr(model.base_model, "adapter_interface") or model.base_model.adapter_interface is None:
            layer.forward = _renamed(layer.forward)


def _renamed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, past_key_values: Any = None, **others: Any) -> Any:
        return forward(*args, past_key_value=past_key_values, **others)

    return call


def answer(model: Any, gated: bool) -> tuple[list[int], Tensor]:
    """Greedy tokens and the logits before each; gated adapters see the prompt in one call and then token by token."""
    stepped = list(_steps(model))
    tokens = [int(logits.argmax()) for logits in stepped]
    logits = torch.stack(stepped)
    if not gated:
        ids = torch.tensor([[*PROMPT, *tokens]])
        whole = model(input_ids=ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1]
        apart = float((whole - logits).abs().max())
        assert apart < CACHE_TOLERANCE, f"with a cache {apart} apart"
        logits = whole
    return tokens, logits.contiguous()


def _steps(model: Any) -> Iterator[Tensor]:
    cache = importlib.import_module("transformers").DynamicCache(config=model.config)
    ids = torch.tensor([PROMPT])
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        yield logits
        ids = logits.argmax().reshape(1, 1)


def save(model: Any, kind: Kind, folder: Path) -> None:
    """The two files of an adapter as the library writes them, and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        model.save_adapter(str(folder), NAME, with_head=False, use_safetensors=True)
    except RuntimeError:
        # tensors shared between modules
        model.save_adapter(str(folder), NAME, with_head=False, use_safetensors=False)
        pickled = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        save_file(once(pickled), folder / "adapter.safetensors")
    for path in folder.iterdir():
        if path.name not in ("adapter_config.json", "adapter.safetensors"):
            path.unlink()
    if kind.version is not None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["version"] = kind.version
        config["config"]["alpha"] = 9
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


def once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of names that share a tensor, the shortest."""
    kept: dict[int, str] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        kept.setdefault(tensors[name].data_ptr(), name)
    return {name: tensors[name].clone() for name in kept.values()}


def is_gated(config: Any) -> bool:
    """Whether any member has a gate."""
    members = config.configs if isinstance(config, hub.ConfigUnion) else [config]
    return any(member.get("use_gating", False) for member in members)


def make(family: str) -> None:
    """All that there is of one family."""
    folder = OUT / family
    folder.mkdir(parents=True, exist_ok=True)
    bare = backbone(family)
    weights = {name: tensor.clone() for name, tensor in bare.state_dict().items() if name != "lm_head.weight"}
    if not bare.config.tie_word_embeddings:
        weights["lm_head.weight"] = bare.state_dict()["lm_head.weight"].clone()
    save_file(weights, folder / "backbone.safetensors")
    base, _ = answer(bare, gated=False)
    answers = {"base": base}
    stored: dict[str, Tensor] = {}
    for seed, (name, kind) in enumerate(KINDS.items()):
        if family not in kind.families:
            continue
        model = backbone(family)
        add(model, kind, seed)
        see_the_cache(model)
        tokens, logits = answer(model, is_gated(kind.config()))
        same = [other for other, others in answers.items() if others == tokens]
        assert not same, f"{family}/{name} answers like {same}"
        answers[name] = tokens
        save(model, kind, folder / name)
        stored |= {f"{name}.prompt": torch.tensor(PROMPT), f"{name}.tokens": torch.tensor(tokens)}
        stored[f"{name}.logits"] = logits
    save_file(stored, folder / "answers.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        for family in BACKBONES:
            make(family)
