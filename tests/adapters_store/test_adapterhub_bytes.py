"""What AdapterHub's methods take on a device at the shape of Llama 3 8B: no more than their own parameters in bf16."""

from math import prod
from typing import Any

import pytest

from tests.adapters_store.llama_8b import WIDTH, Llama8B
from tests.support import adapterhub
from weft.adapters_store.compile import block_bytes
from weft.adapters_store.formats import hub
from weft.adapters_store.formats.hub_common import Shelf
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.tensor_refs import TensorRef

# MB of the methods' own parameters, two bytes each, as the survey's authors and the papers set them
PLAIN = {"intermediate_lora": False, "output_lora": False}
SURVEY: dict[str, tuple[str, dict[str, Any], float]] = {
    "Houlsby, r = 256": ("houlsby", {"reduction_factor": 16}, 269),
    "Pfeiffer, r = 256": ("pfeiffer", {"reduction_factor": 16}, 134.5),
    "parallel, r = 512": ("parallel", {"reduction_factor": 8}, 268.7),
    "Compacter": ("compacter", {"reduction_factor": 32}, 1.62),
    "Compacter++": ("compacter_plus", {"reduction_factor": 32, "phm_rank": 1}, 0.81),
    "LoRA of q, v": ("lora", {"r": 8, **PLAIN}, 6.8),
    "DoRA of q, v": ("dora", {"r": 8, **PLAIN}, 7.1),
    "30 tokens of prefix": ("prefix", {"prefix_length": 30}, 3.9),
    "MAM": ("mam", {"0.prefix_length": 30, "1.reduction_factor": 8}, 272.7),
    "UniPELT": ("unipelt", {"0.prefix_length": 10, "1.reduction_factor": 16, "2.r": 8}, 143.7),
}


class Willing(Shelf):
    """Has every tensor that is asked for, in the shape that is asked for."""

    def take(self, module: str, kind: str, role: str, shape: tuple[int, ...], why: str = "") -> TensorRef:
        return TensorRef(f"{module}.{kind}.{self.adapter}.{role}", shape, "BF16", 0, 2 * prod(shape))


@pytest.mark.parametrize("name", SURVEY)
def test_a_method_takes_little_more_than_its_parameters(name, monkeypatch):
    kind, changes, megabytes = SURVEY[name]
    config = adapterhub.config("llama", kind) | {"hidden_size": WIDTH}
    for key, value in changes.items():
        number, _, rest = key.rpartition(".")
        (config["config"]["configs"][int(number)] if number else config["config"])[rest] = value
    monkeypatch.setattr(hub, "Shelf", Willing)
    backbone = Llama8B()
    parsed = hub.parse(config, Header({}, 0), backbone.info)
    assert megabytes * 0.99 <= block_bytes(parsed, backbone.geometry, backbone) / 1e6 <= megabytes * 1.1
