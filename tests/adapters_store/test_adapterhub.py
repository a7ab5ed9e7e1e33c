"""AdapterHub's adapters, place by place: what a block holds computes in fp32 what hooks on a plain model compute."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.adapters_store.native_blocks import Compiled
from tests.adapters_store.test_native_places import as_compiled
from tests.support import adapterhub
from tests.support.catalogues import ModelSites, sites_of
from tests.support.hub_oracle import bottlenecks, oracle
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.formats import read_adapter
from weft.kernels.extras import Extra, Kind
from weft.kernels.layout import SiteTerms, unpack, unpack_records
from weft.server import cli

TOKENS, TOLERANCE = 5, 2e-6


@cache
def sites(family: str) -> ModelSites:
    """The places of a golden backbone."""
    return sites_of(adapterhub.backbone(family))


def stored(folder: Path, target: Path) -> Path:
    """The folder as a store has it: all weights under one name."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "adapter_config.json", target)
    shutil.copy(folder / "adapter.safetensors", target / "adapter_model.safetensors")
    return target


def compiled(family: str, folder: Path) -> Compiled:
    """Read, compile and take apart."""
    found, geometry = sites(family), sites(family).geometry()
    parsed = read_adapter(folder, found.info)
    image, report = compile_adapter(parsed, found, geometry, 1 << 30)
    assert report.device_bytes == image.numel() == block_bytes(parsed, geometry, found)
    return Compiled(found, unpack(geometry, image), unpack_records(geometry, image), report, image.numel())


def gated(x: Tensor, record: Extra) -> Tensor:
    """What a gated pair adds for x [tokens, in]."""
    a, b, weight, bias = record.tensors
    assert a is not None
    assert b is not None
    assert weight is not None
    assert bias is not None
    return torch.sigmoid(x @ weight.T + bias).mean() * (x @ a.T @ b)


def at_linear(linear: nn.Module, x: Tensor, terms: SiteTerms | None, records: list[Extra]) -> Tensor:
    """The normal form and the gated pairs of one linear, for x [tokens, in]."""
    y: Tensor = linear(x)
    if terms is not None:
        y = y if terms.sigma is None else y * terms.sigma
        y = y if terms.low_rank is None else y + x @ terms.low_rank[0].T @ terms.low_rank[1].T
        assert not terms.krons
        assert terms.beta is None
    for record in records:
        y = y + gated(x, record)
    return y


@pytest.mark.parametrize(("family", "kind"), adapterhub.ALL)
def test_a_block_computes_at_every_place_what_hooks_compute(family, kind, tmp_path):
    folder = adapterhub.folder(family, kind)
    block, info = compiled(family, stored(folder, tmp_path)), sites(family).info
    model = adapterhub.backbone(family)
    oracle(model, folder)
    random, changed = torch.Generator().manual_seed(0), 0
    with torch.inference_mode():
        for index, site in enumerate(info.sites):
            records = [r for r in block.records if r.kind is Kind.GATED and r.place == index]
            x = torch.randn(TOKENS, site.in_features, generator=random)
            base = sites(family).model.get_submodule(site.path)
            wanted, got = (
                model.get_submodule(site.path)(x[None])[0],
                at_linear(base, x, block.terms.get(index), records),
            )
            changed += differs(got, wanted, base(x), there=index in block.terms or bool(records))
        changes = bottlenecks(folder)
        for index, place in enumerate(info.hidden):
            change = changes.get((info.layers[place.layer].path, place.after))
            h, x_res, ln_x = torch.randn(3, TOKENS, place.features, generator=random)
            got = as_compiled(block, index, h, x_res, ln_x)
            wanted = h if change is None else change(h[None], x_res[None], ln_x[None])[0]
            changed += differs(got, wanted, h, there=change is not None)
        for number, layer in enumerate(info.layers):
            prefix, record = getattr(model.get_submodule(layer.attention), "hub", None), block.of(Kind.PREFIX, number)
            assert (prefix is None) == (record is None)
            if prefix is not None and record is not None:
                changed += same_prefix(prefix, record, torch.randn(1, TOKENS, layer.features, generator=random))
    assert changed == len(block.report.sites)


