"""Files to operators: what each format may carry besides what the other tests break, and what the report says of it."""

import subprocess
import sys

import pytest
import torch

from tests.adapters_store.conftest import sites
from tests.adapters_store.files import INNER, Q0, Files, Tensor, krona, lokr, lora, noise
from tests.adapters_store.peft_models import SERVED, ModelSites, adapt, save
from weft.adapters_store.compile import compile_adapter
from weft.adapters_store.errors import AdapterInvalid, AdapterTooLarge
from weft.adapters_store.formats import read_adapter
from weft.adapters_store.operators import Kron, LowRank
from weft.adapters_store.report import AdapterReport
from weft.kernels.layout import SiteTerms, unpack


def compiled(files: Files, llama: ModelSites, folder) -> tuple[dict[int, SiteTerms], AdapterReport]:
    """The terms and the report of hand-written files."""
    parsed = read_adapter(files.write(folder), llama.info)
    image, report = compile_adapter(parsed, llama, llama.geometry(), 1 << 30)
    return unpack(llama.geometry(), image), report


def numbers(tensor: Tensor) -> torch.Tensor:
    """The values of a hand-written tensor."""
    return torch.frombuffer(bytearray(tensor.data), dtype=torch.float32).view(tensor.shape)


@pytest.mark.parametrize("terms", [None, 1, 3])
def test_krona_computes_x_times_a_kron_b(terms, llama, tmp_path):
    files = krona(terms)
    found, report = compiled(files, llama, tmp_path)
    for path in (f"model.layers.{i}.mlp.up_proj" for i in range(2)):
        a, b = (numbers(files.tensors[f"base_model.model.{path}.krona_{w}"]) for w in "AB")
        a, b = (a[None], b[None]) if terms is None else (a, b)
        x = torch.randn(5, 32)
        wanted = 0.5 * torch.stack([x @ torch.kron(a[t], b[t]) for t in range(len(a))]).sum(dim=0)
        krons = found[llama.info.index[path]].krons
        got = torch.stack([x @ torch.kron(w1, w2).T for w1, w2 in krons]).sum(dim=0)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6 * (1 + float(wanted.abs().max())))
    assert report.method == "X_KRONA"
    assert report.dialect == "native"
    assert report.sites[0].operators == ("kron 12x4 * 4x8",) * (terms or 1)
    assert report.sites[0].folds == ("scale into w1",)


def test_lokr_products_are_multiplied_out_where_that_takes_fewer_bytes(llama, tmp_path):
    shapes = {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (4, 2), "w2_b": (2, 4)}
    sites = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2)]
    tensors = {f"{site}.lokr_{n}": noise(shape, i) for site in sites for i, (n, shape) in enumerate(shapes.items())}
    files = Files({**lokr().config, "decompose_both": True}, tensors)
    found, report = compiled(files, llama, tmp_path)
    w1a, w1b, w2a, w2b = (numbers(tensors[f"{sites[0]}.lokr_{n}"]) for n in shapes)
    ((w1, w2),) = found[llama.info.index["model.layers.0.self_attn.q_proj"]].krons
    torch.testing.assert_close(torch.kron(w1, w2), 1.5 * torch.kron(w1a @ w1b, w2a @ w2b), rtol=0, atol=2e-6)
    assert report.sites[0].operators == ("kron 8x8 * 4x4",)
    assert report.sites[0].folds == ("alpha/r", "w1 multiplied out", "w2 multiplied out")


def test_krona_takes_splits_of_any_shape_on_any_linear(gpt2, tmp_path):
    site = "transformer.h.0.attn.c_attn"
    tensors = {f"base_model.model.{site}.krona_A": noise((1, 96)), f"base_model.model.{site}.krona_B": noise((32, 1))}
    parsed = read_adapter(Files(krona().config, tensors).write(tmp_path), gpt2.info)
    assert [type(o) for o in parsed.sites[site].operators] == [Kron]


def test_krona_has_a_short_name_and_knows_its_backbone(llama, tmp_path):
    files = krona().configured(
        peft_type="KRONA", base_fingerprint=llama.info.digest, base_model_name_or_path="x", target_modules=["up_proj"]
    )
    assert read_adapter(files.write(tmp_path), llama.info).method == "X_KRONA"


@pytest.mark.parametrize(
    ("kind", "operators", "folds"),
    [
        ("lora", ("low_rank r=4",), ("alpha/r",)),
        ("lora_rslora", ("low_rank r=5",), ("alpha/sqrt(r)",)),
        ("lora_bias", ("low_rank r=4", "bias"), ("alpha/r",)),
        ("lora_only", ("bias", "low_rank r=4"), ("bias value - base", "alpha/r")),
        ("dora", ("scale out", "low_rank r=4"), ("alpha/r", "m/‖W + sBA‖")),
        ("dora_gpt2", ("scale out", "low_rank r=3", "bias"), ("alpha/r", "m/‖W + sBA‖")),
        ("qalora", ("low_rank r=4",), ("alpha/r", "A spread over groups")),
        ("bdlora", ("low_rank r=4",), ("alpha/r", "blocks spread out")),
        ("pissa", ("low_rank r=8",), ("alpha/r", "pissa out of the base")),
        ("kasa", ("low_rank r=8",), ("alpha/r", "kasa out of the base")),
        ("adalora", ("low_rank r=6",), ("alpha/init_r", "E into A")),
        ("lokr_low_rank_w2", ("kron 4x4 * 8x8",), ("alpha/r", "w2 multiplied out")),
        ("lokr_both", ("low_rank r=1",), ("alpha/r", "kron as low_rank")),
        ("lokr_as_low_rank", ("low_rank r=2",), ("alpha/r", "kron as low_rank")),
        ("ia3", ("scale out",), ()),
    ],
)
def test_the_report_says_what_became_of_each_site(kind, operators, folds, tmp_path):
    family, config = SERVED[kind]
    model = sites(family)
    parsed = read_adapter(save(adapt(family, config), tmp_path), model.info)
    _, report = compile_adapter(parsed, model, model.geometry(), 1 << 30)
    assert report.sites[0].operators == operators
    assert report.sites[0].folds == folds
    assert report.sites[0].bytes > 0
    assert sum(site.bytes for site in report.sites) < report.device_bytes


