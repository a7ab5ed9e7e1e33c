"""composable-sft: what its own code encodes comes back as the parameters that its own code makes of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.adapters_store.native_blocks import TOLERANCE, compare, compiled
from tests.server.convert import models
from tests.support.backbones import build
from weft.server import cli


def encoded(tensor: Tensor) -> dict[str, Any]:
    """``encode_sparse_tensor`` of cambridgeltl/composable-sft 29f7872d, ``src/sft/sft.py``, but for `.numpy()`."""
    tensor = tensor.to_sparse().coalesce()
    multipliers = np.cumprod([1, *list(tensor.size())[:-1]], dtype=np.int64)
    coordinates = np.array(tensor.indices().to("cpu").numpy(), dtype=np.int64)
    indices = np.matmul(multipliers, coordinates)
    perm = list(range(len(indices)))
    perm.sort(key=lambda x: indices[x])
    indices = indices[perm]
    index_steps: Any = indices[1:] - indices[:-1]
    index_steps = index_steps.tolist()
    if len(indices) > 0:
        index_steps = [indices[0], *index_steps]
    values = tensor.values().to("cpu")[perm]
    return {"size": tensor.size(), "index_steps": index_steps, "values": values}


def saved(folder: Path, diffs: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Path:
    """Its file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"diffs": {name: encoded(t) for name, t in diffs.items()}, "abs": dict(whole)}, folder / "pytorch_diff.bin"
    )
    return folder


def convert(file: Path, base: Path, out: Path) -> int:
    """Run the command."""
    return cli.main(["convert", "sft", str(file), str(out), "--base", str(base)])


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: models.save(build(family), root / family) for family in ("llama", "gpt2", "gemma3")}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_sparse_fine_tuning_comes_back(family, bases, tmp_path, capsys):
    changed, base = models.tuned(family, models.few_entries), build(family)
    before = dict(base.named_parameters())
    diffs, whole = {}, {}
    for name, parameter in changed.named_parameters():
        delta = (parameter - before[name]).detach()
        if delta.any() and "norm" not in name and "ln_" not in name:
            diffs[name] = delta
        elif delta.any():
            whole[name] = parameter.detach()
    assert convert(saved(tmp_path / "sft", diffs, whole), bases[family], tmp_path / "out") == 0
    assert "of pytorch_diff.bin" in capsys.readouterr().out
    block = compiled(family, tmp_path / "out")
    assert block.report.method == "X_SPARSE"
    found = compare(block, changed)
    assert found.error <= TOLERANCE
    assert found.change >= 100 * TOLERANCE


def test_names_without_the_base_model_in_front_and_empty_differences_are_understood(bases, tmp_path, capsys):
    delta = torch.zeros(32, 96)
    delta[3, 70], delta[31, 0] = 0.5, -0.25
    nothing = torch.zeros(32, 32)
    source = saved(tmp_path / "sft", {"h.1.attn.c_attn.weight": delta, "h.0.attn.c_proj.weight": nothing}, {})
    assert convert(source / "pytorch_diff.bin", bases["gpt2"], tmp_path / "out") == 0
    assert "h.0.attn.c_proj.weight is left out: nothing of it is changed" in capsys.readouterr().err
    model = build("gpt2")
    with torch.no_grad():
        model.get_parameter("transformer.h.1.attn.c_attn.weight").add_(delta)
    found = compare(compiled("gpt2", tmp_path / "out"), model)
    assert found.error <= TOLERANCE
    assert found.changed == {"transformer.h.1.attn.c_attn"}


def test_a_tied_output_embedding_is_the_input_embedding(bases, tmp_path):
    model = build("gpt2")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[7] += 1
    whole = {"lm_head.weight": model.get_parameter("lm_head.weight").detach()}
    assert convert(saved(tmp_path / "sft", {}, whole), bases["gpt2"], tmp_path / "out") == 0
    found = compare(compiled("gpt2", tmp_path / "out"), model)
    assert found.error <= TOLERANCE
    assert found.changed == {"embedding", "lm_head"}


Q = "model.layers.0.self_attn.q_proj.weight"


