"""Adapters of PEFT's other methods, made by peft, compute what peft computes: layer by layer, in fp32."""

import peft
import pytest
import torch
from torch import Tensor

from tests.adapters_store.conftest import sites
from tests.adapters_store.folded import Folded
from tests.support.methods import peft_other, peft_weights
from tests.support.methods.case import GPT2, LLAMA, Case, WholePass, by_peft, noise
from tests.support.methods.peft_other import everywhere, linears, plain
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.formats import read_adapter

CASES = (*peft_other.CASES, *peft_weights.CASES)
TOKENS = 5
TOLERANCE = 2e-6

DRAWN = {"projection_prng_key": 11, "save_projection": False}
# settings that the whole model need not repeat
VARIANTS: tuple[Case, ...] = (
    by_peft("loha_patterns", lambda _: peft.LoHaConfig(
        r=2, alpha=3, target_modules=linears(LLAMA), rank_pattern={"q_proj": 4}, alpha_pattern={"0.mlp.down_proj": 7}
    ), families=(LLAMA,)),
    by_peft("loha_above_width", plain(peft.LoHaConfig, r=8), families=(LLAMA,)),
    by_peft("delora_patterns", lambda _: peft.DeloraConfig(
        r=3, target_modules=linears(LLAMA), rank_pattern={"v_proj": 5}, lambda_pattern={"v_proj": 9}
    ), noise(0.6, ["delora_lambda"]), families=(LLAMA,)),
    by_peft("hra_layers", plain(peft.HRAConfig, r=2, layers_to_transform=[1]), families=(LLAMA,)),
    by_peft("hra_odd", plain(peft.HRAConfig, r=1), families=(LLAMA,)),
    by_peft("miss_above_width", plain(peft.MissConfig, r=32), families=(LLAMA,)),
    by_peft("miss_random", plain(peft.MissConfig, r=4, init_weights=False), families=(LLAMA,)),
    by_peft("miss_mini_8", plain(peft.MissConfig, r=4, mini_r=8, init_weights="mini"), families=(LLAMA,)),
    by_peft("gralora_one_block", everywhere(peft.GraloraConfig, r=4, gralora_k=1, alpha=6), families=(GPT2,)),
    by_peft("vblora_topk", everywhere(
        peft.VBLoRAConfig, r=3, num_vectors=12, vector_length=8, topk=3, save_only_topk_weights=True
    ), families=(LLAMA, GPT2)),
    by_peft("vblora_topk_of_many", everywhere(
        peft.VBLoRAConfig, r=3, num_vectors=300, vector_length=16, topk=2, save_only_topk_weights=True
    ), families=(LLAMA, GPT2)),
    by_peft("vblora_top1", everywhere(
        peft.VBLoRAConfig, r=2, num_vectors=12, vector_length=8, topk=1, save_only_topk_weights=True
    ), families=(LLAMA,)),
    by_peft("tinylora_one_group", everywhere(peft.TinyLoraConfig, r=40, u=4, weight_tying=1.0), families=(LLAMA,)),
    by_peft("tinylora_uneven", everywhere(peft.TinyLoraConfig, r=2, u=4, weight_tying=0.3), families=(LLAMA, GPT2)),
    by_peft("unilora_few_uses", everywhere(peft.UniLoraConfig, r=1, theta_d_length=5000), noise(3.0), (LLAMA,)),
    by_peft("deft_unscaled", plain(peft.DeftConfig, r=40, decomposition_method="qr"), families=(LLAMA,)),
    by_peft("para_relu", everywhere(peft.DeftConfig, r=3, para=True), families=(LLAMA, GPT2)),
    by_peft("peanut_flat", plain(peft.PeanutConfig, r=4, act_fn="tanh", scaling=-0.5), families=(LLAMA,)),
    by_peft("c3a_patterns", plain(
        peft.C3AConfig, block_size=8, block_size_pattern={"v_proj": 16}, init_weights=True
    ), noise(2.0), (LLAMA,)),
    by_peft("fourierft_patterns", everywhere(
        peft.FourierFTConfig, n_frequency=20, n_frequency_pattern={"q_proj": 50}, random_loc_seed=5
    ), noise(1.0), (LLAMA,)),
    by_peft("waveft_proportional", everywhere(
        peft.WaveFTConfig, n_frequency=60, scaling=2.0, proportional_parameters=True
    ), families=(LLAMA,)),
    by_peft("oft_shared", plain(peft.OFTConfig, oft_block_size=16, block_share=True), noise(0.1), (LLAMA,)),
    by_peft("oft_terms", plain(peft.OFTConfig, oft_block_size=8, num_cayley_neumann_terms=3), noise(0.1), (LLAMA,)),
    by_peft("oft_constrained", plain(peft.OFTConfig, r=4, oft_block_size=0, coft=True, eps=0.5), families=(LLAMA,)),
    by_peft("oft_adjusted", plain(peft.OFTConfig, oft_block_size=7), noise(0.1), (LLAMA,)),
    by_peft("hira_patterns", lambda _: peft.HiraConfig(
        r=3, target_modules=linears(LLAMA), rank_pattern={"v_proj": 5}
    ), families=(LLAMA,)),
    by_peft("randlora_whole", everywhere(peft.RandLoraConfig, r=8, randlora_alpha=3, sparse=True), noise(0.3),
        (LLAMA, GPT2)),
    by_peft("road_2", plain(peft.RoadConfig, variant="road_2", group_size=8), families=(LLAMA,)),
    by_peft("road_4", plain(peft.RoadConfig, variant="road_4", group_size=4), families=(LLAMA, "opt")),
    # what the file does not hold is drawn again
    by_peft("vera_drawn", everywhere(peft.VeraConfig, r=6, **DRAWN), noise(1.0), (LLAMA, GPT2)),
    by_peft("pvera_drawn", everywhere(peft.PveraConfig, r=6, **DRAWN), noise(1.0), (LLAMA, GPT2)),
    by_peft("randlora_drawn", everywhere(peft.RandLoraConfig, r=5, randlora_alpha=3, **DRAWN), noise(0.3),
        (LLAMA, GPT2)),
    by_peft("randlora_sparse", everywhere(peft.RandLoraConfig, r=5, randlora_alpha=3, sparse=True, **DRAWN),
        noise(0.3), (LLAMA,)),
    by_peft("randlora_very_sparse", everywhere(peft.RandLoraConfig, r=5, randlora_alpha=3, very_sparse=True, **DRAWN),
        noise(0.3), (LLAMA,)),
    by_peft("tinylora_drawn", everywhere(
        peft.TinyLoraConfig, r=4, u=8, projection_seed=11, save_projection=False
    ), families=(LLAMA, GPT2)),
)  # fmt: skip
PAIRS = [(case, family) for case in (*CASES, *VARIANTS) for family in case.families]


