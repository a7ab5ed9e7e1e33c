"""Methods of PEFT that are refused, each with its own reason. Imports no torch.

What a file leaves out is no reason by itself: what PEFT draws from a seed is drawn again (``drawn``). What it takes
from a decomposition or a clustering of the weights is not: signs, order and clusters are the library's to choose.
"""

from collections.abc import Mapping

AGAIN = "which no file holds: PEFT computes it again from the weights when it loads"

REFUSED: Mapping[str, str] = {
    "ADAMSS": f"AdaMSS needs the clusters of each weight's rows, {AGAIN}",
    "ADAPTION_PROMPT": "LLaMA-Adapter attends to its prompts in a softmax of their own, which is no prefix",
    "FROD": f"FRoD needs a basis of all targeted weights, {AGAIN}",
    "LILY": "Lily routes every token between experts, so what it adds to a linear is no fixed matrix",
    "OSF": f"OSF trains singular vectors of a weight away from their first values, {AGAIN}",
    "POLY": "Polytropon mixes its adapters by task, and which task a request is about is said by no file",
    "PSOFT": f"PSOFT rotates singular vectors of a weight in the signs that they had, {AGAIN}",
    "SHADOW": "Shadow runs a second model beside the backbone",
    "XLORA": "X-LoRA weights its adapters by what a first pass over the input says",
}