def test_ranks_are_those_of_the_first_pattern_that_matches(llama, tmp_path):
    parsed = read_adapter(save(adapt(*SERVED["lora_pattern_order"]), tmp_path), llama.info)
    ranks = {path: o.operators[0].a.shape[0] for path, o in parsed.sites.items() if isinstance(o.operators[0], LowRank)}
    assert ranks == {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.self_attn.q_proj": 2}


def test_the_backbones_own_weights_may_come_along(llama, tmp_path):
    parsed = read_adapter(save(adapt(*SERVED["lora_head"]), tmp_path), llama.info)
    assert [path for _, path in parsed.copies] == ["lm_head.weight"]
    embedding = llama.parameter("model.embed_tokens.weight")
    assert embedding is not None
    along = Tensor(tuple(embedding.shape), embedding.detach().numpy().tobytes())
    files = lora().with_tensor("base_model.model.model.embed_tokens.weight", along)
    compiled(files, llama, tmp_path / "with_embedding")
    negated = Tensor(along.shape, (-embedding.detach()).numpy().tobytes())
    with pytest.raises(AdapterInvalid, match="equal bit for bit"):
        compiled(files.with_tensor("base_model.model.model.embed_tokens.weight", negated), llama, tmp_path / "negated")


def test_a_tied_head_is_compared_with_the_embedding_it_is_tied_to(tmp_path):
    model = sites("gpt2")
    head = model.parameter("lm_head.weight")
    assert head is not None
    shape = tuple(head.shape)
    tensors = {
        "base_model.model.lm_head.lora_A.weight": noise((2, shape[1])),
        "base_model.model.lm_head.lora_B.weight": noise((shape[0], 2)),
        "base_model.model.lm_head.base_layer.weight": Tensor(shape, head.detach().numpy().tobytes()),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]}
    parsed = read_adapter(Files(config, tensors).write(tmp_path), model.info)
    _, report = compile_adapter(parsed, model, model.geometry(), 1 << 30)
    assert [site.module for site in report.sites] == ["lm_head"]


def test_settings_of_training_and_opaque_text_change_nothing(llama, tmp_path):
    opaque = {
        "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"},
        "base_model_name_or_path": "/etc/passwd",
        "revision": "http://localhost/",
        "peft_version": "0.21.2",
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.5,
        "loftq_config": {"loftq_bits": 4},
        "corda_config": {"cache_file": "/etc/passwd"},
        "megatron_core": "megatron.core",
        "init_lora_weights": "eva",
        "fan_in_fan_out": False,
    }
    plain = compiled(lora(), llama, tmp_path / "plain")
    for index, terms in compiled(lora().configured(**opaque), llama, tmp_path / "opaque")[0].items():
        before = plain[0][index].low_rank
        assert before is not None
        assert terms.low_rank is not None
        assert torch.equal(terms.low_rank[1], before[1])


def test_a_setting_that_does_not_describe_the_backbone_is_reported(llama, tmp_path):
    _, report = compiled(lora().configured(fan_in_fan_out=True), llama, tmp_path)
    assert report.notes == ("fan_in_fan_out=true does not describe this backbone and has no effect, as in PEFT",)


def test_lokr_is_refused_where_peft_has_none(gpt2, tmp_path):
    with pytest.raises(AdapterInvalid, match="no LoKr for Conv1D"):
        read_adapter(lokr().configured(target_modules=["c_attn"]).write(tmp_path), gpt2.info)


def test_a_missing_bias_is_named(tmp_path):
    model = sites("llama_biased")
    files = lora().configured(bias="lora_only")
    with pytest.raises(AdapterInvalid, match=r"because|bias is lora_only, and 3 more are missing") as refusal:
        read_adapter(files.write(tmp_path), model.info)
    assert refusal.value.field == f"{Q0}.base_layer.bias"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_in_the_place_of_a_file_is_not_followed(file, llama, tmp_path):
    folder = lora().write(tmp_path / "adapter")
    (folder / file).rename(tmp_path / file)
    (folder / file).symlink_to(tmp_path / file)
    with pytest.raises(Exception, match="expected a file, got a link"):
        read_adapter(folder, llama.info)


def test_a_block_that_cannot_fit_is_refused_before_it_is_made(llama, tmp_path, monkeypatch):
    site = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {f"{site}.krona_A": noise((1000, 1, INNER)), f"{site}.krona_B": noise((1000, 32, 1))}
    parsed = read_adapter(Files(krona().config, tensors).write(tmp_path), llama.info)
    monkeypatch.setattr("weft.adapters_store.compile.Values", None)
    with pytest.raises(AdapterTooLarge, match="at most 100000 bytes, got one of 321024"):
        compile_adapter(parsed, llama, llama.geometry(), 100_000)


def test_catalog_and_formats_need_no_torch():
    code = (
        "import sys, weft.adapters_store.catalog, weft.adapters_store.formats, weft.adapters_store.upload;"
        "print([m for m in ('torch', 'numpy', 'transformers', 'peft', 'safetensors', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
