"""The shape of Llama 3 8B, without a weight: enough to say what an adapter takes on a device."""

import torch
from torch import Tensor

from weft.adapters_store.parts import TAPS
from weft.adapters_store.sites import CatalogueInfo, EmbeddingInfo, HiddenInfo, LayerInfo, NormInfo, SiteInfo
from weft.kernels.layout import Geometry, SiteShape

LAYERS, WIDTH, KV, INNER, VOCABULARY = 32, 4096, 1024, 14336, 128256
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, KV),
    "self_attn.v_proj": (WIDTH, KV),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, INNER),
    "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}
LAYER_PATHS = tuple(f"model.layers.{i}" for i in range(LAYERS))


class Llama8B:
    """A catalogue of shapes alone."""

    def __init__(self) -> None:
        sites = [
            SiteInfo(f"{path}.{name}", *shape, False, "linear")
            for path in LAYER_PATHS
            for name, shape in LINEARS.items()
        ]
        sites.append(SiteInfo("lm_head", WIDTH, VOCABULARY, False, "lm_head"))
        norms = [f"{path}.{name}" for path in LAYER_PATHS for name in ("input_layernorm", "post_attention_layernorm")]
        norms.append("model.norm")
        paths = [site.path for site in sites] + norms + ["model.embed_tokens", *LAYER_PATHS]
        hidden = [HiddenInfo(i, after, WIDTH, TAPS) for i in range(LAYERS) for after in ("attention", "mlp")]
        self.info = CatalogueInfo(
            "b" * 64,
            "bfloat16",
            tuple(sites),
            (1,) * len(sites),
            frozenset(paths),
            family="llama",
            norms=tuple(NormInfo(path, WIDTH, False) for path in norms),
            hidden=tuple(hidden),
            layers=tuple(LayerInfo(path, f"{path}.self_attn", 8, 128, 128, WIDTH) for path in LAYER_PATHS),
            embedding=EmbeddingInfo("model.embed_tokens", VOCABULARY, WIDTH),
        )
        shapes = [SiteShape(site.in_features, site.out_features) for site in sites]
        shapes += [SiteShape(WIDTH, WIDTH)] * len(hidden)
        self.geometry = Geometry(tuple(shapes), (1,) * len(shapes), torch.bfloat16, len(hidden))

    def parameter(self, path: str) -> Tensor | None:
        """Sizes are known without any."""
        raise AssertionError(path)
