"""PEFT ``WAVEFT``: y += s·x Δᵀ, Δ the inverse wavelet transform of a matrix with few elements, or that matrix itself.

Tensor at ``base_model.model.<module>.``: ``waveft_spectrum`` [n], at places that are drawn as FourierFT's are. The
matrix, an odd side padded by one at its end, is cut into four quarters that are the averages, the differences along
columns, along rows and along both; the wavelet ``db1`` makes a block of 2 by 2 out of one element of each.
"""

from typing import TYPE_CHECKING

from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.peft_fourierft import check_spectrum, drawn_places, frequencies
from weft.adapters_store.formats.peft_linears import adapter, read_targets, read_tensors
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.operators import Dense, ParsedAdapter, SiteOperators, Sparse
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import Computed, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "WAVEFT"
OTHERS = "filters of the other wavelets are not known here"
SERVES = (
    Served("WaveFT", "2505.12532", "dense, sparse", "PEFT WAVEFT", refuses=f"wavelet_family other than db1: {OTHERS}"),
)

SPECTRUM = "waveft_spectrum"


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    settings.ignore("init_weights")
    counts = frequencies(settings)
    if settings.flag("proportional_parameters"):
        # then it is the length of each spectrum that says how many it got
        counts = set()
    scale, seed = settings.signed_number("scaling"), settings.integer("random_loc_seed", 0)
    inverse = settings.choice("use_idwt", (True, False), True)
    wavelets = ("db1",) if inverse else ()
    if inverse:
        settings.choice("wavelet_family", wavelets, "db1", OTHERS)
    settings.ignore("wavelet_family")
    targets = read_targets(settings, catalogue, METHOD, "WaveFT", conv1d=True)
    settings.finish(METHOD)
    found = read_tensors(header, catalogue, targets, [SPECTRUM])
    for site in targets.sites:
        check_spectrum(found.by_site[site.path][SPECTRUM], site, counts)
    form = _transformed if inverse else _scattered
    sites = {s.path: form(found.by_site[s.path][SPECTRUM], s, seed, scale) for s in targets.sites}
    return adapter(METHOD, targets, found, sites, catalogue)


def _scattered(spectrum: TensorRef, site: SiteInfo, seed: int, scale: float) -> SiteOperators:
    def places(spectrum: "Tensor") -> "Tensor":
        return drawn_places(seed, site, len(spectrum)).sort().values

    def values(spectrum: "Tensor") -> "Tensor":
        return spectrum[drawn_places(seed, site, len(spectrum)).argsort()] * scale

    index, value = (Computed(spectrum.name, spectrum.shape, formula, (spectrum,)) for formula in (places, values))
    return SiteOperators((Sparse(index, value),))


def _transformed(spectrum: TensorRef, site: SiteInfo, seed: int, scale: float) -> SiteOperators:
    tall, wide = site.out_features, site.in_features

    def inverse(spectrum: "Tensor") -> "Tensor":
        places = drawn_places(seed, site, len(spectrum))
        padded = spectrum.new_zeros(tall + tall % 2, wide + wide % 2)
        padded[places // wide, places % wide] = spectrum
        upper, lower = padded.chunk(2)
        (average, columns), (rows, both) = upper.chunk(2, dim=1), lower.chunk(2, dim=1)
        # [pairs of rows, 2, pairs of columns, 2]
        blocks = spectrum.new_empty(len(upper), 2, upper.shape[1] // 2, 2)
        for i, down in enumerate((1, -1)):
            for j, right in enumerate((1, -1)):
                blocks[:, i, :, j] = (average + down * columns + right * rows + down * right * both) / 2
        return blocks.view(padded.shape)[:tall, :wide] * scale

    delta = Computed(spectrum.name, (tall, wide), inverse, (spectrum,))
    return SiteOperators((Dense(delta),), ("inverse transform",))
