"""PEFT ``FOURIERFT``: y += x Δᵀ, Δ the real part of the inverse Fourier transform of a matrix with few elements.

Tensor at ``base_model.model.<module>.``: ``fourierft_spectrum`` [n]. Its places are the first n of a permutation of
all out·in that ``random_loc_seed`` draws: no file holds them, and PEFT draws them again whenever it loads, as here.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors, sizes
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.operators import Dense, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "FOURIERFT"
SERVES = (Served("FourierFT", "2405.03003", "dense", "PEFT FOURIERFT"),)

SPECTRUM = "fourierft_spectrum"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights")
    counts = frequencies(settings)
    scale, seed = settings.signed_number("scaling"), settings.integer("random_loc_seed", 0)
    targets = read_targets(settings, catalogue, METHOD, "FourierFT", conv1d=True)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [SPECTRUM])
    for site in targets.sites:
        check_spectrum(found.by_site[site.path][SPECTRUM], site, counts)
    sites = {s.path: _operators(found.by_site[s.path][SPECTRUM], s, seed, scale) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def frequencies(settings: Settings) -> set[int]:
    """How many elements a spectrum may have; which of these, its own length says."""
    by_pattern = settings.integer_by_pattern("n_frequency_pattern")
    return {settings.integer("n_frequency"), *by_pattern.values()}


def check_spectrum(spectrum: TensorRef, site: SiteInfo, counts: set[int]) -> None:
    """A vector of as many elements as the settings allow, any number if they name none, and as the weight has."""
    most = site.in_features * site.out_features
    if len(spectrum.shape) != 1 or spectrum.elements > most or (counts and spectrum.elements not in counts):
        named = f", {' or '.join(str(count) for count in sorted(counts))}" if counts else ""
        wanted = f"a vector of at most {most} elements{named}"
        raise expected(spectrum.name, wanted, list(spectrum.shape), sizes(site))


def drawn_places(seed: int, site: SiteInfo, count: int) -> "Tensor":
    """The first places of the permutation, as flat indices [count] into [out, in]."""
    import torch

    random = torch.Generator().manual_seed(seed)
    return torch.randperm(site.in_features * site.out_features, generator=random)[:count]


def _operators(spectrum: TensorRef, site: SiteInfo, seed: int, scale: float) -> SiteOperators:
    shape = (site.out_features, site.in_features)

    def transformed(spectrum: "Tensor") -> "Tensor":
        import torch

        dense = spectrum.new_zeros(shape[0] * shape[1])
        dense[drawn_places(seed, site, len(spectrum))] = spectrum
        delta: Tensor = torch.fft.ifft2(dense.view(shape)).real * scale
        return delta

    return SiteOperators((Dense(Computed(spectrum.name, shape, transformed, (spectrum,))),), ("inverse transform",))
