"""Formats that number modules as a model declares them, on families that call theirs in another order."""

import pytest

from tests.server.engine.test_methods import Family, problem, prompts

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
def test_tokens_equal_the_oracles_where_order_counts(family, method):
    oracle = family.adapter(method)[1]
    for i, prompt in enumerate(prompts(2, seed=len(method))):
        tokens = family.run({str(i): (method, prompt)})[str(i)]
        assert problem(oracle, prompt, tokens) is None
        assert problem(family.base, prompt, tokens) is not None, "it proves nothing"
