"""Compiling: one rounding, nothing that overflows, and a proof that catches a fold that is wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.adapters_store.files import HIDDEN, Q0, RANK, VALID, Files, Tensor, filled, lora
from tests.adapters_store.peft_models import ModelSites, sites_of
from weft.adapters_store import fold
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.errors import AdapterInvalid, StoreBug
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.operators import ParsedAdapter, SiteOperators, Sparse
from weft.adapters_store.sites import CatalogueInfo
from weft.adapters_store.tensor_refs import TensorRef
from weft.kernels.layout import pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Shapes:
    """A catalogue of shapes alone."""

    def __init__(self, info: CatalogueInfo) -> None:
        self.info = info

    def parameter(self, path: str) -> torch.Tensor | None:
        """Nothing is read."""
        raise AssertionError(path)


def parse(files: Files, llama: ModelSites, folder) -> ParsedAdapter:
    """Hand-written files, judged."""
    return read_adapter(files.write(folder), llama.info)


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_a_block_is_known_before_it_is_made(kind, dtype, llama, tmp_path):
    parsed = parse(VALID[kind](), llama, tmp_path)
    image, report = compile_adapter(parsed, llama, llama.geometry(dtype), 1 << 30)
    assert block_bytes(parsed, llama.geometry(dtype), llama) == image.numel() == report.device_bytes


def test_entries_beyond_32_bits_are_refused_before_anything_is_read(llama):
    path = llama.info.sites[0].path
    large = replace(llama.info.sites[0], in_features=1 << 15, out_features=1 << 16)
    entries = (TensorRef(name, (4,), dtype, 0, 16) for name, dtype in (("index", "I64"), ("values", "F32")))
    parsed = ParsedAdapter("X_SPARSE", "native", {path: SiteOperators((Sparse(*entries),))})
    with pytest.raises(AdapterInvalid, match="index: expected indices into at most 2147483647 places, got 2147483648"):
        compile_adapter(parsed, Shapes(replace(llama.info, sites=(large,))), llama.geometry(), 1 << 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_are_rounded_once_and_only_once(dtype, llama, tmp_path):
    files = lora().configured(lora_alpha=5)
    image, report = compile_adapter(parse(files, llama, tmp_path), llama, llama.geometry(dtype), 1 << 30)
    a, b = (torch.frombuffer(bytearray(files.tensors[f"{Q0}.lora_{w}.weight"].data), dtype=torch.float32) for w in "AB")
    terms = unpack(llama.geometry(dtype), image)[llama.info.index["model.layers.0.self_attn.q_proj"]]
    assert terms.low_rank is not None
    assert torch.equal(terms.low_rank[0], a.view(RANK, HIDDEN).to(dtype))
    assert torch.equal(terms.low_rank[1], (b * (5 / RANK)).view(HIDDEN, RANK).to(dtype))
    name = str(dtype).removeprefix("torch.")
    wanted = () if dtype == torch.float32 else (f"float32 factors rounded once to {name}",)
    assert report.notes == wanted


def test_scales_near_one_stay_in_fp32(llama, tmp_path):
    files = VALID["ia3"]()
    image, _ = compile_adapter(parse(files, llama, tmp_path), llama, llama.geometry(torch.bfloat16), 1 << 30)
    terms = unpack(llama.geometry(torch.bfloat16), image)[llama.info.index["model.layers.0.self_attn.k_proj"]]
    data = files.tensors["base_model.model.model.layers.0.self_attn.k_proj.ia3_l"].data
    assert terms.sigma is not None
    assert torch.equal(terms.sigma, torch.frombuffer(bytearray(data), dtype=torch.float32))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_files_are_read_as_they_are(dtype, llama, tmp_path):
    torch_dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    values = torch.randn(RANK, HIDDEN).to(torch_dtype)
    tensor = Tensor((RANK, HIDDEN), values.view(torch.uint8).numpy().tobytes(), dtype)
    parsed = parse(lora().with_tensor(f"{Q0}.lora_A.weight", tensor), llama, tmp_path)
    image, _ = compile_adapter(parsed, llama, llama.geometry(), 1 << 30)
    terms = unpack(llama.geometry(), image)[llama.info.index["model.layers.0.self_attn.q_proj"]]
    assert terms.low_rank is not None
    assert torch.equal(terms.low_rank[0], values.float())


def test_data_that_is_not_aligned_is_read_alike(llama, tmp_path):
    files = lora()
    config, weights = files.encode()
    length = int.from_bytes(weights[:8], "little")
    for pad in range(1, 4):
        shifted = (length + pad).to_bytes(8, "little") + weights[8 : 8 + length] + b" " * pad + weights[8 + length :]
        parsed = parse(replace(files, config_bytes=config, weights_bytes=shifted), llama, tmp_path)
        compile_adapter(parsed, llama, llama.geometry(), 1 << 30)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, 40_000.0), (torch.bfloat16, 1.699e38)], ids=["float16", "bfloat16"]
)
def test_a_value_that_overflows_on_rounding_is_refused(dtype, value, llama, tmp_path):
    name = f"{Q0}.lora_B.weight"
    sparse = np.zeros((HIDDEN, RANK), np.float32)
    sparse[3, 1] = value
    files = lora().with_tensor(name, Tensor(sparse.shape, sparse.tobytes()))
    files = files.with_tensor(f"{Q0}.lora_A.weight", filled((RANK, HIDDEN), 1e-3))
    compile_adapter(parse(files, llama, tmp_path), llama, llama.geometry(), 1 << 30)
    with pytest.raises(AdapterInvalid, match=r"can hold .* with the scale folded in") as refusal:
        compile_adapter(parse(files, llama, tmp_path), llama, llama.geometry(dtype), 1 << 30)
    assert refusal.value.field == name


def test_scales_that_round_bf16_factors_are_reported(llama, tmp_path):
    files = lora()
    for name, tensor in files.tensors.items():
        values = torch.frombuffer(bytearray(tensor.data), dtype=torch.float32).bfloat16()
        files = files.with_tensor(name, Tensor(tensor.shape, values.view(torch.uint8).numpy().tobytes(), "BF16"))
    for alpha, notes in ((8, ()), (6, ("scales folded into bfloat16 factors, rounded once",))):
        parsed = parse(files.configured(lora_alpha=alpha), llama, tmp_path / str(alpha))
        _, report = compile_adapter(parsed, llama, llama.geometry(torch.bfloat16), 1 << 30)
        assert report.notes == notes


def test_unusually_large_values_are_reported(llama, tmp_path):
    files = lora().with_tensor(f"{Q0}.lora_B.weight", filled((HIDDEN, RANK), 1e30))
    _, report = compile_adapter(parse(files, llama, tmp_path), llama, llama.geometry(), 1 << 30)
    assert report.notes == (f"{Q0}.lora_B.weight holds values up to 1e+30, which is unusual",)


@pytest.mark.parametrize("kind", VALID)
def test_a_fold_that_is_wrong_is_caught(kind, llama, tmp_path, monkeypatch):
    right = fold.fold_site

    def wrong(*arguments):
        folded = right(*arguments)
        folded.pairs = [(a, b * 1.001) for a, b in folded.pairs]
        folded.krons = [(w1, w2.flip(0)) for w1, w2 in folded.krons]
        folded.sigma = None if folded.sigma is None else folded.sigma + 1e-3
        folded.sigma_in = None
        return folded

    monkeypatch.setattr("weft.adapters_store.compile.fold_site", wrong)
    with pytest.raises(StoreBug):
        compile_adapter(parse(VALID[kind](), llama, tmp_path), llama, llama.geometry(), 1 << 30)


def test_an_image_that_does_not_hold_what_was_packed_is_caught(llama, tmp_path, monkeypatch):
    def wrong(*arguments):
        image = pack(*arguments)
        image[-300] ^= 1
        return image

    monkeypatch.setattr("weft.adapters_store.compile.pack", wrong)
    with pytest.raises(StoreBug, match="does not hold what was packed"):
        compile_adapter(parse(lora(), llama, tmp_path), llama, llama.geometry(), 1 << 30)


def test_the_same_bytes_compile_to_the_same_bytes(llama, tmp_path):
    images = [compile_adapter(parse(lora(), llama, tmp_path), llama, llama.geometry(), 1 << 30)[0] for _ in range(2)]
    assert torch.equal(*images)


def test_groups_and_sites_follow_the_backbone(llama):
    assert sites_of(llama.model).info == llama.info
    assert sum(llama.info.groups) == len(llama.info.sites)
