"""What PEFT's LORA can be beside a plain one, and ADALORA: configs for tests, and what makes a model special."""

from collections.abc import Mapping

from peft import AdaLoraConfig, AdaLoraModel, EvaConfig, LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GPT2 = ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
BLOCKS = BdLoraConfig(target_modules_bd_a=["o_proj", "down"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=2)
LOOSE = BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=4, match_strict=False)

# groups of as many inputs are not pooled by the tests
NOT_POOLED = LoraConfig().qalora_group_size

# by a name for the test: family, config; all of them are linears in the normal form
VARIANTS: Mapping[str, tuple[str, PeftConfig]] = {
    "dora": ("llama", LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear")),
    "dora_rslora": (
        "llama",
        LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules=ATTENTION, rank_pattern={"q_proj": 2}),
    ),
    "dora_gpt2": ("gpt2", LoraConfig(r=3, use_dora=True, target_modules=GPT2, fan_in_fan_out=True)),
    "dora_biased": ("llama_biased", LoraConfig(r=4, use_dora=True, target_modules="all-linear")),
    "dora_with_biases": ("llama_biased", LoraConfig(r=4, use_dora=True, bias="all", target_modules=ATTENTION)),
    "dora_head": ("llama", LoraConfig(r=4, use_dora=True, target_modules=["lm_head"])),
    "dora_tied_head": ("gpt2", LoraConfig(r=4, use_dora=True, target_modules=["lm_head"])),
    "qalora": (
        "llama",
        LoraConfig(r=4, lora_alpha=6, use_qalora=True, qalora_group_size=8, target_modules="all-linear"),
    ),
    # PEFT pools only where the backbone is quantised
    "qalora_unused": ("llama", LoraConfig(r=4, use_qalora=True, target_modules=ATTENTION)),
    "bdlora": (
        "llama",
        LoraConfig(r=4, use_bdlora=BLOCKS, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]),
    ),
    "bdlora_loose": ("llama", LoraConfig(r=4, use_bdlora=LOOSE, target_modules=ATTENTION)),
    "kasa": ("llama", LoraConfig(r=4, lora_alpha=6, kasa_config=KasaConfig(), target_modules="all-linear")),
    "velora": ("llama", LoraConfig(r=4, velora_config=VeloraConfig(num_groups=4), target_modules=ATTENTION)),
    "monteclora": ("llama", LoraConfig(r=4, monteclora_config=MontecloraConfig(), target_modules=ATTENTION)),
    # PEFT's own SVD, in fp32, is what limits this comparison: see test_peft_starts
    "pissa": ("llama", LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=ATTENTION)),
    "pissa_gpt2": ("gpt2", LoraConfig(r=4, init_lora_weights="pissa", target_modules=GPT2, fan_in_fan_out=True)),
    # twice the rank is more than there are columns
    "pissa_wide": ("llama", LoraConfig(r=20, init_lora_weights="pissa", target_modules=["q_proj"])),
    "pissa_dora": ("llama", LoraConfig(r=4, init_lora_weights="pissa", use_dora=True, target_modules=ATTENTION)),
    "olora": ("llama", LoraConfig(r=4, lora_alpha=12, init_lora_weights="olora", target_modules="all-linear")),
    "mica": ("llama", LoraConfig(r=4, init_lora_weights="mica", target_modules=ATTENTION)),
    "eva": ("llama", LoraConfig(r=4, init_lora_weights="eva", eva_config=EvaConfig(), target_modules=ATTENTION)),
    "adalora": (
        "llama",
        AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, total_step=100, target_modules=["q_proj", "up_proj"]),
    ),
    "adalora_no_alpha": (
        "llama",
        AdaLoraConfig(init_r=6, target_r=3, lora_alpha=0, total_step=100, target_modules=["q_proj"]),
    ),
    "adalora_gpt2": (
        "gpt2",
        AdaLoraConfig(init_r=6, target_r=3, total_step=100, target_modules=GPT2, fan_in_fan_out=True),
    ),
    # what AdaLoRA has from LoRA but does not look at
    "adalora_other_settings": (
        "llama",
        AdaLoraConfig(
            init_r=4, target_r=2, use_rslora=True, total_step=9, target_modules=["q_proj"], alpha_pattern={"q": 3}
        ),
    ),
    "adalora_pruned": (
        "llama",
        AdaLoraConfig(init_r=6, target_r=3, total_step=100, target_modules=ATTENTION, rank_pattern={}),
    ),
}


def pool(model: PeftModel, config: LoraConfig) -> None:
    """QA-LoRA on a backbone that is not quantised, which PEFT itself sets up for GPTQ only."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.lora_variant["default"] = QALoraLinearVariant()
            QALoraLinearVariant.init(layer, "default", config)


def prune(model: PeftModel) -> dict[str, list[bool]]:
    """Cut ranks as the end of AdaLoRA's training does: q_proj keeps 4 of 6, k_proj none, the others all."""
    kept = {"q_proj": [True, False, True, True, False, True], "k_proj": [False] * 6}
    tuner, config = model.base_model, model.peft_config["default"]
    assert isinstance(tuner, AdaLoraModel)
    assert isinstance(config, AdaLoraConfig)
    modules = [name for name, layer in tuner.model.named_modules() if isinstance(layer, LoraLayer)]
    pattern = {f"{name}.lora_E": kept.get(name.rpartition(".")[2], [True] * 6) for name in modules}
    tuner.resize_modules_by_rank_pattern(pattern, "default")
    config.rank_pattern = pattern
    return pattern
