"""What peft would load all the same, or fail on far away, is refused with the field and what was expected of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.adapters_store.conftest import sites
from tests.adapters_store.files import NUMPY, Files, P, Tensor
from tests.support.methods import peft_other, peft_weights
from tests.support.methods.case import LLAMA
from weft.adapters_store.compile import compile_adapter
from weft.adapters_store.errors import AdapterInvalid, AdapterTooLarge
from weft.adapters_store.files import CONFIG, WEIGHTS
from weft.adapters_store.formats import read_adapter

BY_NAME = {case.name: case for case in (*peft_other.CASES, *peft_weights.CASES)}
NAMES = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64"}
Q0, V0, D0 = (f"{P}model.layers.0.{at}" for at in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
# PEFT's copies of the shared bases under each module need not be there
OPTIONAL = ("proj.randlora_A", "proj.randlora_B")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of each case, as peft wrote them for the tiny llama."""
    found: dict[str, Files] = {}

    def files(name: str) -> Files:
        if name not in found:
            folder = BY_NAME[name].make(LLAMA, tmp_path_factory.mktemp(name), 1)
            tensors = {
                key: Tensor(tuple(value.shape), value.contiguous().numpy().tobytes(), NAMES[value.dtype])
                for key, value in load_file(folder / WEIGHTS).items()
            }
            found[name] = Files(json.loads((folder / CONFIG).read_text()), tensors)
        return found[name]

    return files


def register(files: Files, folder: Path, bytes_max: int = 1 << 30) -> None:
    """Parse and compile."""
    model = sites(LLAMA)
    compile_adapter(read_adapter(files.write(folder), model.info), model, model.geometry(), bytes_max)


def refusal(files: Files, folder: Path) -> AdapterInvalid:
    """How files are refused."""
    with pytest.raises(AdapterInvalid) as caught:
        register(files, folder)
    return caught.value


def named(files: Files) -> list[str]:
    """Tensors of the first layer's q_proj or of a norm, and those of no module."""
    return [name for name in files.tensors if not name.startswith(P) or "layers.1." not in name]


def changed(tensor: Tensor, change: Any) -> Tensor:
    """A tensor with other values."""
    types = {**NUMPY, "I32": np.int32, "I64": np.int64}
    values = np.frombuffer(tensor.data, types[tensor.dtype]).reshape(tensor.shape).copy()
    values = change(values)
    return Tensor(values.shape, values.tobytes(), tensor.dtype)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_tensor_must_be_there(name, made, tmp_path):
    files = made(name)
    for i, tensor in enumerate(named(files)):
        # a file without any tensor is refused before anybody asks for this one
        if tensor.endswith(OPTIONAL) or len(files.tensors) == 1:
            continue
        error = refusal(files.with_tensor(tensor, None), tmp_path / str(i))
        assert error.field == tensor
        assert "expected this tensor, got none" in error.message


@pytest.mark.parametrize("name", BY_NAME)
def test_every_shape_must_fit(name, made, tmp_path):
    files = made(name)
    for i, tensor in enumerate(named(files)):
        # modules use the first rows of it, however many there are
        if tensor.endswith(("base_model.vera_B", "base_model.pvera_B")):
            continue
        flat = files.tensors[tensor]
        longer = changed(flat, lambda values: np.concatenate([values, values[:1]]))
        error = refusal(files.with_tensor(tensor, longer), tmp_path / str(i))
        assert error.field in files.tensors
        # two factors of one matrix are judged by the matrix
        said = f"got {list(longer.shape)}", "expected factors of a"
        assert any(words in error.message for words in said) or error.field != tensor
        error = refusal(files.with_tensor(tensor, replace(flat, shape=(1, *flat.shape))), tmp_path / f"{i}_axis")
        assert error.field in files.tensors


@pytest.mark.parametrize("name", BY_NAME)
def test_every_value_must_be_finite(name, made, tmp_path):
    files = made(name)
    for i, tensor in enumerate(named(files)):
        if files.tensors[tensor].dtype != "F32":
            continue
        for word in ("nan", "inf"):
            broken = changed(files.tensors[tensor], lambda values, word=word: np.full_like(values, float(word)))
            error = refusal(files.with_tensor(tensor, broken), tmp_path / f"{i}_{word}")
            assert error.field in files.tensors
            assert "finite values" in error.message or "zeros" in error.message


