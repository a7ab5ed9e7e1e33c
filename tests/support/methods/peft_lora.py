"""PEFT's LORA in every variant, what its files bring beside it, and ADALORA, made by peft and judged by it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from tests.support.backbones import build
from tests.support.methods.case import ALL, GEMMA, LLAMA, Case, Oracle, WholePass, by_peft
from tests.support.peft_saving import write

# every linear of the family, and a few of them
LINEARS: Mapping[str, str | list[str]] = {"gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]}
SOME: Mapping[str, list[str]] = {"gpt2": ["c_attn", "mlp.c_proj"]}
EMBEDDING: Mapping[str, str] = {"gpt2": "wte"}
LAST_NORM: Mapping[str, str] = {"gpt2": "ln_f"}
BLOCKS = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=2)
# tokens in no order
TOKENS = [token for token in range(100, 2, -1) if token % 4]
INVOCATION = (17, 4)
GROUP = 4


def linears(family: str) -> str | list[str]:
    """All of them."""
    return LINEARS.get(family, "all-linear")


def some(family: str) -> list[str]:
    """A few of them; in a group that shares its input, not all."""
    return SOME.get(family, ["q_proj", "v_proj", "down_proj"])


def embedding(family: str) -> str:
    """The input embedding's name."""
    return EMBEDDING.get(family, "embed_tokens")


def moved(name: str, value: Tensor, random: Generator) -> Tensor:
    """Noise on top of what is there: copies of modules and magnitudes stay near what they were."""
    return value + 0.3 * torch.randn(value.shape, generator=random)


def every(**settings: Any) -> Callable[[str], LoraConfig]:
    """LORA on all linears."""
    return lambda family: LoraConfig(r=4, lora_alpha=6, target_modules=linears(family), **settings)


def few(**settings: Any) -> Callable[[str], LoraConfig]:
    """LORA on a few linears."""
    return lambda family: LoraConfig(r=4, lora_alpha=6, target_modules=some(family), **settings)


def _with_embedding(**settings: Any) -> Callable[[str], LoraConfig]:
    return lambda family: LoraConfig(r=3, lora_alpha=4, target_modules=[*some(family), embedding(family)], **settings)


def _blocks(family: str) -> LoraConfig:
    return LoraConfig(r=4, use_bdlora=BLOCKS, target_modules=["q_proj", "o_proj", "up_proj"])


def _whole(family: str) -> LoraConfig:
    saved = [embedding(family), LAST_NORM.get(family, "layernorm"), "lm_head"]
    return LoraConfig(r=4, target_modules=some(family), modules_to_save=saved)


def _whole_and_tied(family: str) -> LoraConfig:
    saved = [embedding(family)]
    return LoraConfig(r=4, target_modules=some(family), modules_to_save=saved, ensure_weight_tying=True)


def _two_lists(family: str) -> LoraConfig:
    """Rows of the embedding and others of the head."""
    listed = {embedding(family): TOKENS, "lm_head": TOKENS[:40]}
    return LoraConfig(r=4, target_modules=some(family), trainable_token_indices=listed)


def _adalora(family: str) -> AdaLoraConfig:
    return AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, total_step=100, target_modules=linears(family))


def _quietly(make: Callable[[], PeftModel]) -> PeftModel:
    with warnings.catch_warnings():
        # peft warns about tied embeddings and corrects settings aloud
        warnings.simplefilter("ignore")
        return make().eval()


def _fill(model: PeftModel, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=random))


def pooled(family: str) -> PeftModel:
    """QA-LoRA on a backbone that is not quantised, which peft itself sets up for GPTQ only."""
    config = few(use_qalora=True, qalora_group_size=GROUP)(family)
    model = _quietly(lambda: get_peft_model(build(family), config))
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.lora_variant["default"] = QALoraLinearVariant()
            QALoraLinearVariant.init(layer, "default", config)
    return model.eval()


def _qalora() -> Case:
    def make(family: str, folder: Path, seed: int) -> Path:
        model = pooled(family)
        _fill(model, seed)
        write(model, folder)
        return folder

    def oracle(family: str, folder: Path) -> Oracle:
        model = pooled(family)
        set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")))
        return WholePass(model)

    return Case("qalora", make, oracle, ALL)


