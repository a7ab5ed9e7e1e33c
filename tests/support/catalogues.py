"""The sites and places of a model that nothing has been done to, worked out from its modules' names and shapes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weft.adapters_store.parts import TAPS
from weft.adapters_store.sites import CatalogueInfo, EmbeddingInfo, HiddenInfo, LayerInfo, NormInfo, SiteInfo
from weft.kernels.layout import Geometry, SiteShape

# neighbours that share an input, by the ends of their names
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class ModelSites:
    """A SiteCatalogue over a model that nothing has been done to."""

    model: PreTrainedModel
    info: CatalogueInfo

    def parameter(self, path: str) -> Tensor | None:
        """The model's own parameter."""
        return dict(self.model.named_parameters(remove_duplicate=False)).get(path)

    def geometry(self, dtype: torch.dtype = torch.float32) -> Geometry:
        """The sites and hidden places as arithmetic sees them."""
        shapes = [SiteShape(site.in_features, site.out_features) for site in self.info.sites]
        shapes += [SiteShape(place.features, place.features) for place in self.info.hidden]
        hidden = len(self.info.hidden)
        return Geometry(tuple(shapes), (*self.info.groups, *([1] * hidden)), dtype, hidden)


def sites_of(model: PreTrainedModel, digest: str = "b" * 64, dtype: torch.dtype = torch.float32) -> ModelSites:
    """Every linear of a model as a site; its norms, layers and input embedding."""
    modules = dict(model.named_modules())
    linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    sites = tuple(_site(name, module) for name, module in linears.items())
    info = CatalogueInfo(
        digest,
        DTYPES[dtype],
        sites,
        _groups([s.path for s in sites]),
        frozenset(name for name in modules if name),
        model.config.model_type,
        tuple(
            NormInfo(n, m.weight.numel(), getattr(m, "bias", None) is not None)
            for n, m in modules.items()
            if "norm" in type(m).__name__.lower() and isinstance(getattr(m, "weight", None), Tensor)
        ),
        *_places(model, modules),
        _embedding(model, modules),
    )
    return ModelSites(model, info)


def _site(name: str, module: nn.Module) -> SiteInfo:
    if isinstance(module, Conv1D):
        return SiteInfo(name, module.nx, module.nf, True, "conv1d")
    assert isinstance(module, nn.Linear)
    kind = "lm_head" if name == "lm_head" else "linear"
    return SiteInfo(name, module.in_features, module.out_features, module.bias is not None, kind)


def _groups(paths: list[str]) -> tuple[int, ...]:
    sizes, at = [], 0
    while at < len(paths):
        parent = paths[at].rpartition(".")[0]
        names = [path.rpartition(".")[2] for path in paths[at : at + 3] if path.startswith(f"{parent}.")]
        size = next((len(run) for run in SHARED if tuple(names[: len(run)]) == run), 1)
        sizes.append(size)
        at += size
    return tuple(sizes)


def _places(
    model: PreTrainedModel, modules: dict[str, nn.Module]
) -> tuple[tuple[HiddenInfo, ...], tuple[LayerInfo, ...]]:
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attentions = [n for n in modules if n.endswith((".self_attn", ".attn"))]
    hidden = tuple(
        HiddenInfo(layer, after, width, TAPS) for layer in range(len(attentions)) for after in ("attention", "mlp")
    )
    layers = tuple(LayerInfo(n.rpartition(".")[0], n, kv_heads, size, size, width) for n in attentions)
    return hidden, layers


def _embedding(model: PreTrainedModel, modules: dict[str, nn.Module]) -> EmbeddingInfo:
    embedding = model.get_input_embeddings()
    name = next(n for n, m in modules.items() if m is embedding)
    head = model.get_output_embeddings()
    tied = next((n for n, m in modules.items() if m is head and head.weight is embedding.weight), "")
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    rows, features = weight.shape
    return EmbeddingInfo(name, rows, features, tied, float(getattr(embedding, "embed_scale", 1.0)))