def differs(got: Tensor, wanted: Tensor, base: Tensor, there: bool) -> int:
    """1 where something is at a place, which must then be right and far from nothing; 0 where nothing is."""
    size = 1 + float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= TOLERANCE * size
    assert (float((wanted - base).abs().max()) >= 100 * TOLERANCE * size) == there
    return int(there)


def same_prefix(prefix, record: Extra, x: Tensor) -> int:
    """A layer's keys and values, times the gate that the attention's input x [1, tokens, d] gives."""
    keys, values, weight, bias = record.tensors
    count, shifts, per_token, _ = record.options
    assert (weight is None) == (bias is None)
    assert (shifts, per_token) == (0, 0), "AdapterHub's text begins at 0"
    assert keys is not None
    heads, prefix.x = keys.shape[0] // count, x
    wanted = prefix.ready(torch.empty(1, heads, 0, keys.shape[1]))
    gate = torch.ones(1) if weight is None or bias is None else torch.sigmoid(x[0] @ weight.T + bias).mean(dim=0)
    for ours, theirs, at in ((keys, wanted[0], 0), (values, wanted[1], -1)):
        assert ours is not None
        torch.testing.assert_close(ours.view(heads, count, -1) * gate[at], theirs[0], rtol=2e-6, atol=2e-6)
    return 1


def test_another_adapter_of_the_same_kind_fails_the_comparison(tmp_path):
    folder = stored(adapterhub.folder("llama", "lora"), tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + 0.01}, folder / "adapter_model.safetensors")
    block, model = compiled("llama", folder), adapterhub.backbone("llama")
    oracle(model, adapterhub.folder("llama", "lora"))
    path = first.partition(".loras.")[0]
    index = sites("llama").info.index[path]
    x = torch.randn(TOKENS, sites("llama").info.sites[index].in_features)
    got = at_linear(sites("llama").model.get_submodule(path), x, block.terms[index], [])
    with pytest.raises(AssertionError), torch.inference_mode():
        differs(got, model.get_submodule(path)(x[None])[0], got, there=True)


def test_the_terms_of_a_compacter_stay_in_their_factors(tmp_path):
    record = compiled("llama", stored(adapterhub.folder("llama", "compacter"), tmp_path)).of(Kind.BOTTLENECK, 0)
    assert record is not None
    shapes = [None if t is None else tuple(t.shape) for t in record.tensors[7:]]
    assert shapes == [(4, 4), (1, 2), (1, 8)] * 4 + [(4, 4), (1, 8), (1, 2)] * 4


def test_the_report_says_what_became_of_an_adapter(tmp_path):
    report = compiled("llama", stored(adapterhub.folder("llama", "unipelt"), tmp_path)).report
    assert (report.method, report.dialect) == ("UNION", "adapterhub")
    assert report.traits.whole_prompt
    assert report.traits.position_offset == 0
    assert [line.operators for line in report.sites if "layers.0" in line.module] == [
        ("gated low_rank r=4",),
        ("gated low_rank r=4",),
        ("kv prefix p=3 gated",),
        ("bottleneck r=2 relu",),
    ]


@pytest.mark.parametrize("kind", ["prefix", "pfeiffer_norm"])
def test_a_converted_pickle_holds_shared_tensors_once(kind, tmp_path):
    """The library saves them under every name that they have, and only as a pickle."""
    folder, source = adapterhub.folder("llama", kind), tmp_path / "in"
    source.mkdir()
    shutil.copy(folder / "adapter_config.json", source)
    tensors = adapterhub.tensors("llama", kind)
    for name, tensor in list(tensors.items()):
        if ".prefix_tunings." in name:
            for layer in range(2):
                pool = f"model.layers.{layer}.self_attn.prefix_tuning.pool"
                tensors[name.replace("model.prefix_tuning", pool)] = tensor
        if ".adapter_down.0." in name:
            tensors[name.replace(".adapter_down.0.", ".adapter_norm_before.")] = tensor
    torch.save(tensors, source / "pytorch_adapter.bin")
    assert cli.main(["convert", "pickle", str(source), str(tmp_path / "out"), "--json"]) == 0
    assert load_file(tmp_path / "out" / "adapter.safetensors").keys() == adapterhub.tensors("llama", kind).keys()
