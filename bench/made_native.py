"""What is written by hand in weft's own formats, and the one of peft's that peft sets up for quantised models only."""

from weft.bench import made_tensors as of
from weft.bench.made import Ground, Layers, Made, member, native, union, written
from weft.bench.made_tensors import RANK

GATED = {"gate_input": "mean", "gate_scope": "per_call", "applies_to": "kv"}
BOTTLENECK = {"peft_type": "X_BOTTLENECK", "tap": "h", "act": "silu", "scale": 1.0}
BESIDE = {**BOTTLENECK, "tap": "x_res", "scale": 4.0}
PRODUCT = {"peft_type": "X_KRONA_B", "scale": 1.0, "tap": "ln_x"}
NATIVE = {"format_version": 1}
SHARE, BOTH = "0.5 % of the weights", "1/16, both places"


def _pooled(ground: Ground) -> dict[str, object]:
    names = sorted({site.path.rpartition(".")[2] for site in ground.body})
    group = {"use_qalora": True, "qalora_group_size": of.pool(ground)}
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": names, **group}


def _low_rank(ground: Ground) -> dict[str, object]:
    names = sorted({site.path.rpartition(".")[2] for site in ground.body})
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": names}


def _quarters(*numbers: int) -> Layers:
    """Layers by quarters of the depth."""

    def layers(ground: Ground) -> list[int]:
        count = len(ground.info.layers)
        return [layer for layer in range(count) if 4 * layer // count in numbers]

    return layers


MADE: tuple[Made, ...] = (
    written("QA-LoRA", "r 16, inputs in groups, all linears", _pooled, of.pooled),
    native(
        "GLoRA", "A and B of r 16, C and E, all linears", {"peft_type": "X_GLORA", "dialect": "product"}, of.products
    ),
    native("IPT", "16 tokens", {"peft_type": "X_IPT", "decoded": True}, of.soft),
    native("BitFit", "all linears", {"peft_type": "X_BITFIT"}, of.bias),
    native("DiffFit", "scales, biases, norms", {"peft_type": "X_DIFFFIT"}, of.scales),
    native("FishMask", SHARE, {"peft_type": "X_SPARSE"}, of.sparse),
    native("DiffPruning", SHARE, {"peft_type": "X_SPARSE"}, of.sparse),
    native("LT-SFT", SHARE, {"peft_type": "X_SPARSE"}, of.sparse),
    native("FAR", "6 % of the MLP's rows", {"peft_type": "X_ROWS", "axis": "out"}, of.rows),
    native("GaLore", "as full fine-tuning: all linears, dense", {"peft_type": "X_DENSE"}, of.dense("_proj")),
    native(
        "Attention tuning",
        "queries and values, dense",
        {"peft_type": "X_DENSE"},
        of.dense("q_proj", "v_proj"),
    ),
    native("Houlsby adapter", BOTH, BOTTLENECK, of.bottleneck("attention", "mlp")),
    native("Pfeiffer adapter", "1/16, MLP", {**BOTTLENECK, "tap": "h+x_res"}, of.bottleneck("mlp")),
    native("AdaMix", "averaged, 1/16, MLP", BOTTLENECK, of.bottleneck("mlp")),
    native("SparseAdapter", f"masked, {BOTH}", BOTTLENECK, of.bottleneck("attention", "mlp")),
    native("Parallel adapter", "1/4, beside the MLP", BESIDE, of.bottleneck("mlp", reduction=4)),
    native("Compacter", "4 terms, both places, a rule per map", BOTTLENECK, of.compacter("attention", "mlp")),
    native("Compacter++", "4 terms, MLP, a rule per map", BOTTLENECK, of.compacter("mlp")),
    native("KronA^B", "beside the MLP", {**PRODUCT, "variant": "B"}, of.kron_beside),
    native("KronA^B_res", "beside the MLP, and the input", {**PRODUCT, "variant": "B_res"}, of.kron_beside_scaled),
    native("Intrinsic SAID", "light, 1024 numbers", {"peft_type": "X_SAID", "variant": "light_rank1"}, of.light),
    native("Ladder-side tuning", "1/8, all layers", of.side_settings, of.side),
    native("Adaptive prefix tuning", "16 tokens, gated", {"peft_type": "X_APT", **GATED}, of.gated_prefix),
    union(
        "MAM adapter",
        "16 tokens, 1/4 beside the MLP",
        member(of.prefix_settings, of.prefix),
        member({**BESIDE, **NATIVE}, of.bottleneck("mlp", reduction=4)),
    ),
    union(
        "S4",
        "adapter, prefix, biases, LoRA by quarters of the layers",
        member({**BESIDE, **NATIVE}, of.bottleneck("mlp"), _quarters(0, 1, 2)),
        member(_low_rank, of.low_rank, _quarters(0, 3)),
        member({"peft_type": "X_BITFIT", **NATIVE}, of.bias, _quarters(2, 3)),
        member(of.prefix_settings, of.prefix, _quarters(1, 2, 3)),
    ),
)
