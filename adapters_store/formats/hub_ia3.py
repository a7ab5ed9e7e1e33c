"""AdapterHub's ``IA3Config``, a ``LoRAConfig`` that scales: a vector on the outputs of linears, bias included.

Tensor at ``<linear>.loras.<adapter>.``: ``lora_B`` [out, 1]; y = alpha · l ⊙ (W x + b). Feed-forward parts are scaled
at the output of what the library calls ``intermediate``: for Llama and Mistral that of ``down_proj``, where PEFT scales
its input. GPT-2's vector has its thirds for q, k, v next to each other; those that are not adapted are 1, times alpha.
Source: ``adapters`` 1.3.0, ``methods/lora.py``, ``IA3`` and ``LoRAMergedLinear``.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.hub_common import Context, Member, MemberSettings, times
from weft.adapters_store.formats.hub_linears import KIND, Place, Which, places
from weft.adapters_store.operators import Scale, SiteOperators
from weft.adapters_store.tensor_refs import Computed, TensorRef, Value

if TYPE_CHECKING:
    from torch import Tensor

IA3 = "IA3"

SERVES = (
    Served("(IA)³", "2205.05638", "scale", "AdapterHub IA3Config", True, "gates, which would scale by the input"),
)


def read(settings: MemberSettings, context: Context, which: Which) -> Member:
    """One scale per linear."""
    settings.choice("r", (1,), 1, "the library has vectors for r = 1 only")
    alpha = settings.number("alpha")
    settings.refuse("use_gating", "a scale of the output that depends on the input is none of weft's operators")
    settings.refuse("use_dora", "the library has no vectors with DoRA")
    # numbers of VeRA mean nothing for vectors
    settings.ignore("vera_d", "vera_b")
    settings.finish(IA3)
    sites = {
        place.site.path: SiteOperators((Scale(_vector(context, place, alpha), of_input=False),), ("alpha",))
        for place in places(context, which)
    }
    return Member(IA3, sites)


def _vector(context: Context, place: Place, alpha: float) -> Value:
    tall = place.site.out_features
    own = tall // 3 * len(place.parts) if place.parts else tall
    tensor: TensorRef = context.shelf.take(place.site.path, KIND, "lora_B", (own, 1))
    if not place.parts:
        return times(tensor, alpha)

    def formula(vector: "Tensor") -> "Tensor":
        whole = vector.new_ones(3, tall // 3)
        whole[list(place.parts)] = vector.view(len(place.parts), -1)
        return whole.view(-1, 1) * alpha

    return Computed(tensor.name, (tall, 1), formula, (tensor,))
