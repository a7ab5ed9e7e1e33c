"""Methods in bf16: as near to peft in fp32 as peft in bf16 is, over logits of several adapters and prompts together.

How far one answer is off is chance: a tiny random model makes of one rounding a small difference or a large one.
"""

import pytest
import torch

from tests.support.families import CASES, Family, prompts
from tests.support.methods.case import LLAMA, WholePass

# one at least for each way in which an adapter is computed
METHODS = (
    "lora",
    "lora_biases",
    "lora_embedding",
    "lora_tokens",
    "dora",
    "vera",
    "ia3",
    "lokr",
    "lokr_both",
    "ln_tuning",
    "shira",
    "hra",
    "peanut",
    "trainable_tokens",
    "prompt_tuning",
    "prefix_tuning",
)
# how much further off the engine may be, and by how much of the largest logit a single one in any case
RATIO, LEAST = 1.5, 0.01


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Family:
    return Family(LLAMA, tmp_path_factory.mktemp(LLAMA), torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_as_near_as_peft_is(family, method):
    said = prompts(8, seed=len(method))
    asked = {str(i): (family.digest(method, i % 2), prompt) for i, prompt in enumerate(said)}
    rough = [CASES[method].oracle(LLAMA, family.folder_of(method, twin)) for twin in (0, 1)]
    wants, ours, theirs = [], [], []
    for id, answer in family.run(asked).items():
        twin = int(id) % 2
        half = rough[twin]
        assert isinstance(half, WholePass)
        half.model.bfloat16()
        want = family.oracle(method, twin).logits(answer.prompt, answer.tokens)
        wants.append(want)
        ours.append(answer.logits.float() - want)
        theirs.append(half.logits(answer.prompt, answer.tokens) - want)
    want, own, other = torch.stack(wants), torch.stack(ours), torch.stack(theirs)
    assert own.norm() <= RATIO * other.norm()
    assert own.abs().max() <= RATIO * other.abs().max() + LEAST * want.abs().max()