@pytest.mark.parametrize("name", BY_NAME)
def test_tensors_of_other_modules_and_of_other_kinds_are_refused(name, made, tmp_path):
    files = made(name)
    tensor = next((tensor for tensor in files.tensors if tensor.startswith(P)), next(iter(files.tensors)))
    stranger = f"{P}model.layers.0.self_attn.k_proj.{tensor.rpartition('.')[2]}"
    if tensor.endswith(".weight"):
        stranger = f"{P}model.layers.0.self_attn.k_proj.{'.'.join(tensor.split('.')[-2:])}"
    assert refusal(files.with_tensor(stranger, files.tensors[tensor]), tmp_path / "module").field == stranger
    unknown = f"{Q0}.something"
    error = refusal(files.with_tensor(unknown, files.tensors[tensor]), tmp_path / "unknown")
    assert (error.field, "a name that ends in" in error.message) == (unknown, True)
    kind = "I32" if files.tensors[tensor].dtype == "F32" else "F32"
    error = refusal(files.with_tensor(tensor, replace(files.tensors[tensor], dtype=kind)), tmp_path / "dtype")
    assert (error.field, "expected dtype" in error.message or "bytes" in error.message) == (tensor, True)


@pytest.mark.parametrize("name", BY_NAME)
def test_settings_that_nobody_knows_are_refused(name, made, tmp_path):
    files = made(name)
    error = refusal(files.configured(secret_sauce=1), tmp_path / "unknown")
    assert (error.field, f"settings of {files.config['peft_type']}" in error.message) == ("secret_sauce", True)
    error = refusal(files.configured(task_type="SEQ_CLS"), tmp_path / "task")
    assert (error.field, "CAUSAL_LM" in error.message) == ("task_type", True)
    error = refusal(files.configured(target_modules=["c_attn"]), tmp_path / "targets")
    assert error.field == "target_modules"


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in ("ln_tuning", "trainable_tokens")])
def test_embeddings_and_norms_are_no_linears(name, made, tmp_path):
    files = made(name)
    for target in ("embed_tokens", "input_layernorm"):
        error = refusal(files.configured(target_modules=[*files.config["target_modules"], target]), tmp_path / target)
        assert (error.field, "linear modules only" in error.message) == ("target_modules", True)


def test_a_dense_form_must_fit_the_budget(made, tmp_path):
    files = made("oft")
    register(files, tmp_path / "fits", 40_000)
    with pytest.raises(AdapterTooLarge, match="device memory: expected a block of at most 20000 bytes"):
        register(files, tmp_path / "large", 20_000)


