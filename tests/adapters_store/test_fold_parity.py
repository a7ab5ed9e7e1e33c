"""What is compiled computes what PEFT computes: layer by layer, in fp32, on adapters that PEFT made."""

import pytest
import torch
from torch import Tensor

from tests.adapters_store.peft_models import SERVED, ModelSites, adapt, build, save, sites_of
from weft.adapters_store.compile import block_bytes, compile_adapter
from weft.adapters_store.formats import read_adapter
from weft.kernels.layout import SiteTerms, unpack

TOKENS = 5


def normal_form(linear: torch.nn.Module, terms: SiteTerms | None, x: Tensor) -> Tensor:
    """The formula of the kernels, written out."""
    terms = terms or SiteTerms()
    y: Tensor = linear(x if terms.sigma_in is None else x * terms.sigma_in)
    y = y if terms.sigma is None else y * terms.sigma
    if terms.low_rank is not None:
        a, b = terms.low_rank
        y = y + x @ a.T @ b.T
    for w1, w2 in terms.krons:
        y = y + x @ torch.kron(w1, w2).T
    return y if terms.beta is None else y + terms.beta


def difference(sites: ModelSites, terms: dict[int, SiteTerms], peft_model) -> tuple[float, float]:
    """Largest error against PEFT over all sites, and smallest change of the base's output where there are terms."""
    error, change = 0.0, float("inf")
    for index, site in enumerate(sites.info.sites):
        x = torch.randn(TOKENS, site.in_features)
        linear = sites.model.get_submodule(site.path)
        with torch.no_grad():
            wanted = peft_model.base_model.model.get_submodule(site.path)(x)
            got, base = normal_form(linear, terms.get(index), x), linear(x)
        scale = 1 + float(wanted.abs().max())
        error = max(error, float((got - wanted).abs().max()) / scale)
        if index in terms:
            change = min(change, float((wanted - base).abs().max()) / scale)
    return error, change


@pytest.mark.parametrize("kind", SERVED)
def test_a_compiled_adapter_computes_what_peft_computes(kind, tmp_path):
    family, config = SERVED[kind]
    model = adapt(family, config)
    parsed = read_adapter(save(model, tmp_path), (sites := sites_of(build(family))).info)
    image, report = compile_adapter(parsed, sites, sites.geometry(), 1 << 30)
    terms = unpack(sites.geometry(), image)
    error, change = difference(sites, terms, model)
    assert error <= 2e-6
    assert change >= 100 * 2e-6, "an adapter that changes nothing proves nothing"
    assert {sites.info.sites[i].path for i in terms} == {site.module for site in report.sites}
    assert report.device_bytes == image.numel() == block_bytes(parsed, sites.geometry(), sites)


def test_another_adapter_of_the_same_shape_fails_the_comparison(tmp_path):
    family, config = SERVED["lora"]
    sites = sites_of(build(family))
    parsed = read_adapter(save(adapt(family, config, seed=1), tmp_path), sites.info)
    image, _ = compile_adapter(parsed, sites, sites.geometry(), 1 << 30)
    error, _ = difference(sites, unpack(sites.geometry(), image), adapt(family, config, seed=2))
    assert error > 1e-2
