"""The frozen backbone: one transformers model in device memory, driven over flattened, paged, mixed batches."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weft.adapters_store.sites import CatalogueInfo
from weft.kernels.layout import Geometry, SiteShape
from weft.server.backbone import attention, places, side, sites
from weft.server.backbone.errors import UnsupportedBackbone
from weft.server.backbone.hooks import Hooks
from weft.server.backbone.linears import AdaptedLinear, LinearGroup
from weft.server.backbone.recording import record
from weft.server.backbone.selftest import Census, census, difference, paged_logits
from weft.server.backbone.step import PagedKV, Step, running

logger = logging.getLogger(__name__)

# longer than what ``places`` records
PROBE_TOKENS = 7


class Backbone:
    """Owns the model and its sites; implements ``SiteCatalogue``. Parameters never change after construction.

    kv_shapes:        per layer (kv heads, key size, value size)
    places:           what adapters can change beyond linears
    parameter_bytes:  M, bytes of all parameters, tied ones counted once
    linears:          what multiplies: ``torch``, or ``onednn`` over packed weights, and over how many
    notes:            what is slower than it could be, and why
    """

    def __init__(self, model: PreTrainedModel):
        """Take over ``model``: adapt its linears, route its attention, and prove that it still computes the same."""
        model.eval()
        self.model = model.requires_grad_(False)
        if model.config.is_encoder_decoder:
            raise UnsupportedBackbone(
                f"{model.config.model_type} is an encoder-decoder; decoder-only models are served"
            )
        identity = sites.digest(model)
        probe = self._probe()
        with torch.inference_mode():
            reference = model(input_ids=probe[None], use_cache=False).logits[0].float()
        watched = probe[: places.probe_tokens(_heads(model))]
        calls = record(model, lambda: self._bare(watched))
        attends: list[Census] = []
        found = sites.watch(model, lambda: attends.append(census(model, lambda: self._bare(probe))), PROBE_TOKENS)
        self.kv_shapes = attends[0].shapes
        self.places = places.find(model, calls, watched.numel(), attends[0], found.head)
        attention.register()
        model.set_attn_implementation(attention.NAME)
        beside = side.Networks(model, self.places, self.kv_shapes)
        self.notes: tuple[str, ...] = ()
        self._hooks = Hooks(model, self.places, beside)
        self.groups = self._adapt(found, probe, reference)
        self.info: CatalogueInfo = sites.catalogue(model, self.groups, found.head, identity, self.places, beside.infos)
        self.parameter_bytes = _bytes(model)
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())
        self.linears = self._pack()

    def _adapt(self, found: sites.Found, probe: Tensor, reference: Tensor) -> tuple[LinearGroup, ...]:
        """Fuse the sites that share an input if the model then still computes the same, else adapt them one by one."""
        problem = None
        for fuse in (True, False):
            groups = sites.adapt(self.model, found, fuse)
            logits = paged_logits(self.forward, probe, self.kv_shapes, self.dtype)
            problem = difference(reference, logits, self.dtype)
            if problem is None:
                return groups
            if fuse:
                self._note(f"linears that share an input run one by one: joined, {problem}")
        family = self.model.config.model_type
        raise UnsupportedBackbone(f"{family} computes something else in a paged batch: {problem}")

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, keys and values."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def geometry(self) -> Geometry:
        """Shapes of the sites, and of the hidden places behind them, for the kernels."""
        shapes = [SiteShape(site.in_features, site.out_features) for site in self.info.sites]
        shapes += [SiteShape(place.features, place.features) for place in self.info.hidden]
        hidden = len(self.info.hidden)
        return Geometry(tuple(shapes), (*self.info.groups, *([1] * hidden)), self.dtype, hidden)

    @property
    def context_tokens(self) -> int:
        """Longest sequence the model knows positions for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding; token ids are below it."""
        embedding = self.model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        return embedding.shape[0]

    def parameter(self, path: str) -> Tensor | None:
        """The frozen parameter at this path, as the model stores it, or None."""
        module, _, name = path.rpartition(".")
        if name == "weight" and module in self.info.index:
            linear = self.model.get_submodule(module)
            assert isinstance(linear, AdaptedLinear)
            return linear.stored_weight()
        return dict(self.model.named_parameters(remove_duplicate=False)).get(path)

    def forward(self, ids: Tensor, positions: Tensor, keep: Tensor, step: Step) -> Tensor:
        """Run one flattened batch.

        ids, positions:  [tokens] int64
        keep:            [kept] int64, rows whose logits are wanted, ascending
        returns:         [kept, vocabulary] in the model's dtype
        """
        self._hooks.prepare(step)
        with torch.inference_mode(), running(step):
            out = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep)
        logits: Tensor = out.logits[0]
        return logits

    def _pack(self) -> str:
        """Pack the weights of all groups but a head that shares its own with the embeddings."""
        shared = self.model.get_input_embeddings().weight
        own = [group for group in self.groups if group.members[0].weight is not shared]
        packed = sum(group.pack() for group in own)
        if self.device.type == "cpu" and packed < len(own):
            self._note(f"oneDNN multiplies {packed} of {len(own)} groups of linears, torch the others")
        return f"onednn ({packed} of {len(self.groups)} groups)" if packed else "torch"

    def _note(self, line: str) -> None:
        logger.warning("%s", line)
        self.notes += (line,)

    def _probe(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (PROBE_TOKENS,), generator=generator).to(self.device)

    def _bare(self, probe: Tensor) -> None:
        self.model(input_ids=probe[None], use_cache=False, logits_to_keep=1)


def _heads(model: PreTrainedModel) -> tuple[int, ...]:
    config = model.config.get_text_config()
    return tuple(getattr(config, name, None) or 0 for name in ("num_attention_heads", "num_key_value_heads"))


def _bytes(model: PreTrainedModel) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def kv_slots(shapes: Sequence[tuple[int, int, int]], nbytes: int, dtype: torch.dtype) -> int:
    """How many tokens' keys and values fit in ``nbytes``."""
    return nbytes // PagedKV.token_bytes(list(shapes), dtype)