# case, settings, field, words
SETTINGS: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("ln_tuning", {"target_modules": ["q_proj"]}, "target_modules", "norms of this backbone (input_layernorm"),
    ("shira", {"r": 3}, f"{P}model.layers.0.self_attn.q_proj.shira_weight", "r is 3"),
    ("shira", {"r": 0}, "r", "at least 1"),
    ("supertuning", {"save_precomputed_indices": False}, "save_precomputed_indices", "not in the file"),
    ("supertuning", {"r": 2, "lora_alpha": 4}, f"{D0}.supertuning_lora_A.weight", "got none"),
    ("supra", {"lora_alpha": None}, "lora_alpha", "a number"),
    ("loha", {"r": 2}, f"{Q0}.hada_w1_a", "expected shape [32, 2], got [32, 3]"),
    ("loha", {"rank_pattern": {"q_proj": 2}}, f"{Q0}.hada_w1_a", "r is 2 here"),
    ("loha", {"alpha": -1}, "alpha", "from 0"),
    ("hra", {"r": 6}, f"{Q0}.hra_u", "expected shape [32, 6]"),
    ("hra", {"apply_GS": "yes"}, "apply_GS", "true or false"),
    ("delora", {"rank_pattern": {"q_proj": 2}}, f"{Q0}.delora_A", "r is 2 here"),
    ("miss", {"init_weights": "bat"}, "r", "a divisor of both sizes of model.layers.0.self_attn.q_proj"),
    ("miss_bat", {"init_weights": True}, f"{Q0}.miss_block", "expected shape [4, 32], got [8, 4, 4]"),
    ("miss_bat", {"r": 8}, f"{Q0}.miss_block", "expected shape [4, 8, 8]"),
    ("road", {"variant": "road_2"}, f"{Q0}.road_theta", "expected shape [32], got [16]"),
    ("road", {"variant": "road_3"}, "variant", "one of road_1, road_2, road_4"),
    ("road", {"group_size": 5}, "group_size", "an even number"),
    ("road", {"group_size": 12}, "group_size", "a divisor of the 32 outputs"),
    ("road", {"bias": "all"}, "bias", "RoAd rotates the bias"),
    ("miss", {"init_weights": "mini", "mini_r": 2}, f"{Q0}.miss_block", "mini_r 2"),
    ("miss_mini", {"init_weights": True}, f"{Q0}.miss_block", "expected shape [4, 32], got [4, 1]"),
    ("gralora", {"gralora_k": 3}, "gralora_k", "a divisor of r, which is 8"),
    ("gralora", {"gralora_k": 2}, f"{Q0}.gralora_A", "gralora_k 2"),
    ("gralora", {"hybrid_r": 2}, f"{D0}.gralora_A_general.weight", "got none"),
    ("gralora_hybrid", {"hybrid_r": 0}, f"{D0}.gralora_A_general.weight", "a name that ends in"),
    ("vblora", {"topk": 13}, "topk", "at most the 12 vectors"),
    ("vblora", {"vector_length": 5}, "base_model.vblora_vector_bank", "expected shape [12, 5]"),
    ("vblora", {"save_only_topk_weights": True}, f"{D0}.vblora_logits_A", "a name that ends in"),
    ("tinylora", {"save_projection": False}, f"{D0}.tinylora_P", "a name that ends in"),
    ("tinylora", {"save_projection": False, "projection_seed": None}, "projection_seed", "an integer"),
    ("tinylora", {"weight_tying": 1.5}, "weight_tying", "from 0 to 1"),
    ("tinylora", {"weight_tying": 0.5}, "base_model.tinylora_v.3", "begins with"),
    ("tinylora_tied", {"weight_tying": 0.0}, "base_model.tinylora_v.3", "modules share it"),
    ("unilora", {"theta_d_length": 49}, "base_model.unilora_theta_d", "theta_d_length is 49"),
    ("unilora", {"save_indices": True}, f"{D0}.unilora_indices_A", "got none"),
    ("unilora", {"proj_seed": -1}, "proj_seed", "at least 0"),
    ("glora", {"config_A_B": "vector"}, f"{Q0}.glora_A.X", "glora_A is vector here"),
    ("glora_vector", {"config_A_B": "lora"}, f"{Q0}.glora_A.Xd", "glora_A is lora here"),
    ("glora", {"config_C": "constant"}, "config_C", "one of lora, vector, none"),
    ("glora", {"bias": "all"}, "bias", "read the bias that it would replace"),
    ("deft", {"para": True}, f"{D0}.deft_R", "a name that ends in"),
    ("para", {"para": False}, f"{D0}.deft_R", "got none"),
    ("deft", {"decomposition_method": "svd"}, "decomposition_method", "one of relu, qr"),
    ("peanut", {"act_fn": "quick_gelu"}, "act_fn", "one of relu"),
    ("peanut", {"depth": 1}, f"{D0}.peanut_decoders.1.weight", "a name that ends in"),
    ("peanut", {"depth": 100}, "depth", "at most 64"),
    ("trainable_tokens", {"token_indices": []}, "token_indices", "stand once each"),
    ("trainable_tokens", {"token_indices": [1, 1]}, "token_indices", "stand once each"),
    ("trainable_tokens", {"token_indices": [1, 101]}, "token_indices", "from 0 to 100"),
    ("trainable_tokens", {"token_indices": [1, -1]}, "token_indices", "at least 0"),
    ("trainable_tokens", {"token_indices": [1]}, f"{P}model.embed_tokens.trainable_tokens_delta", "lists 1"),
    ("trainable_tokens", {"target_modules": ["q_proj"]}, "target_modules", "or an output head"),
    ("vera", {"save_projection": False}, "base_model.vera_A", "begins with"),
    ("vera", {"save_projection": False, "projection_prng_key": None}, "projection_prng_key", "an integer"),
    ("vera", {"r": 5}, "base_model.vera_A", "expected shape [5, 48 or more], got [6, 48]"),
    ("pvera", {"sample_at_inference": True}, "sample_at_inference", "drawn anew"),
    ("randlora", {"save_projection": False}, f"{D0}.randlora_A", "a name that ends in"),
    ("randlora", {"save_projection": False, "projection_prng_key": None}, "projection_prng_key", "an integer"),
    ("randlora", {"r": 4}, "base_model.randlora_B", "or more"),
    ("fourierft", {"random_loc_seed": None}, "random_loc_seed", "an integer"),
    ("fourierft", {"scaling": "x"}, "scaling", "a number"),
    ("waveft", {"wavelet_family": "db2"}, "wavelet_family", "other wavelets"),
    ("fourierft", {"n_frequency": 31}, f"{Q0}.fourierft_spectrum", "1024 elements, 31, got [30]"),
    ("waveft", {"n_frequency": 61}, f"{Q0}.waveft_spectrum", "1024 elements, 61, got [60]"),
    ("c3a", {"block_size": 16}, f"{Q0}.c3a_kernel", "[32/b, 32/b, b] for b = 16, got [4, 4, 8]"),
    ("boft", {"boft_block_size": 8}, f"{Q0}.boft_R", "expected shape [1, 4, 8, 8]"),
    ("boft", {"boft_block_num": 8}, "boft_block_num", "either this or boft_block_size"),
    ("boft", {"boft_block_size": 5}, "boft_block_size", "blocks that divide the 32 inputs"),
    ("oft", {"block_share": True}, f"{Q0}.oft_R.weight", "expected shape [1, 28]"),
    ("oft", {"oft_block_size": 16}, f"{Q0}.oft_R.weight", "expected shape [2, 120]"),
    ("oft", {"r": 4}, "r", "either this or oft_block_size"),
    ("oft", {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms", "at least 1"),
    ("hira", {"r": 4}, f"{Q0}.hira_A", "r is 4"),
    ("hra", {"bias": "some"}, "bias", "hra_only"),
    ("hra", {"modules_to_save": ["mlp"]}, "modules_to_save", "the output head"),
)


@pytest.mark.parametrize(("name", "settings", "field", "words"), SETTINGS)
def test_settings_that_the_tensors_or_the_maths_deny_are_refused(name, settings, field, words, made, tmp_path):
    error = refusal(made(name).configured(**settings), tmp_path)
    assert words in error.message
    assert error.field == field
    assert len(error.message) < 1200


def _put(index: int, value: int):
    def change(values: Any) -> Any:
        values.reshape(-1)[index] = value
        return values

    return change


# case, tensor, change of its values, words
VALUES = (
    ("shira", f"{Q0}.shira_indices", _put(0, 32), "indices from 0 to 1023"),
    ("shira", f"{Q0}.shira_indices", _put(-1, 32), "columns from 0 to 31, got 32"),
    ("shira", f"{Q0}.shira_indices", _put(-1, -1), "columns from 0 to 31, got -1"),
    ("shira", f"{Q0}.shira_indices", lambda values: np.zeros_like(values), "each once"),
    ("supertuning", f"{Q0}.supertuning_indices", _put(3, 1024), "indices from 0 to 1023, got 1024"),
    ("supertuning", f"{Q0}.supertuning_indices", lambda values: np.zeros_like(values), "each once"),
    ("unilora_saved", f"{V0}.unilora_indices_A", _put(3, 50), "indices from 0 to 49, got 50"),
    ("unilora_saved", f"{V0}.unilora_indices_B", _put(3, -1), "indices from 0 to 49, got -1"),
    ("hra", f"{Q0}.hra_u", lambda values: values * 0, "values that the method's formula can use"),
    ("hra_orthogonal", f"{Q0}.hra_u", lambda values: values * 0, "values that the method's formula can use"),
    ("glora", f"{Q0}.glora_E.zeros", _put(0, 1), "zeros: the settings say that there is nothing"),
    ("randlora", f"{Q0}.randlora_A", lambda values: values + 1, "a copy of base_model.randlora_A"),
)


@pytest.mark.parametrize(("name", "tensor", "change", "words"), VALUES)
def test_values_that_no_formula_can_use_are_refused(name, tensor, change, words, made, tmp_path):
    files = made(name)
    error = refusal(files.with_tensor(tensor, changed(files.tensors[tensor], change)), tmp_path)
    assert words in error.message
    assert error.field == tensor


def test_a_butterfly_of_several_factors_is_refused(made, tmp_path):
    files = made("boft")
    blocks = f"{Q0}.boft_R"
    doubled = changed(files.tensors[blocks], lambda values: np.concatenate([values, values]))
    error = refusal(files.with_tensor(blocks, doubled), tmp_path)
    assert (error.field, "CUDA extension" in error.message) == (blocks, True)
