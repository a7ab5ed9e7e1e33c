"""Our own ``X_KRONA`` (also spelled ``KRONA``): y += scale·x (A ⊗ B), the paper's form, with any split of the sizes.

Tensors at ``base_model.model.<module>.``: ``krona_A`` [a1, a2] and ``krona_B`` [b1, b2] with in = a1·b1 and
out = a2·b2, or both with a leading axis of terms that are summed. In the form that kernels read, w1 = Aᵀ and w2 = Bᵀ.
Settings: ``scale`` and those of ``native_common``.
"""

from collections.abc import Iterator

from weft.adapters_store.errors import expected
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.native_common import DIALECT, read_common
from weft.adapters_store.formats.settings import Settings
from weft.adapters_store.formats.tensors import by_module, require_exactly, require_site
from weft.adapters_store.operators import Factor, Kron, ParsedAdapter, SiteOperators
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo, SiteInfo
from weft.adapters_store.tensor_refs import TensorRef

METHOD = "X_KRONA"

A, B = "krona_A", "krona_B"

SERVES = (Served("KronA", "2212.10650", "kron", "weft X_KRONA", survey=True),)


def parse(settings: Settings, header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    read_common(settings, catalogue)
    scale = settings.signed_number("scale")
    settings.finish(METHOD)
    found = by_module(header, [A, B], catalogue)
    require_exactly(found, found, [A, B], "the other factor is there")
    sites: dict[str, SiteOperators] = {}
    for module in sorted(found, key=lambda module: catalogue.index.get(module, -1)):
        a, b = found[module][A], found[module][B]
        site = require_site(module, a, catalogue)
        sites[module] = SiteOperators(tuple(_terms(a, b, site, scale)), ("scale into w1",))
    return ParsedAdapter(METHOD, DIALECT, sites)


def _terms(a: TensorRef, b: TensorRef, site: SiteInfo, scale: float) -> Iterator[Kron]:
    for tensor in (a, b):
        if len(tensor.shape) not in (2, 3):
            raise expected(tensor.name, "a matrix, or several on a leading axis", list(tensor.shape))
    if a.shape[:-2] != b.shape[:-2]:
        raise expected(b.name, f"as many terms as {A} has", list(b.shape), f"{A} is {list(a.shape)}")
    (a1, a2), (b1, b2) = a.shape[-2:], b.shape[-2:]
    if (a1 * b1, a2 * b2) != (site.in_features, site.out_features):
        wanted = f"factors of a [{site.in_features}, {site.out_features}] matrix (in, out)"
        raise expected(a.name, wanted, f"{A} [{a1}, {a2}] and {B} [{b1}, {b2}]")
    for term in range(a.shape[0]) if len(a.shape) == 3 else (None,):
        yield Kron(Factor(a, None, True, term), Factor(b, None, True, term), scale)
