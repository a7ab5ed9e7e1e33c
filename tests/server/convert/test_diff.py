"""A difference of two models comes back: as the form that it has, within the error, and as the tuned model's logits."""

import json
from pathlib import Path

import pytest
import torch

from tests.adapters_store.native_blocks import TOLERANCE, applied, compare, compiled, site_output
from tests.server.convert import models
from tests.server.convert.models import logits, pair, save
from tests.support.backbones import build
from weft.server import cli
from weft.server.backbone.model import Backbone
from weft.server.convert.diff import Options, Report, convert_diff
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import RequestId, Submit
from weft.server.engine.offline import OfflineEngine

FAMILIES = ("llama", "gpt2", "gemma3")
PROMPT = [5, 17, 40, 3, 88, 9]
# kind of change → (peft_type, first word of every matrix's form)
EXACT = {
    "few_entries": ("X_SPARSE", "sparse"),
    "few_rows": ("X_ROWS", "rows"),
    "few_columns": ("X_ROWS", "columns"),
    "everything": ("X_DENSE", "dense"),
    "vectors": ("X_SPARSE", "vector"),
    "few_tokens": ("X_SPARSE", "sparse"),
}


def convert(base: Path, tuned: Path, out: Path, error: float = 0.0, form: str = "auto") -> Report:
    """Without a terminal."""
    return convert_diff(base, tuned, out, Options(error, form), lambda done, total: None)


def forms(report: Report) -> set[str]:
    """The forms of the matrices, or of the vectors if there are only those."""
    found = {line.form.split()[0] for line in report.parameters}
    return found - {"vector"} or found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", EXACT)
