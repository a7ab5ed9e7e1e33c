"""Formats that number modules as a model declares them, on families that call theirs in another order."""

import pytest

from tests.support.families import CHANGE, TOLERANCE, Family, prompts

# opt declares k_proj before q_proj, phi3 o_proj before qkv_proj; opt's linears have biases too
FAMILIES = ("opt", "phi3")
METHODS = ("unilora", "tinylora", "tinylora_tied", "glora", "glora_vector", "deft", "boft", "vera")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def test_these_families_call_modules_in_another_order_than_they_declare_them(family):
    info = family.offline.engine.backbone.info
    assert set(info.declared) == set(info.index)
    assert info.declared != tuple(info.index)


@pytest.mark.parametrize("method", METHODS)
def test_logits_equal_the_oracles_where_order_counts(family, method):
    for prompt in prompts(2, seed=len(method)):
        answer = family.run({"one": (family.digest(method), prompt)})["one"]
        assert answer.distance(family.oracle(method)) <= TOLERANCE
        assert answer.distance(family.base) >= CHANGE, "it proves nothing"