def entry(**changes: Any) -> dict[str, Any]:
    """A good entry of q_proj, with these changes."""
    delta = torch.zeros(32, 32)
    delta[1, 2], delta[5, 6] = 1.0, 2.0
    return {**encoded(delta), **changes}


DENSE = torch.ones(32, 32)
BAD: dict[str, tuple[Any, str]] = {
    "no dict": ([1], "expected diffs and abs of composable-sft, got a list"),
    "other keys": ({"tensors": {}}, "expected diffs and abs of composable-sft, got tensors"),
    "nothing": ({"diffs": {}, "abs": {}}, "expected a difference of some parameter, got none"),
    "a head": ({"diffs": {"classifier.weight": entry()}}, "classifier.weight: expected a parameter of the backbone"),
    "entry": ({"diffs": {Q: {"size": 1}}}, "expected index_steps, size, values, got something else"),
    "size": ({"diffs": {Q: entry(size=torch.Size([32, 16]))}}, "expected size [32, 32], as the backbone has it"),
    "values": ({"diffs": {Q: entry(values=[1.0, 2.0])}}, "expected values as one row of floats"),
    "steps": ({"diffs": {Q: entry(index_steps=3)}}, "expected index_steps as a list"),
    "floats": ({"diffs": {Q: entry(index_steps=[0.5, 1])}}, "expected index_steps of integers"),
    "too few": ({"diffs": {Q: entry(index_steps=[4])}}, "expected as many index_steps as values, 2, got 1"),
    "twice": ({"diffs": {Q: entry(index_steps=[4, 0])}}, "expected indices from 0 to 1023, ascending, each once"),
    "outside": ({"diffs": {Q: entry(index_steps=[4, 1020])}}, "expected indices from 0 to 1023, ascending, each once"),
    "negative": ({"diffs": {Q: entry(index_steps=[-1, 5])}}, "expected indices from 0 to 1023, ascending, each once"),
    "dense": ({"diffs": {Q: encoded(DENSE)}}, "expected at most half of the entries, got 1024"),
    "shape": ({"abs": {Q: torch.ones(3)}}, "abs: model.layers.0.self_attn.q_proj.weight: expected shape [32, 32]"),
    "no tensor": ({"abs": {Q: 1}}, "abs: expected a tensor at model.layers.0.self_attn.q_proj.weight, got a int"),
    "both": ({"diffs": {"layers.0.self_attn.q_proj.weight": entry(), Q: entry()}}, "expected one difference of it"),
}


@pytest.mark.parametrize("kind", BAD)
def test_other_files_are_refused(kind, bases, tmp_path, capsys):
    value, wanted = BAD[kind]
    torch.save(value, tmp_path / "pytorch_diff.bin")
    assert convert(tmp_path / "pytorch_diff.bin", bases["llama"], tmp_path / "out") == 1
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_position_embeddings_are_refused(bases, tmp_path, capsys):
    torch.save({"abs": {"transformer.wpe.weight": torch.ones(256, 32)}}, tmp_path / "pytorch_diff.bin")
    assert convert(tmp_path, bases["gpt2"], tmp_path / "out") == 1
    assert "expected parameters of linear modules, norms and the input embedding" in capsys.readouterr().err


def test_functions_that_only_look_like_numpy_s_are_refused(bases, tmp_path, capsys):
    torch.save({"diffs": np.arange(3)}, tmp_path / "pytorch_diff.bin")
    assert convert(tmp_path, bases["llama"], tmp_path / "out") == 1
    assert "wants to run numpy._core.multiarray._reconstruct" in capsys.readouterr().err


def test_the_base_must_be_a_model(tmp_path, capsys):
    torch.save({"abs": {Q: DENSE}}, tmp_path / "pytorch_diff.bin")
    assert convert(tmp_path, tmp_path, tmp_path / "out") == 1
    assert "expected a transformers folder with config.json, got one without it" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert convert(tmp_path, tmp_path, tmp_path / "out") == 1
    assert "expected a causal language model of transformers (" in capsys.readouterr().err