def _pruned() -> Case:
    """AdaLoRA as its training ends: ranks of their own at every site, none at one of them."""

    def make(family: str, folder: Path, seed: int) -> Path:
        config = _adalora(family)
        model = _quietly(lambda: get_peft_model(build(family), config))
        _fill(model, seed)
        tuner = model.base_model
        assert isinstance(tuner, AdaLoraModel)
        names = [name for name, layer in tuner.model.named_modules() if isinstance(layer, LoraLayer)]
        config.rank_pattern = {f"{n}.lora_E": [(i + k) % 3 != 0 for k in range(6)] for i, n in enumerate(names)}
        config.rank_pattern[f"{names[1]}.lora_E"] = [False] * 6
        tuner.resize_modules_by_rank_pattern(config.rank_pattern, "default")
        with warnings.catch_warnings():
            # peft suspects an empty tensor to be a loss
            warnings.simplefilter("ignore")
            write(model, folder)
        return folder

    def oracle(family: str, folder: Path) -> Oracle:
        return WholePass(_quietly(lambda: PeftModel.from_pretrained(build(family), str(folder))))

    return Case("adalora_pruned", make, oracle, ALL)


@dataclass(frozen=True)
class FromInvocation:
    """An oracle of aLoRA: it acts from the last invocation in the prompt on, whatever is generated behind it."""

    model: nn.Module
    invocation: tuple[int, ...]

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        ids, size = [*prompt, *tokens], len(self.invocation)
        starts = [at for at in range(len(prompt) - size + 1) if tuple(prompt[at : at + size]) == self.invocation]
        offset = len(ids) - starts[-1] if starts else None
        with torch.inference_mode():
            found: Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False, alora_offsets=[offset]).logits[0]
        return found[len(prompt) - 1 : len(ids) - 1].float()


def _alora() -> Case:
    settings: dict[str, Any] = {"alora_invocation_tokens": list(INVOCATION), "task_type": "CAUSAL_LM"}
    case = by_peft("alora", every(**settings))

    def oracle(family: str, folder: Path) -> Oracle:
        model = _quietly(lambda: PeftModel.from_pretrained(build(family), str(folder)))
        return FromInvocation(model, INVOCATION)

    return Case("alora", case.make, oracle, ALL, INVOCATION)


CASES: tuple[Case, ...] = (
    by_peft("lora", every()),
    by_peft("rslora", few(use_rslora=True, rank_pattern={"q_proj": 2, "c_attn": 7}, alpha_pattern={"v_proj": 3})),
    by_peft("lora_bias", few(lora_bias=True)),
    by_peft("dora", every(use_dora=True), moved),
    by_peft("dora_head", lambda _: LoraConfig(r=4, use_dora=True, target_modules=["lm_head"]), moved),
    _qalora(),
    by_peft("bdlora", _blocks, families=(LLAMA, GEMMA)),
    _alora(),
    by_peft("kasa", few(kasa_config=KasaConfig()), families=(LLAMA, GEMMA)),
    by_peft("pissa", few(init_lora_weights="pissa"), moved),
    by_peft("pissa_dora", few(init_lora_weights="pissa", use_dora=True), moved),
    by_peft("olora", few(init_lora_weights="olora"), moved, families=(LLAMA, GEMMA)),
    by_peft("lora_embedding", _with_embedding(), moved),
    by_peft("lora_embedding_tied", _with_embedding(ensure_weight_tying=True), moved, families=(GEMMA,)),
    by_peft("dora_embedding", _with_embedding(use_dora=True), moved),
    by_peft("lora_tokens", few(trainable_token_indices=TOKENS), moved),
    by_peft("lora_tokens_of_two", _two_lists, moved),
    by_peft("lora_whole_modules", _whole, moved),
    by_peft("lora_whole_tied", _whole_and_tied, moved, families=(GEMMA,)),
    by_peft("lora_biases", few(bias="all"), moved),
    by_peft("adalora", _adalora),
    _pruned(),
)