def compiled(folder, family: str) -> Folded:
    """An adapter's block, on its model."""
    model = sites(family)
    parsed = read_adapter(folder, model.info)
    banks: dict[str, Tensor] = {}
    image, report = compile_adapter(parsed, model, model.geometry(), 1 << 30, banks.__setitem__)
    assert report.device_bytes == image.numel() == block_bytes(parsed, model.geometry(), model)
    folded = Folded(image, model, banks)
    assert {site.module for site in report.sites} == set(folded.touched())
    return folded


def layers(case: Case, family: str, folder) -> torch.nn.Module:
    """peft's own model."""
    oracle = case.oracle(family, folder)
    assert isinstance(oracle, WholePass)
    model: torch.nn.Module = oracle.model.base_model.model  # type: ignore[union-attr, assignment]
    return model


def inputs(path: str, family: str) -> Tensor:
    """Something to read for the module at this path."""
    info, random = sites(family).info, torch.Generator().manual_seed(len(path))
    if info.embedding is not None and path == info.embedding.path:
        return torch.arange(info.embedding.rows)
    norm = info.norm_index.get(path)
    width = info.sites[info.index[path]].in_features if norm is None else info.norms[norm].features
    return torch.randn(TOKENS, width, generator=random)


def difference(folded: Folded, model: torch.nn.Module, family: str) -> tuple[float, float]:
    """Largest relative error against peft over all sites, norms and the embedding; smallest change where touched."""
    info, touched = sites(family).info, folded.touched()
    paths = [*info.index, *info.norm_index, *([info.embedding.path] if info.embedding is not None else [])]
    error, change = 0.0, float("inf")
    with torch.inference_mode():
        for path in paths:
            x = inputs(path, family)
            wanted, got = model.get_submodule(path)(x), folded.output(path, x)
            base = sites(family).model.get_submodule(path)(x)
            size = 1 + float(wanted.abs().max())
            error = max(error, float((got - wanted).abs().max()) / size)
            if path in touched:
                change = min(change, float((wanted - base).abs().max()) / size)
    return error, change


@pytest.mark.parametrize(("case", "family"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_a_block_computes_what_peft_computes(case, family, tmp_path):
    folder = case.make(family, tmp_path, 1)
    error, change = difference(compiled(folder, family), layers(case, family, folder), family)
    assert error <= TOLERANCE
    assert change >= 100 * TOLERANCE, "an adapter that changes nothing proves nothing"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_another_adapter_of_the_same_shape_fails_the_comparison(case, tmp_path):
    mine, other = case.make(LLAMA, tmp_path / "mine", 1), case.make(LLAMA, tmp_path / "other", 2)
    error, _ = difference(compiled(mine, LLAMA), layers(case, LLAMA, other), LLAMA)
    assert error > 100 * TOLERANCE


def test_matrices_drawn_from_one_seed_lie_in_one_bank(tmp_path):
    model = sites(LLAMA)
    case = next(case for case in VARIANTS if case.name == "vera_drawn")
    banks: dict[str, Tensor] = {}
    for seed in (1, 2):
        parsed = read_adapter(case.make(LLAMA, tmp_path / str(seed), seed), model.info)
        compile_adapter(parsed, model, model.geometry(), 1 << 30, banks.__setitem__)
    assert len(banks) == 1
