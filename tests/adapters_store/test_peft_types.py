"""Every type that peft knows is served or refused with its own reason, and takes the bytes that its form asks for."""

import json

import pytest
from peft import PeftType

from tests.adapters_store.conftest import sites
from tests.adapters_store.files import Files, noise
from tests.support.methods import peft_other, peft_weights
from tests.support.methods.case import LLAMA
from weft.adapters_store.compile import compile_adapter
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats import PARSERS, read_adapter
from weft.adapters_store.formats.refused import REFUSED
from weft.adapters_store.sites import SiteInfo

CASES = (*peft_other.CASES, *peft_weights.CASES)
TYPES = [kind.value for kind in PeftType]
HEAD_BYTES = 4096


def low_rank(rank: int):
    """Elements of a pair."""
    return lambda site: rank * (site.in_features + site.out_features)


def dense(site: SiteInfo) -> int:
    """Elements of a whole matrix."""
    return site.in_features * site.out_features


# what each case's form takes at a site in elements of the factors, by the first table of the formats
FORMS = {
    "loha": low_rank(9),
    "hra": low_rank(4),
    "hra_orthogonal": low_rank(3),
    "delora": low_rank(4),
    "miss": low_rank(5),
    "miss_mini": low_rank(4),
    "gralora": low_rank(4 * 8),
    "gralora_hybrid": low_rank(2 * 4 + 2),
    "vblora": low_rank(3),
    "tinylora": low_rank(4),
    "tinylora_tied": low_rank(4),
    "unilora": low_rank(3),
    "unilora_saved": low_rank(3),
    # a scale in fp32 and a pair of rank 1
    "glora_vector": lambda site: 3 * site.out_features + site.in_features,
    "glora_constant": lambda site: 3 * site.out_features + site.in_features,
    "deft": low_rank(4),
    "para": low_rank(4),
    "peanut": low_rank(4),
    "vera": low_rank(6),
    "pvera": low_rank(6),
    # a bias in fp32
    "beft": lambda site: 2 * site.out_features,
    # a scale in fp32, of inputs where that is the longer one
    **dict.fromkeys(("ia3", "ia3_outputs"), lambda site: 2 * max(site.in_features, site.out_features)),
    # an index of four bytes beside each value
    "shira": lambda site: 3 * 2 * (site.in_features + site.out_features),
    "supertuning": lambda site: 3 * int(dense(site) * (1 - 0.8)),
    "supra": lambda site: 3 * int(dense(site) * (1 - 0.8)) + low_rank(3)(site),
    "waveft_direct": lambda site: 3 * 60,
    **dict.fromkeys(("glora", "randlora", "c3a", "fourierft", "waveft", "oft", "oft_exact", "boft", "hira"), dense),
    "road": dense,
    "miss_bat": dense,
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_peft_is_served_or_refused_with_a_reason(kind, llama, tmp_path):
    assert (kind in PARSERS) != (kind in REFUSED)
    if kind in PARSERS:
        return
    files = Files({"peft_type": kind, "r": 4, "target_modules": ["q_proj"]}, {"t": noise((2, 2))})
    with pytest.raises(AdapterInvalid) as refusal:
        read_adapter(files.write(tmp_path), llama.info)
    assert refusal.value.field == "peft_type"
    assert REFUSED[kind] in refusal.value.message
    assert f'got "{kind}"' in refusal.value.message


def test_every_reason_is_of_a_type_that_exists_and_its_own():
    # weft's own types begin with X
    assert {kind for kind in REFUSED if not kind.startswith("X_")} <= set(TYPES)
    assert len(set(REFUSED.values())) == len(REFUSED)


def test_every_case_has_a_form():
    # factors of a few numbers are mostly padding: those are weighed at the shape of an 8B model
    beyond = {"ln_tuning", "trainable_tokens", "lokr", "lokr_full", "lokr_both", "lokr_krona"}
    assert {case.name for case in CASES} == set(FORMS) | beyond


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FORMS], ids=lambda case: case.name)
def test_no_method_takes_more_than_its_form_asks_for(case, tmp_path):
    import torch

    model, folder = sites(LLAMA), case.make(LLAMA, tmp_path, 0)
    geometry = model.geometry(torch.bfloat16)
    image, report = compile_adapter(read_adapter(folder, model.info), model, geometry, 1 << 30)
    index = model.info.index
    due = sum(2 * FORMS[case.name](model.info.sites[index[site.module]]) for site in report.sites)
    assert sum(site.bytes for site in report.sites) <= 1.1 * due
    assert image.numel() <= 1.1 * due + HEAD_BYTES
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == report.method