def test_what_changed_is_found_in_the_form_that_it_has_and_exactly(kind, family, tmp_path):
    base, tuned, model = pair(family, getattr(models, kind), tmp_path)
    report = convert(base, tuned, tmp_path / "out")
    assert (report.peft_type, forms(report)) == (EXACT[kind][0], {EXACT[kind][1]})
    assert report.error == 0
    assert all(line.error == 0 for line in report.parameters)
    block = compiled(family, tmp_path / "out")
    found = compare(block, model)
    assert found.error <= TOLERANCE
    assert found.changed
    assert found.change >= 100 * TOLERANCE, "a change of nothing proves nothing"
    wanted = logits(model, PROMPT)
    assert (logits(applied(block, family), PROMPT) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (logits(build(family), PROMPT) - wanted).abs().max() >= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_lora_becomes_a_lora_of_its_rank(family, tmp_path):
    base, tuned, model = pair(family, models.product, tmp_path)
    report = convert(base, tuned, tmp_path / "out", error=1e-4)
    assert (report.peft_type, {line.form for line in report.parameters}) == ("LORA", {"low-rank r=2"})
    assert 0 < report.error <= 1e-4
    found = compare(compiled(family, tmp_path / "out"), model)
    assert found.error <= 1e-5
    assert found.change >= 1e-2
    # without an error that is allowed, nothing but the change itself will do
    assert forms(convert(base, tuned, tmp_path / "exact")) == {"dense"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_format_says_alone_becomes_a_union(family, tmp_path):
    base, tuned, model = pair(family, models.mixture, tmp_path)
    report = convert(base, tuned, tmp_path / "out", error=1e-4)
    assert report.peft_type == "X_UNION"
    assert {"sparse", "rows", "columns", "low-rank"} <= forms(report)
    block = compiled(family, tmp_path / "out")
    assert compare(block, model).error <= 1e-4
    wanted = logits(model, PROMPT)
    assert (logits(applied(block, family), PROMPT) - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("error", [1e-3, 0.03, 0.3])
@pytest.mark.parametrize("kind", ["everything", "product", "few_entries"])
def test_the_error_is_kept_and_used(kind, error, tmp_path):
    base, tuned, model = pair("llama", getattr(models, kind), tmp_path)
    report = convert(base, tuned, tmp_path / "out", error)
    exact = convert(base, tuned, tmp_path / "exact")
    assert all(line.error <= error for line in report.parameters)
    assert report.error <= error
    assert report.device_bytes <= exact.device_bytes
    # what is said is measured by somebody else: the block's effect on each linear's input
    block = compiled("llama", tmp_path / "out")
    for index, site in enumerate(block.sites.info.sites):
        eye = torch.eye(site.in_features)
        said = site_output(block, index, eye) - block.sites.model.get_submodule(site.path)(eye).double()
        wanted = (model.get_submodule(site.path)(eye) - block.sites.model.get_submodule(site.path)(eye)).double()
        if wanted.norm():
            assert (said - wanted).norm() / wanted.norm() <= error * 1.01 + 1e-6, site.path
    if error == 0.3 and kind != "product":
        assert report.error > 0.01, "an error that is allowed saves bytes"
        assert report.device_bytes < exact.device_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_generates_what_the_tuned_model_does(family, tmp_path):
    base, tuned, model = pair(family, models.mixture, tmp_path)
    assert "low-rank" in forms(convert(base, tuned, tmp_path / "out", error=1e-6))
    config = EngineConfig(model=family, store=str(tmp_path / "store"), kv_bytes_max=1 << 20)
    offline = OfflineEngine(config, Backbone(build(family)))
    digest = offline.register("diff", tmp_path / "out")
    submits = [Submit(RequestId(name), tuple(PROMPT), 8, adapter=of) for name, of in (("diff", digest), ("base", None))]
    answers = offline.run(submits)
    for name, of in (("diff", model), ("base", build(family))):
        tokens = answers[RequestId(name)]
        found = logits(of, [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
        lost = found.max(-1).values - found.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float(lost.max()) <= 1e-4 * float(found.abs().max())
    assert answers[RequestId("diff")] != answers[RequestId("base")]


def test_every_form_can_be_asked_for(tmp_path):
    base, tuned, model = pair("llama", models.few_entries, tmp_path)
    for form in ("sparse", "rows", "dense", "low-rank"):
        report = convert(base, tuned, tmp_path / form, 0.1 if form == "low-rank" else 0.0, form)
        wanted = {"rows": {"rows", "columns", "sparse"}, "low-rank": {"low-rank", "sparse"}}.get(form, {form})
        assert forms(report) <= wanted
        limit = 0.3 if form == "low-rank" else TOLERANCE
        assert compare(compiled("llama", tmp_path / form), model).error <= limit


def test_models_in_bfloat16_are_compared_exactly(tmp_path):
    model = models.tuned("llama", models.few_entries)
    base = save(build("llama").bfloat16(), tmp_path / "base")
    tuned = save(model.bfloat16(), tmp_path / "tuned")
    report = convert(base, tuned, tmp_path / "out")
    assert report.error == 0
    pairs = zip(build("llama").bfloat16().parameters(), model.parameters(), strict=True)
    count = sum(int((a != b).sum()) for a, b in pairs if a.dim() > 1)
    vectors = sum(line.bytes for line in report.parameters if line.form == "vector")
    embedded = next(line for line in report.parameters if "embed" in line.name)
    others = report.device_bytes - vectors - embedded.bytes
    assert others == 6 * (count - int(embedded.form.split("=")[1]))


def test_shards_are_read_like_one_file(tmp_path):
    model = models.tuned("llama", models.few_entries)
    base, whole = save(build("llama"), tmp_path / "base"), save(model, tmp_path / "whole")
    parts = save(model, tmp_path / "parts", max_shard_size="20KB")
    assert (parts / "model.safetensors.index.json").exists()
    one, two = convert(base, whole, tmp_path / "one"), convert(base, parts, tmp_path / "two")
    assert one.parameters == two.parameters
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_output_embedding_that_was_untied_changes_apart(tmp_path):
    base = save(build("gpt2"), tmp_path / "base")
    model = build("gpt2")
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    head.weight = torch.nn.Parameter(head.weight + 0.1 * torch.randn_like(head.weight))
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.get_parameter("transformer.wte.weight")[5] += 1
    tuned = save(model, tmp_path / "tuned")
    report = convert(base, tuned, tmp_path / "out")
    assert {line.name for line in report.parameters} == {"transformer.wte.weight", "lm_head.weight"}
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {each["tied"] for each in settings["members"]} == {"independent"}
    assert compare(compiled("gpt2", tmp_path / "out"), model).error <= TOLERANCE


def test_people_see_every_parameter_and_the_sum(tmp_path, capsys):
    base, tuned, _ = pair("llama", models.few_rows, tmp_path)
    words = ["convert", "diff", "--base", str(base), "--tuned", str(tuned), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    head, *lines, last = out.splitlines()
    assert head.split() == ["parameter", "form", "device", "error"]
    assert "model.layers.0.self_attn.q_proj.weight  rows k=3" in lines[0]
    assert last.startswith(f"wrote {tmp_path / 'out'}: X_ROWS, 15 parameters changed, 6 did not; ")
    assert err == ""


def test_programs_get_one_json_object(tmp_path, capsys):
    base, tuned, _ = pair("llama", models.few_rows, tmp_path)
    words = ["convert", "diff", "--base", str(base), "--tuned", str(tuned), "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peft_type"] == "X_ROWS"
    assert found["device_bytes"] == sum(line["bytes"] for line in found["parameters"])
    assert found["file_bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
