"""Networks beside the backbone: its own kind of layers, several times narrower, that read its layers' outputs.

One is built of the decoder's own class from its configuration at the smaller width, without weights: each call is given
those of an adapter. It attends through the pages, in slots of its own, so its keys and values lie in memory that was
reserved for its request and needs no cache beside them. Nothing of it reaches the backbone but what the head reads.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from weft.adapters_store.sites import SideInfo
from weft.kernels.extras import Kind
from weft.kernels.parts import Carried
from weft.server.backbone.beside import Beside, BesideRows, context_of, own_step, rows_step
from weft.server.backbone.places import Places
from weft.server.backbone.recording import first_of
from weft.server.backbone.selftest import KVShape, difference
from weft.server.backbone.side_rows import give_rows_weights
from weft.server.backbone.step import PagedKV, SideSpan, Step, active, running

# what a configuration calls widths that follow the model's
WIDTHS = ("hidden_size", "intermediate_size", "head_dim", "n_inner", "ffn_dim", "word_embed_proj_dim")
REDUCTION_MAX = 64
# what a family's code raises that was not written for the width it is asked for
UNBUILDABLE = (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError)
# networks kept built; they have no weights
BUILT_MAX = 16
PROBE_TOKENS = 5

Feed = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Names:
    """Paths in the model: of the decoder, and inside it of the list of layers and of the norm behind them."""

    decoder: str
    layers: str
    norm: str


def names_of(model: PreTrainedModel, places: Places) -> Names | None:
    """Where they are; None where layers stand in several lists, or no norm behind them."""
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), None)
    if path is None or not places.layers:
        return None
    prefix = f"{path}." if path else ""
    layers = places.layers[0].path.removeprefix(prefix).rpartition(".")[0]
    if [layer.path for layer in places.layers] != [f"{prefix}{layers}.{i}" for i in range(len(places.layers))]:
        return None
    inside, last = f"{prefix}{layers}.", places.norms[-1].path if places.norms else ""
    if not last.startswith(prefix) or last.startswith(inside):
        return None
    return Names(path, layers, last.removeprefix(prefix))


def reduced(config: PreTrainedConfig, reduction: int, layers: Sequence[int]) -> PreTrainedConfig | None:
    """The configuration of these layers at a smaller width; None if the widths do not divide."""
    small = deepcopy(config)
    for name in WIDTHS:
        width = getattr(small, name, None)
        if isinstance(width, int):
            if width % reduction:
                return None
            setattr(small, name, width // reduction)
    kinds = getattr(config, "layer_types", None)
    small.num_hidden_layers = len(layers)
    if kinds:
        small.layer_types = [kinds[layer] for layer in layers]
    return small


class Network:
    """The decoder's class at a smaller width. ``run`` is given its parameters; it has none of its own."""

    def __init__(self, module: nn.Module, names: Names):
        self._module, self._names = module, names
        self._feed: Feed | None = None
        self._calls = 0
        for index, layer in enumerate(module.get_submodule(names.layers).children()):
            layer.register_forward_pre_hook(self._entering(index))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters."""
        return {name: tuple(parameter.shape) for name, parameter in self._module.named_parameters()}

    def below(self, path: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the parameters of one of its modules."""
        module = self._module.get_submodule(path)
        return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())

    def run(self, parameters: Mapping[str, Tensor], z: Tensor, positions: Tensor, feed: Feed) -> Tensor:
        """z [tokens, d] through all layers and the norm.

        feed:  (index of a layer, z before it) → what the layer is given
        """
        # embeddings of positions that a family adds are none here: the first layer is fed z itself
        none = z.new_zeros(())
        given = {name: parameters.get(name, none.expand(shape)) for name, shape in self.shapes.items()}
        said = {"inputs_embeds": z[None], "position_ids": positions[None], "use_cache": False}
        self._feed, self._calls = feed, 0
        try:
            out = functional_call(self._module, given, (), said)
        finally:
            self._feed = None
        assert self._calls == len(list(self._module.get_submodule(self._names.layers).children()))
        made: Tensor = out.last_hidden_state[0]
        return made

    def _entering(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            assert self._feed is not None
            self._calls += 1
            return (self._feed(index, args[0][0])[None], *args[1:])

        return hook


class Networks:
    """The networks that can stand beside one model, built when they are first needed.

    infos:  which there are; none where the family's class does not work at another width
    """

    def __init__(self, model: PreTrainedModel, places: Places, kv_shapes: Sequence[KVShape]):
        self._model, self._kv_shapes = model, list(kv_shapes)
        self._decoder: PreTrainedModel = model.get_decoder()
        self._layers = len(places.layers)
        self._built: OrderedDict[tuple[int, tuple[int, ...], bool | None], Network] = OrderedDict()
        names = names_of(model, places)
        # only read where there are infos
        self.names = names or Names("", "", "")
        self.infos = () if names is None else tuple(self._provable())
        self.by_reduction = {info.reduction: info for info in self.infos}
        # how rows run as one: with norms that get their heads first, or second; None where they do not
        orders = (order for order in (False, True) if self.infos and self._works_by_rows(self.infos[-1], order))
        self.heads_first: bool | None = next(orders, None)

    def network(self, reduction: int, layers: tuple[int, ...], by_rows: bool = False) -> Network:
        """The one that is so much narrower and reads these layers; ``by_rows``: with weights of each row's own."""
        assert not by_rows or self.heads_first is not None
        key = reduction, layers, self.heads_first if by_rows else None
        network = self._built.pop(key, None) or self._build(*key)
        self._built[key] = network
        if len(self._built) > BUILT_MAX:
            self._built.popitem(last=False)
        return network

    def _provable(self) -> Iterator[SideInfo]:
        try:
            if len(set(self._of_layers())) == 1:
                found = [info for info in map(self._info, range(2, REDUCTION_MAX + 1)) if info is not None]
                if found and self._works(found[-1]):
                    yield from found
        except UNBUILDABLE:
            return

    def _of_layers(self) -> Iterator[tuple[tuple[str, torch.Size], ...]]:
        for layer in self._decoder.get_submodule(self.names.layers).children():
            yield tuple((name, parameter.shape) for name, parameter in layer.named_parameters())

    def _info(self, reduction: int) -> SideInfo | None:
        """What a catalogue tells of the network that is so much narrower; None if there is none."""
        sizes = {size for _, key, value in self._kv_shapes for size in (key, value)}
        # rope turns pairs
        if any(size % (2 * reduction) for size in sizes) or reduced(self._decoder.config, reduction, (0,)) is None:
            return None
        network, names = self._build(reduction, (0,)), self.names
        width: int = self._decoder.config.hidden_size // reduction
        return SideInfo(reduction, width, network.below(f"{names.layers}.0"), network.below(names.norm))

    def _build(self, reduction: int, layers: tuple[int, ...], heads_first: bool | None = None) -> Network:
        config = reduced(self._decoder.config, reduction, layers)
        assert config is not None, "no catalogue tells of a reduction whose widths do not divide"
        with torch.device("meta"):
            module = type(self._decoder)(config)
        for path, owner in list(module.named_modules()):
            # what is no weight, frequencies of rope, is made for good
            if path and any(True for _ in owner.buffers(recurse=False)) and not any(True for _ in owner.parameters()):
                parent, _, child = path.rpartition(".")
                with torch.device(self._model.device):
                    setattr(module.get_submodule(parent), child, type(owner)(owner.config))
        if heads_first is not None:
            give_rows_weights(module.get_submodule(self.names.layers), heads_first)
            owner, _, name = self.names.norm.rpartition(".")
            give_rows_weights(module.get_submodule(owner), heads_first, only=name)
        return Network(module.eval(), self.names)

    def _works(self, info: SideInfo) -> bool:
        """Whether a text in two pieces, over narrowed pages, comes out as it does whole."""
        layers = tuple(sorted({0, self._layers - 1}))
        network, device, dtype = self._build(info.reduction, layers), self._model.device, self._model.dtype
        noise = _Noise(device, dtype)
        parameters = {name: noise(*shape) for name, shape in network.shapes.items()}
        x, fed = noise(PROBE_TOKENS, info.features), [noise(PROBE_TOKENS, info.features) for _ in layers]
        kv = PagedKV(self._kv_shapes, 1 + 2 * PROBE_TOKENS, dtype, device)

        def run(first: int, start: int, stop: int) -> Tensor:
            slots = torch.arange(first, first + stop, device=device)
            span = SideSpan(start, stop, slots, start)
            with torch.inference_mode(), running(own_step(kv, span, info.reduction, layers)):
                return network.run(
                    parameters, x[start:stop], slots[start:] - first, lambda i, z: z + fed[i][start:stop]
                )

        whole = run(info.reduction, 0, PROBE_TOKENS)
        behind = info.reduction + PROBE_TOKENS
        pieces = torch.cat([run(behind, 0, 2), run(behind, 2, PROBE_TOKENS)])
        right = whole.shape == x.shape and bool(whole.isfinite().all())
        return right and difference(whole.float(), pieces.float(), dtype) is None

    def _works_by_rows(self, info: SideInfo, heads_first: bool) -> bool:
        """Whether rows that run as one, each with its own weights, come out as they do one by one."""
        layers = tuple(sorted({0, self._layers - 1}))
        device, dtype = self._model.device, self._model.dtype
        noise, kv = _Noise(device, dtype), PagedKV(self._kv_shapes, 1 + PROBE_TOKENS, dtype, device)
        spans = [SideSpan(i, i + 1, torch.tensor([info.reduction + i], device=device), i) for i in range(PROBE_TOKENS)]
        x, positions = noise(PROBE_TOKENS, info.features), torch.arange(PROBE_TOKENS, device=device)
        shapes = dict(self._named(layers, info))
        own = [{name: noise(*shape) for name, shape in shapes.items()} for _ in spans]
        stacked = {name: torch.stack([each[name] for each in own]) for name in shapes}

        def run(network: Network, given: Mapping[str, Tensor], rows: slice, step: Step) -> Tensor:
            with torch.inference_mode(), running(step):
                return network.run(given, x[rows], positions[rows], lambda _, z: z)

        alone = self._build(info.reduction, layers)
        one_by_one = [
            run(alone, own[i], slice(i, i + 1), own_step(kv, span, info.reduction, layers))
            for i, span in enumerate(spans)
        ]
        try:
            step = rows_step(kv, spans, info.reduction, layers)
            together = run(self._build(info.reduction, layers, heads_first), stacked, slice(None), step)
        except UNBUILDABLE:
            return False
        want = torch.cat(one_by_one)
        return together.shape == want.shape and difference(want.float(), together.float(), dtype) is None

    def _named(self, layers: Sequence[int], info: SideInfo) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names in the network, and shapes, of what an adapter holds."""
        for index in range(len(layers)):
            yield from ((f"{self.names.layers}.{index}.{name}", shape) for name, shape in info.block)
        yield from ((f"{self.names.norm}.{name}", shape) for name, shape in info.norm)


class _Noise:
    """Seeded tensors whose products stay near one."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._generator, self._to = torch.Generator().manual_seed(0), (device, dtype)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).mul(shape[-1] ** -0.5).to(*self._to)


class SideHook:
    """The hooks of a model on which networks stand: its first layer's input, all outputs, and its end."""

    def __init__(self, networks: Networks):
        self._networks, self._now = networks, list[Beside]()

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register them."""
        names = self._networks.names
        decoder = model.get_submodule(names.decoder)
        layers = list(decoder.get_submodule(names.layers).children())
        yield layers[0].register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, layer in enumerate(layers):
            yield layer.register_forward_hook(self._reader(index))
        yield decoder.register_forward_hook(self._end)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step, x = active(), (args[0] if args else kwargs["hidden_states"])[0]
        self._now = list(self._beside(step))
        for beside in self._now:
            beside.begin(x)

    def _beside(self, step: Step) -> Iterator[Beside]:
        assert step.kernels is not None
        assert step.rows is not None
        spans = {span.start: span for span in step.side}
        by_context: dict[int, list[Carried]] = {}
        for carried in step.kernels.carried(step.rows, Kind.SIDE, 0):
            span = spans[carried.segment.start]
            assert (span.start, span.stop) == (carried.segment.start, carried.segment.stop)
            if carried.single and self._networks.heads_first is not None:
                by_context.setdefault(context_of(span), []).append(carried)
            else:
                yield Beside(self._info_of(carried), carried, span)
        for padded in by_context.values():
            for alike, stacks in step.kernels.alike(padded):
                its = [spans[carried.segment.start] for carried in alike.carried]
                yield BesideRows(self._info_of(alike.carried[0]), alike, stacks, its)

    def _info_of(self, carried: Carried) -> SideInfo:
        return self._networks.by_reduction[carried.record.options[0]]

    def _reader(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            x = first_of(output)
            assert x is not None
            for beside in self._now:
                beside.read(layer, x[0])

        return hook

    def _end(self, _: nn.Module, args: Any, output: Any) -> None:
        kv, hidden = active().kv, output.last_hidden_state[0]
        now, self._now = self._now, []
        for beside in now:
            by_rows = isinstance(beside, BesideRows)
            network = self._networks.network(beside.info.reduction, beside.layers, by_rows)
            beside.finish(hidden, network, self._networks.names, kv)
