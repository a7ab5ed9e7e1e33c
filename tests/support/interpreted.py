"""Run under TRITON_INTERPRET=1: one mixed batch on a one-layer model, by the Triton kernels and by their torch twins.

Prints as JSON the tokens of both and how often the engine launched each kernel.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import adapters, backbones
from tests.support.methods import native_deltas, native_places, peft_other
from tests.support.methods.native_files import drawing, prefixed, write
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import RequestId, Submit
from weft.server.engine.offline import OfflineEngine

KINDS = ("lora_patterns", "lora_head", "lokr_full", "lokr_factored", "ia3", "ia3_input_of_one")
# what more it takes to launch every kernel: functions between maps, norms, entries, rows
CASES = ("bottleneck_houlsby", "bottleneck_normed", "ln_tuning", "shira", "rows")


def main(folder: Path) -> None:
    """Make the adapters, run the batch twice, print."""
    backbones.BUILDERS["llama"] = lambda: LlamaForCausalLM(LlamaConfig(**backbones.COMMON, num_hidden_layers=1))
    made = {kind: adapters.make(kind, "llama", folder / kind, seed) for seed, kind in enumerate(KINDS)}
    cases = {case.name: case for module in (native_deltas, native_places, peft_other) for case in module.CASES}
    made |= {name: cases[name].make("llama", folder / name, seed) for seed, name in enumerate(CASES)}
    made["balanced"] = balanced(folder / "balanced")
    tokens = {"torch": run("torch", made, folder / "torch")}
    launches = count_launches()
    tokens["triton"] = run("triton", made, folder / "triton")
    sys.stdout.write(json.dumps({"tokens": tokens, "launches": launches}) + "\n")


def balanced(folder: Path) -> Path:
    """A Kronecker term on a query, so near to square for its size that it is fused."""
    draw = drawing(0)
    factors = {"krona_A": draw(16, 16), "krona_B": draw(2, 2)}
    tensors = {f"model.layers.0.self_attn.q_proj.{name}": factor for name, factor in factors.items()}
    return write(folder, "X_KRONA", prefixed(tensors), scale=1.5)


def run(kernels: str, made: dict[str, Path], store: Path) -> dict[str, list[int]]:
    """Tokens of every adapter and of the base, all in one batch."""
    limits = EngineConfig(
        model="tiny", store=str(store), kernels=kernels, adapter_memory_bytes_max=1 << 20, kv_bytes_max=1 << 20
    )
    engine = OfflineEngine(limits, Backbone(backbones.build("llama")))
    submits = [Submit(RequestId("base"), (5, 9, 11), 3)]
    for i, (kind, folder) in enumerate(made.items()):
        prompt = tuple(range(3, 6 + 3 * i))
        submits.append(Submit(RequestId(kind), prompt, 3, adapter=engine.register(kind, folder)))
    return {str(id): found for id, found in engine.run(submits).items()}


def count_launches() -> Counter[str]:
    """Put a counter in the place of every kernel that the launchers know."""
    from weft.kernels import device

    counts: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str, kernel):
            self.name, self.kernel = name, kernel
            counts[name] = 0

        def __getitem__(self, grid):
            counts[self.name] += 1
            return self.kernel[grid]

    for name, value in list(vars(device).items()):
        if name.endswith("_kernel"):
            setattr(device, name, Counted(name, value))
    return counts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
