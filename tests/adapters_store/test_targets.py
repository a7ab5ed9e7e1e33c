"""A config means the modules that it means to PEFT, whatever its patterns are."""

import re
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from tests.adapters_store.conftest import sites
from weft.adapters_store import patterns
from weft.adapters_store.errors import AdapterInvalid
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.targets import by_pattern, target_sites
from weft.adapters_store.patterns import Form

LLAMA, GPT2 = sites("llama").info, sites("gpt2").info
LINEARS = {
    "llama": ["q_proj", "k_proj", "self_attn.v_proj", "0.self_attn.o_proj", "gate_proj", "mlp.up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "mlp.c_proj", "h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"],
}


def by_peft(family: str, **values) -> set[str]:
    """The modules that PEFT would adapt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**values)
    names = sites(family).info.modules
    return {name for name in names if check_target_module_exists(config, name)}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["llama", "gpt2"]), st.data())
def test_lists_mean_what_they_mean_to_peft(family, data):
    some = st.lists(st.sampled_from(LINEARS[family]), min_size=1, max_size=4, unique=True)
    values = {"target_modules": data.draw(some)}
    if data.draw(st.booleans()):
        values["exclude_modules"] = data.draw(some)
    if data.draw(st.booleans()):
        values["layers_to_transform"] = data.draw(st.sampled_from([0, 1, [0], [1], [0, 1], [], [5]]))
        if data.draw(st.booleans()):
            values["layers_pattern"] = data.draw(st.sampled_from(["layers", "h", ["h", "layers"], "self_attn", "", []]))
    wanted = by_peft(family, **values)
    info = sites(family).info
    if not wanted:
        with pytest.raises(AdapterInvalid):
            target_sites(Settings(values), info)
        return
    assert set(target_sites(Settings(values), info)) == wanted


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model.layers.1.self_attn.[kq]_proj"},
        {"target_modules": "model.layers.0.mlp.up.proj"},
        {"target_modules": r".*_proj", "exclude_modules": r".*(o|down)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"model\.layers\.0.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": [r"lay\w+"]},
    ],
)
def test_regular_expressions_mean_what_they_mean_to_peft(values):
    assert set(target_sites(Settings(values), LLAMA)) == by_peft("llama", **values)


def test_all_linear_leaves_the_output_embedding_out():
    found = target_sites(Settings({"target_modules": "all-linear"}), LLAMA)
    assert set(found) == {site.path for site in LLAMA.sites} - {"lm_head"}
    assert found == target_sites(Settings({"target_modules": "ALL-Linear"}), LLAMA)


def test_sites_come_in_the_order_of_the_backbone():
    found = target_sites(Settings({"target_modules": ["v_proj", "q_proj"]}), LLAMA)
    assert [LLAMA.index[path] for path in found] == sorted(LLAMA.index[path] for path in found)


letters = st.text(st.sampled_from("ab.0_-"), min_size=1, max_size=5)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(letters, st.lists(st.text(st.sampled_from("ab.0_-"), max_size=8), max_size=4))
def test_a_plain_pattern_needs_no_regular_expression(pattern, paths):
    names = [*paths, "a.b.0.a", "ab.a.00.b"]
    whole, suffix, layer = (patterns.match([pattern], names, form, "x")[0] for form in Form)
    for name, is_whole, is_suffix, number in zip(names, whole, suffix, layer, strict=True):
        assert (is_whole == 0) == bool(re.fullmatch(pattern, name))
        assert (is_suffix == 0) == bool(re.match(rf"(.*\.)?({pattern})$", name))
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
        assert number == (int(found["idx"]) if found else None)


def test_a_wild_pattern_is_matched_like_a_plain_one():
    names = ["model.layers.0.q", "model.layers.1.q", "layers.2.q", "q"]
    for form in Form:
        plain = patterns.match(["layers"], names, form, "x")
        wild = patterns.match(["layer[s]"], names, form, "x")
        assert plain == wild


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(letters, max_size=4, unique=True), st.lists(letters, min_size=1, max_size=4))
def test_the_first_pattern_of_the_file_wins_as_in_peft(keys, paths):
    values = {key: i for i, key in enumerate(keys)}
    found = by_pattern(values, -1, paths, "rank_pattern")
    assert found == {path: values.get(get_pattern_key(keys, path), -1) for path in paths}


@pytest.mark.parametrize("form", Form)
def test_a_pattern_that_backtracks_for_ever_is_refused(form):
    with pytest.raises(AdapterInvalid, match=r"within 1 s, .*name the modules in a list") as refusal:
        patterns.match([r"((\w+)\.?)*Z"], ["model.layers.0.self_attn.q_proj_and_much_more"], form, "target_modules")
    assert refusal.value.field == "target_modules"


def test_too_many_patterns_are_refused():
    with pytest.raises(AdapterInvalid, match="at most 2048 patterns"):
        patterns.match(["q"] * 2049, ["q"], Form.SUFFIX, "rank_pattern")
