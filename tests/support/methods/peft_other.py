"""PEFT's methods other than LoRA and its nearest kin and than prompts, made by peft and judged by it."""

from collections.abc import Callable, Mapping

import peft
import torch
from peft import PeftConfig

from tests.support.methods.case import GEMMA, GPT2, LLAMA, Case, by_peft, noise

# torch warns of sparse tensors until somebody says whether they are to be checked; peft makes some
torch.sparse.check_sparse_tensor_invariants.enable()

# each family's linears that most cases adapt; three sizes of input and output, a fused group only in part
TARGETS: Mapping[str, list[str]] = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "opt": ["q_proj", "v_proj", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "down_proj"],
}
LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]
# peft has many methods for nn.Linear only, of which gpt2 has one
HEAD = ["lm_head"]
NORMS: Mapping[str, list[str]] = {
    "llama": ["input_layernorm", "post_attention_layernorm", "model.norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gemma3": ["input_layernorm", "post_feedforward_layernorm", "q_norm", "model.norm"],
}
EMBEDDINGS: Mapping[str, str] = {"gpt2": "wte"}


def targets(family: str) -> list[str]:
    """Where methods act that peft has for Conv1D too."""
    return TARGETS.get(family, LLAMA_TARGETS)


def linears(family: str) -> list[str]:
    """Where methods act that peft has for nn.Linear only."""
    return HEAD if family == GPT2 else targets(family)


def everywhere(config: Callable[..., PeftConfig], **settings: object) -> Callable[[str], PeftConfig]:
    """A method that peft has for Conv1D too."""
    return lambda family: config(target_modules=targets(family), **settings)


def plain(config: Callable[..., PeftConfig], **settings: object) -> Callable[[str], PeftConfig]:
    """A method that peft has for nn.Linear only."""
    return lambda family: config(target_modules=linears(family), **settings)


def _tokens(family: str) -> PeftConfig:
    """Most of the tokens, in no order, so that any prompt has some of them."""
    ids = [token for token in range(100, 2, -1) if token % 4]
    return peft.TrainableTokensConfig(token_indices=ids, target_modules=[EMBEDDINGS.get(family, "embed_tokens")])


def _ia3(family: str) -> PeftConfig:
    """Scales of outputs and of the input of a feed-forward part."""
    outputs, inputs = (["c_attn"], ["mlp.c_proj"]) if family == GPT2 else (["k_proj", "v_proj"], ["down_proj"])
    return peft.IA3Config(target_modules=[*outputs, *inputs], feedforward_modules=inputs)


def _norms(family: str) -> PeftConfig:
    return peft.LNTuningConfig(target_modules=NORMS[family])


NO_GPT2 = (LLAMA, GEMMA)
SHARED = {"projection_prng_key": 3}

CASES: tuple[Case, ...] = (
    by_peft("ia3", _ia3, noise(0.4, [".ia3_l"])),
    by_peft("ia3_outputs", everywhere(peft.IA3Config, feedforward_modules=[]), noise(0.4, [".ia3_l"])),
    # factors of both sizes whole, as KronA has them, and a low-rank pair in the place of the second
    by_peft("lokr_full", plain(peft.LoKrConfig, r=128, alpha=192)),
    by_peft("lokr_krona", plain(peft.LoKrConfig, r=128, alpha=128, decompose_factor=4)),
    by_peft("lokr", plain(peft.LoKrConfig, r=2, alpha=3)),
    by_peft("lokr_both", plain(peft.LoKrConfig, r=1, alpha=2, decompose_both=True)),
    by_peft("ln_tuning", _norms, noise(0.4, [""])),
    by_peft("beft", plain(peft.BeftConfig)),
    by_peft("shira", plain(peft.ShiraConfig, r=2)),
    by_peft("supertuning", plain(peft.SupertuningConfig, sparsity=0.8)),
    by_peft("supra", plain(peft.SupertuningConfig, sparsity=0.8, r=3)),
    by_peft("loha", plain(peft.LoHaConfig, r=3, alpha=4)),
    by_peft("hra", plain(peft.HRAConfig, r=4)),
    by_peft("hra_orthogonal", plain(peft.HRAConfig, r=3, apply_GS=True)),
    by_peft("delora", plain(peft.DeloraConfig, r=4), noise(0.6, ["delora_lambda"])),
    by_peft("miss", plain(peft.MissConfig, r=5)),
    by_peft("miss_mini", plain(peft.MissConfig, r=4, mini_r=1, init_weights="mini")),
    by_peft("gralora", everywhere(peft.GraloraConfig, r=8, gralora_k=4, alpha=6)),
    by_peft("gralora_hybrid", everywhere(peft.GraloraConfig, r=4, gralora_k=2, hybrid_r=2, alpha=6)),
    by_peft("vblora", everywhere(peft.VBLoRAConfig, r=3, num_vectors=12, vector_length=8, topk=2)),
    by_peft("tinylora", everywhere(peft.TinyLoraConfig, r=4, u=8)),
    by_peft("tinylora_tied", everywhere(peft.TinyLoraConfig, r=4, u=8, weight_tying=0.5)),
    by_peft("unilora", everywhere(peft.UniLoraConfig, r=3, theta_d_length=50), noise(3.0)),
    by_peft("unilora_saved", everywhere(peft.UniLoraConfig, r=3, theta_d_length=50, save_indices=True), noise(3.0)),
    by_peft("glora", plain(peft.GloraConfig, r=2)),
    by_peft("glora_vector", plain(peft.GloraConfig, config_A_B="vector", config_C="vector", config_D_E="vector")),
    # one number for all logits of gpt2's head would change no choice
    by_peft("glora_constant", plain(peft.GloraConfig, config_A_B="constant", config_C="none"), families=NO_GPT2),
    by_peft("deft", everywhere(peft.DeftConfig, r=4, alpha=6)),
    by_peft("para", everywhere(peft.DeftConfig, r=4, para=True, decomposition_method="qr")),
    by_peft("peanut", plain(peft.PeanutConfig, r=4, depth=2, act_fn="gelu")),
    by_peft("trainable_tokens", _tokens, noise(1.0)),
    by_peft("vera", everywhere(peft.VeraConfig, r=6, **SHARED), noise(1.0)),
    by_peft("pvera", everywhere(peft.PveraConfig, r=6, **SHARED), noise(1.0)),
    by_peft("randlora", everywhere(peft.RandLoraConfig, r=5, randlora_alpha=3, **SHARED), noise(0.3)),
    # no block divides the 101 outputs of gpt2's head
    by_peft("c3a", plain(peft.C3AConfig, block_size=8), noise(2.0), NO_GPT2),
    by_peft("fourierft", everywhere(peft.FourierFTConfig, n_frequency=30, scaling=100.0), noise(1.0)),
    by_peft("waveft", everywhere(peft.WaveFTConfig, n_frequency=60, scaling=2.0)),
    by_peft("waveft_direct", everywhere(peft.WaveFTConfig, n_frequency=60, scaling=2.0, use_idwt=False)),
    by_peft("oft", plain(peft.OFTConfig, oft_block_size=8), noise(0.1)),
    by_peft("oft_exact", plain(peft.OFTConfig, oft_block_size=8, use_cayley_neumann=False)),
    by_peft("boft", plain(peft.BOFTConfig, boft_block_size=4), noise(0.4, ["boft_s"])),
    by_peft("hira", everywhere(peft.HiraConfig, r=3)),
)
