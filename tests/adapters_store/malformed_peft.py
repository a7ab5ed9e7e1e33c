"""Variants of PEFT's LORA, and ADALORA, that must be refused: id, files, field of the refusal, words of its message."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tests.adapters_store.files import HIDDEN, KV, LAYERS, Q0, RANK, V1, Files, P, Tensor, filled, lora, noise

VOCABULARY = 101
EMBEDDING, HEAD, NORM = f"{P}model.embed_tokens", f"{P}lm_head", f"{P}model.norm"
SITES = tuple(f"{P}model.layers.{layer}.self_attn.{name}" for layer in range(LAYERS) for name in ("q_proj", "v_proj"))

Case = tuple[str, Files, str, str]


def adalora(rank: int = RANK) -> Files:
    """ADALORA on q_proj, nothing pruned."""
    config = {"peft_type": "ADALORA", "init_r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    tensors: dict[str, Tensor] = {}
    for i, site in enumerate(site for site in SITES if site.endswith("q_proj")):
        shapes = {"lora_A": (rank, HIDDEN), "lora_B": (HIDDEN, rank), "lora_E": (rank, 1)}
        tensors |= {f"{site}.{name}": noise(shape, i) for name, shape in shapes.items()}
    return Files(config, tensors)


def dora() -> Files:
    """LORA with magnitudes."""
    files = lora().configured(use_dora=True)
    for site in SITES:
        files = files.with_tensor(f"{site}.lora_magnitude_vector", noise((HIDDEN if "q_proj" in site else KV,)))
    return files


def embedded() -> Files:
    """LORA of the input embedding too."""
    files = lora().configured(target_modules=["q_proj", "v_proj", "embed_tokens"])
    files = files.with_tensor(f"{EMBEDDING}.lora_embedding_A", noise((RANK, VOCABULARY)))
    return files.with_tensor(f"{EMBEDDING}.lora_embedding_B", noise((HIDDEN, RANK)))


def saved(**shapes: tuple[int, ...]) -> Files:
    """LORA with modules saved whole: lm_head, norm, embed_tokens, each with this shape of its weight."""
    paths = {"lm_head": HEAD, "norm": NORM, "embed_tokens": EMBEDDING}
    files = lora().configured(modules_to_save=["model.norm" if name == "norm" else name for name in shapes])
    for name, shape in shapes.items():
        files = files.with_tensor(f"{paths[name]}.weight", noise(shape))
    return files


def tokens(ids: list[int], rows: int | None = None) -> Files:
    """LORA with rows of the embedding replaced."""
    files = lora().configured(trainable_token_indices=ids)
    name = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
    return files.with_tensor(name, noise((len(ids) if rows is None else rows, HIDDEN)))


def settings() -> Iterator[tuple[str, Mapping[str, Any], str, str]]:
    """Settings on top of a plain LORA: id, settings, field, words."""
    magnitude = f"{Q0}.lora_magnitude_vector"
    yield "dora_without_magnitudes", {"use_dora": True}, magnitude, "3 more are missing"
    yield "dora_text", {"use_dora": "false"}, "use_dora", 'got "false"'
    yield "dora_and_bias", {"use_dora": True, "lora_bias": True}, "lora_bias", "none with use_dora"
    yield "qalora_no_group", {"use_qalora": True}, "qalora_group_size", "got none"
    yield "qalora_group_1", {"use_qalora": True, "qalora_group_size": 1}, "qalora_group_size", "at least 2"
    yield "qalora_and_dora", {"use_qalora": True, "use_dora": True}, "use_qalora", "together with use_dora"
    yield "bdlora_not_said", {"use_bdlora": {"nblocks": 2, "match_strict": True}}, "target_modules_bd_a", "match_strict"
    yield "bdlora_no_blocks", {"use_bdlora": {}}, "nblocks", "got none"
    twice = {"nblocks": 2, "target_modules_bd_a": ["q_"], "target_modules_bd_b": ["proj"]}
    yield "bdlora_both", {"use_bdlora": twice}, "target_modules_bd_a", "other modules than target_modules_bd_b"
    yield "bdlora_key", {"use_bdlora": {"nblocks": 2, "seed": 1}}, "seed", "settings of use_bdlora"
    whole = {"nblocks": 2, "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"]}
    yield "bdlora_whole_factor", {"use_bdlora": whole}, f"{Q0}.lora_A.weight", "expected shape [4, 16], got [4, 32]"
    odd = {"nblocks": 3, "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"]}
    yield "bdlora_odd", {"use_bdlora": odd}, "nblocks", "a divisor of r"
    yield "kasa_without_diagonal", {"kasa_config": {"beta": 1}}, f"{Q0}.lora_diag", "got none"
    yield "kasa_and_dora", {"kasa_config": {}, "use_dora": True}, "kasa_config", "together with use_dora"
    yield "kasa_list", {"kasa_config": [1]}, "kasa_config", "an object"
    yield "arrow", {"arrow_config": {"top_k": 2}}, "arrow_config", "routing"
    yield "alora_token", {"alora_invocation_tokens": [1, 101]}, "alora_invocation_tokens", "token ids below 101"
    yield "alora_text", {"alora_invocation_tokens": "go"}, "alora_invocation_tokens", "an integer"
    alora = {"alora_invocation_tokens": [1, 2], "modules_to_save": ["lm_head"]}
    yield "alora_and_head", alora, "alora_invocation_tokens", "before the invocation too"
    yield "alora_and_dora", {"alora_invocation_tokens": [1], "use_dora": True}, "alora_invocation_tokens", "use_dora"
    yield "parameters", {"target_parameters": ["experts.up"]}, "target_parameters", "has no experts"
    yield "replication", {"layer_replication": [[0, 10**6]]}, "layer_replication", "layers"
    for init in ("pissa_niter_4", "pissa_niter_1000000", "corda", "lora_ga", "something"):
        yield (
            f"init_{init}",
            {"init_lora_weights": init},
            "init_lora_weights",
            "path_initial_model_for_weight_conversion",
        )
    yield "init_loftq", {"init_lora_weights": "loftq"}, "init_lora_weights", "serve those"
    yield "init_number", {"init_lora_weights": 1}, "init_lora_weights", "true, false or a name"
    pissa_alora = {"init_lora_weights": "pissa", "alora_invocation_tokens": [1]}
    yield "init_beside_variant", pissa_alora, "init_lora_weights", "beside alora_invocation_tokens"
    yield "init_and_bias", {"init_lora_weights": "pissa", "lora_bias": True}, "lora_bias", "none with pissa"
    yield "saved_missing", {"modules_to_save": ["lm_head"]}, f"{HEAD}.weight", "modules_to_save names its module"
    yield "saved_text", {"modules_to_save": "lm_head"}, "modules_to_save", "a list of names"
    yield "saved_other_task", {"modules_to_save": ["score"]}, "modules_to_save", "heads of other tasks"
    yield "saved_linear", {"modules_to_save": ["k_proj"]}, "modules_to_save", "the output head, the input embedding"
    # any ending will do in PEFT
    yield "saved_ending", {"modules_to_save": ["oj"]}, "modules_to_save", "down_proj"
    target = {"modules_to_save": ["head"], "target_modules": ["q_proj", "v_proj", "lm_head"]}
    yield "saved_target", target, "modules_to_save", "that target_modules does not name"
    yield "tokens_missing", {"trainable_token_indices": [1]}, TOKENS, "trainable_token_indices names its module"
    yield "tokens_text", {"trainable_token_indices": "all"}, "trainable_token_indices", "a list of integers"
    yield "tokens_twice", {"trainable_token_indices": [1, 1]}, "trainable_token_indices", "once each"
    yield "tokens_beyond", {"trainable_token_indices": [101]}, "trainable_token_indices", "0 to 100"
    yield "tokens_elsewhere", {"trainable_token_indices": {"q_proj": [1]}}, "trainable_token_indices", "embed_tokens or"
    both = {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}
    yield "tokens_of_saved", both, "trainable_token_indices", "that modules_to_save does not name"
    yield (
        "targets_norm",
        {"target_modules": ["q_proj", "norm"]},
        "target_modules",
        "linear modules or the input embedding",
    )


TOKENS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"


def tensors() -> Iterator[Case]:
    """Tensors of variants."""
    magnitude = f"{V1}.lora_magnitude_vector"
    yield "dora_size", dora().with_tensor(magnitude, noise((HIDDEN,))), magnitude, "expected shape [16]"
    yield "dora_one_missing", dora().with_tensor(magnitude, None), magnitude, "got none"
    yield "dora_unasked", dora().configured(use_dora=False), f"{Q0}.lora_magnitude_vector", "use_dora is false"
    yield "dora_nan", dora().with_tensor(magnitude, filled((KV,), float("nan"))), magnitude, "finite values"
    qalora = lora().configured(use_qalora=True, qalora_group_size=5)
    yield "qalora_group", qalora.with_tensor(f"{Q0}.lora_A.weight", noise((RANK, 6))), "qalora_group_size", "a divisor"
    qalora = qalora.configured(qalora_group_size=8).with_tensor(f"{Q0}.lora_A.weight", noise((RANK, 6)))
    yield "qalora_shape", qalora, f"{Q0}.lora_A.weight", "expected shape [4, 4], got [4, 6]"
    yield "start_above_rank", lora(20).configured(init_lora_weights="pissa"), "r", "takes that many components"
    kasa = lora(KV).configured(kasa_config={})
    for site in SITES:
        kasa = kasa.with_tensor(f"{site}.lora_diag", noise((KV,)))
    yield "kasa_all_components", kasa, "r", "expected at most 15, got 16"
    a, b = f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B"
    yield "embedding_resized", embedded().with_tensor(a, noise((RANK, 128))), a, "has 101 rows of 32"
    yield "embedding_transposed", embedded().with_tensor(b, noise((RANK, HIDDEN))), b, "expected shape [32, 4]"
    yield "embedding_half", embedded().with_tensor(b, None), b, "got none"
    plain = embedded().configured(target_modules=["q_proj", "v_proj"])
    yield "embedding_unasked", plain, a, "target_modules names no input embedding"
    yield "embedding_bias", embedded().configured(lora_bias=True), "target_modules", "no lora_bias for embeddings"
    yield "embedding_start", embedded().configured(init_lora_weights="olora"), "target_modules", "no olora for"
    invoked = embedded().configured(alora_invocation_tokens=[1])
    yield "embedding_alora", invoked, "target_modules", "no alora_invocation_tokens for embeddings"
    yield "embedding_and_tokens", embedded().configured(trainable_token_indices=[3]), "trainable_token_indices", "LoRA"
    copy = f"{EMBEDDING}.base_layer.weight"
    changed = embedded().with_tensor(copy, noise((VOCABULARY, HIDDEN)))
    yield "embedding_copy_changed", changed, copy, "equal bit for bit"
    yield "saved_resized", saved(lm_head=(128, HIDDEN)), f"{HEAD}.weight", "resized vocabulary"
    yield "saved_embedding_resized", saved(embed_tokens=(128, HIDDEN)), f"{EMBEDDING}.weight", "resized vocabulary"
    yield "saved_norm_size", saved(norm=(KV,)), f"{NORM}.weight", "expected shape [32]"
    norm_bias = f"{NORM}.bias"
    biased = saved(norm=(HIDDEN,)).with_tensor(norm_bias, noise((HIDDEN,)))
    yield "saved_norm_bias", biased, norm_bias, "a bias of the backbone to replace"
    again = f"{NORM}.original_module.bias"
    yield "bias_again_unasked", lora().with_tensor(again, noise((HIDDEN,))), again, "modules_to_save"
    unsaved = saved(norm=(HIDDEN,)).configured(modules_to_save=None)
    yield "saved_unasked", unsaved, f"{NORM}.weight", "equal bit for bit"
    yield "tokens_rows", tokens([5, 9], 3), TOKENS, "lists 2 tokens"
    yield "tokens_unasked", tokens([5]).configured(trainable_token_indices=None), TOKENS, "does not name its module"
    yield (
        "velora_unasked",
        lora().with_tensor(f"{Q0}.lora_velora_embed", noise((1,))),
        f"{Q0}.lora_velora_embed",
        "null",
    )
    empty = lora().with_tensor(f"{Q0}.lora_A.weight", Tensor((0, HIDDEN), b""))
    yield "rank_0", empty, f"{Q0}.lora_A.weight", "each at least 1, got [0, 32]"


def pruned() -> Iterator[Case]:
    """ADALORA."""
    a, e = f"{Q0}.lora_A", f"{Q0}.lora_E"
    yield "no_init_r", adalora().configured(init_r=...), "init_r", "got none"
    yield "rank", adalora().configured(init_r=5), a, "rank 5 is left here"
    yield "no_values", adalora().with_tensor(e, None), e, "got none"
    yield "value_shape", adalora().with_tensor(e, noise((RANK,))), e, "expected shape [4, 1]"
    name = Q0.removeprefix(P)
    kept = {f"{name}.lora_E": [True, False, True, True]}
    yield "rank_left", adalora().configured(rank_pattern=kept), a, "rank 3 is left here"
    yield "pattern_length", adalora().configured(rank_pattern={f"{name}.lora_E": [True]}), "rank_pattern", "4 ranks"
    yield "pattern_numbers", adalora().configured(rank_pattern={name: [1, 0]}), "rank_pattern", "true or false"
    stranger = {"model.layers.0.mlp.up_proj.lora_E": [True] * RANK}
    yield "pattern_name", adalora().configured(rank_pattern=stranger), "rank_pattern", "targeted modules"
    yield "alpha_0", adalora().configured(rank_pattern=kept, lora_alpha=0), "lora_alpha", "a number above 0"
    yield "dora", adalora().configured(use_dora=True), "use_dora", "no AdaLoRA with it"
    yield "embedding", adalora().configured(target_modules=["embed_tokens"]), "target_modules", "linear modules only"
    yield "unknown", adalora().configured(secret_sauce=1), "secret_sauce", "settings of ADALORA"
    wrong = replace(adalora(), tensors={f"{n}.weight": t for n, t in adalora().tensors.items()})
    yield "names_of_lora", wrong, f"{a}.weight", "a name that ends in"


def broken_variants() -> Iterator[Case]:
    """All of the above, with ids of their own."""
    for name, said, field, words in settings():
        yield f"variant_{name}", lora().configured(**said), field, words
    for name, files, field, words in tensors():
        yield f"variant_{name}", files, field, words
    for name, files, field, words in pruned():
        yield f"adalora_{name}", files, field, words
