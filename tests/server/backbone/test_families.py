"""Every family: requests of mixed lengths in one batch get the tokens of its own ``generate``, with an adapter too."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.support.backbones import ALL_FAMILIES, VOCABULARY, build
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine

NEW_TOKENS = 12
# some shorter and some longer than the sliding windows (8), and than what one step takes (24)
LENGTHS = (1, 5, 8, 9, 17, 40)
PLAIN = ["q_proj", "k_proj", "v_proj", "o_proj"]
# the attention's linears, and the fused ones of either sublayer
TARGETS = {
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj"],
}


class Family:
    """An engine over a family's tiny model with one adapter, and the models that know the answers."""

    def __init__(self, name: str, folder: Path):
        adapter = folder / "adapter"
        self.models: dict[bool, PreTrainedModel | PeftModel] = {False: build(name), True: _adapted(name, adapter)}
        config = EngineConfig(
            model=name, store=str(folder / "store"), adapter_memory_bytes_max=1 << 20, kv_bytes_max=2 << 20,
            batch_tokens_max=24, batch_requests_max=20,
        )  # fmt: skip
        self.engine = OfflineEngine(config, Backbone(build(name)))
        self.digest: Digest = self.engine.register("adapter", adapter)

    def served(self, prompts: list[list[int]], adapted: list[bool]) -> list[list[int]]:
        """The engine's answers to all prompts at once."""
        asked = [
            Submit(RequestId(str(i)), tuple(prompt), NEW_TOKENS, adapter=self.digest if carries else None)
            for i, (prompt, carries) in enumerate(zip(prompts, adapted, strict=True))
        ]
        answers = self.engine.run(asked)
        return [answers[submit.id] for submit in asked]

    def generated(self, prompt: list[int], adapted: bool) -> list[int]:
        """The answer of the model's own loop."""
        model: Any = self.models[adapted]
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        answer: list[int] = found[0, len(prompt) :].tolist()
        return answer


def _adapted(name: str, folder: Path) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.get(name, PLAIN), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft corrects fan_in_fan_out aloud
        model = get_peft_model(build(name), config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        model.save_pretrained(str(folder))
    return model.eval()


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def family(request, tmp_path_factory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def prompts(seed: int) -> list[list[int]]:
    """One of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def test_mixed_lengths_get_the_tokens_of_generate(family):
    asked = prompts(1)
    want = [family.generated(prompt, False) for prompt in asked]
    assert family.served(asked, [False] * len(asked)) == want
    assert sum(len(set(answer)) for answer in want) > 2 * len(want), "a model that repeats itself proves little"


def test_an_adapter_beside_base_rows_gets_the_tokens_of_the_library_that_made_it(family):
    asked, carries = [*prompts(2), *prompts(2)], [True] * len(LENGTHS) + [False] * len(LENGTHS)
    want = [family.generated(prompt, adapted) for prompt, adapted in zip(asked, carries, strict=True)]
    assert family.served(asked, carries) == want
    adapted, base = want[: len(LENGTHS)], want[len(LENGTHS) :]
    assert all(a != b for a, b in zip(adapted, base, strict=True)), "the adapter shows in every answer"


def test_experts_are_no_sites_and_everything_else_is():
    backbone = Backbone(build("mixtral"))
    names = {site.path.rpartition(".")[2] for site in backbone.info.sites}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}


def test_fused_linears_are_sites_of_their_whole_width():
    info = Backbone(build("phi3")).info
    widths = {site.path.rpartition(".")[2]: site.out_features for site in info.sites}
    # 4 heads of queries and 2 of keys and values, each 8 wide; gate and up, each 48
    assert widths["qkv_proj"] == (4 + 2 + 2) * 8
    assert widths["gate_up_proj"] == 2 * 48
