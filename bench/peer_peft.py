"""transformers + peft over the same workload: its base, one adapter for all, and its mixed batch of distinct ones."""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from weft.bench import workload
from weft.bench.decode import Case
from weft.server.backbone.load import choose_device, choose_dtype, moved


def cases(options: argparse.Namespace, folder: Path) -> list[Case]:
    """The peer's cases, on the adapters that the workload wrote into ``folder``.

    peft's own default keeps adapters in fp32 over a bf16 model; on the CPUs tried, bf16 adapters are half as fast.
    """
    device = choose_device(options.device)
    config = workload.shape(options.shape)
    model = moved(workload.random_model(config, choose_dtype(options.dtype, device)), device)
    ids = torch.tensor(workload.prompts(options.requests, options.prompt_tokens, config.vocab_size), device=device)
    names = [f"low{i}" for i in range(options.requests)]
    with warnings.catch_warnings():
        # peft warns that these folders were not written by itself
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(
            model, str(folder / names[0]), adapter_name=names[0], autocast_adapter_dtype=False
        )
        for name in names[1:]:
            peft.load_adapter(str(folder / name), adapter_name=name)
    peft.eval()

    def run(**how: Any) -> Callable[[], None]:
        def generate() -> None:
            with torch.inference_mode():
                out = peft.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=options.new_tokens,
                    min_new_tokens=options.new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    **how,
                )
            assert out.shape[1] == options.prompt_tokens + options.new_tokens

        return generate

    tokens = options.requests * options.new_tokens
    return [
        Case("peft-base", "transformers + peft, base rows only", run(adapter_names=["__base__"] * len(names)), tokens),
        Case("peft-one", "transformers + peft, one LoRA for all", run(), tokens),
        Case("peft-distinct", f"transformers + peft, {len(names)} distinct LoRA", run(adapter_names=names), tokens),
    ]
