"""Networks beside the backbone: its own kind of layers, several times narrower, that read its layers' outputs.

One is built of the decoder's own class from its configuration at the smaller width, without weights: each call is given
those of an adapter. It attends through the pages, in slots of its own, so its keys and values lie in memory that was
reserved for its request and needs no cache beside them. Nothing of it reaches the backbone but what the head reads.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from weft.adapters_store.sites import SideInfo
from weft.kernels.extras import Kind
from weft.kernels.parts import Carried, product
from weft.server.backbone.places import Places
from weft.server.backbone.recording import first_of
from weft.server.backbone.selftest import KVShape, difference
from weft.server.backbone.step import PagedKV, PrefillSpan, SideSpan, Step, active, running

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
        self._built: OrderedDict[tuple[int, tuple[int, ...]], Network] = OrderedDict()
        names = names_of(model, places)
        # only read where there are infos
        self.names = names or Names("", "", "")
        self.infos = () if names is None else tuple(self._provable())
        self.by_reduction = {info.reduction: info for info in self.infos}

    def network(self, reduction: int, layers: tuple[int, ...]) -> Network:
        """The one that is so much narrower and reads these layers."""
        key = reduction, layers
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

    def _build(self, reduction: int, layers: tuple[int, ...]) -> Network:
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
        return Network(module.eval(), self.names)

    def _works(self, info: SideInfo) -> bool:
        """Whether a text in two pieces, over narrowed pages, comes out as it does whole."""
        device, dtype = self._model.device, self._model.dtype
        layers = tuple(sorted({0, self._layers - 1}))
        network = self._build(info.reduction, layers)
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).mul(shape[-1] ** -0.5).to(device, dtype)

        parameters = {name: noise(*shape) for name, shape in network.shapes.items()}
        x, fed = noise(PROBE_TOKENS, info.features), [noise(PROBE_TOKENS, info.features) for _ in layers]
        kv = PagedKV(self._kv_shapes, 1 + 2 * PROBE_TOKENS, dtype, device)

        def run(first: int, start: int, stop: int) -> Tensor:
            slots = torch.arange(first, first + stop, device=device)
            span = SideSpan(start, stop, slots, start)
            with torch.inference_mode(), running(_own_step(kv, span, info.reduction, layers)):
                return network.run(
                    parameters, x[start:stop], slots[start:] - first, lambda i, z: z + fed[i][start:stop]
                )

        whole = run(info.reduction, 0, PROBE_TOKENS)
        behind = info.reduction + PROBE_TOKENS
        pieces = torch.cat([run(behind, 0, 2), run(behind, 2, PROBE_TOKENS)])
        right = whole.shape == x.shape and bool(whole.isfinite().all())
        return right and difference(whole.float(), pieces.float(), dtype) is None


def _own_step(kv: PagedKV, span: SideSpan, reduction: int, layers: Sequence[int]) -> Step:
    """The pass of a network: the keys and values of its layers lie where those of the layers that it reads do."""
    count = span.stop - span.start
    spans = (PrefillSpan(0, count, span.slots),)
    return Step(kv.narrowed(layers, reduction), span.slots[-count:], (), spans)


@dataclass(eq=False)
class Beside:
    """A network at work in a step: an adapter's, on the rows of one request.

    fed:  by layer, what it puts into the network; z: what the network begins with
    """

    span: SideSpan
    carried: Carried
    info: SideInfo
    z: Tensor
    fed: dict[int, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it reads."""
        return self.carried.record.options[1:]

    def pieces(self, layer: int) -> list[Tensor]:
        """Weights of one of its layers: down weight, down bias, then those of the block."""
        size = 2 + len(self.info.block)
        at = 5 + len(self.info.norm) + self.layers.index(layer) * size
        return _present(self.carried.pieces[at : at + size])

    def take(self, layer: int, x: Tensor) -> None:
        """Read a layer's output x [rows of the batch, d]."""
        if layer in self.layers:
            weight, bias, *_ = self.pieces(layer)
            self.fed[layer] = affine(x[self.carried.rows], weight, bias)

    def finish(self, network: Network, names: Names, kv: PagedKV) -> Tensor:
        """What the head reads in the place of the backbone's end: [rows, d]."""
        gates, _, _, up, up_bias, *norm = _present(self.carried.pieces[: 5 + len(self.info.norm)])

        def feed(index: int, z: Tensor) -> Tensor:
            # the model may have changed what it was given; the first layer gets the start itself
            before = self.z if index == 0 else z.float()
            return (gates[0, index] * before + self.fed[self.layers[index]]).to(z.dtype)

        given = {f"{names.norm}.{n}": t.reshape(s) for (n, s), t in zip(self.info.norm, norm, strict=True)}
        for index, layer in enumerate(self.layers):
            block = zip(self.info.block, self.pieces(layer)[2:], strict=True)
            given |= {f"{names.layers}.{index}.{n}": t.reshape(s) for (n, s), t in block}
        span = self.span
        positions = torch.arange(span.first, span.first + span.stop - span.start, device=up.device)
        with running(_own_step(kv, span, self.info.reduction, self.layers)):
            z = network.run(given, self.z.to(up.dtype), positions, feed)
        return affine(z, up, up_bias)


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
        assert step.kernels is not None
        assert step.rows is not None
        spans = {span.start: span for span in step.side}
        self._now = []
        for carried in step.kernels.carried(step.rows, Kind.SIDE, 0):
            span = spans[carried.segment.start]
            assert (span.start, span.stop) == (carried.segment.start, carried.segment.stop)
            weight, bias = _present(carried.pieces[1:3])
            info = self._networks.by_reduction[carried.record.options[0]]
            self._now.append(Beside(span, carried, info, affine(x[carried.rows], weight, bias)))

    def _reader(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            x = first_of(output)
            assert x is not None
            for beside in self._now:
                beside.take(layer, x[0])

        return hook

    def _end(self, _: nn.Module, args: Any, output: Any) -> None:
        kv, hidden = active().kv, output.last_hidden_state[0]
        now, self._now = self._now, []
        for beside in now:
            network = self._networks.network(beside.info.reduction, beside.layers)
            hidden[beside.carried.rows] = beside.finish(network, self._networks.names, kv).to(hidden.dtype)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weightᵀ + bias in fp32; the bias is a row."""
    return product(x, weight).float() + bias[0]


def _present(pieces: Sequence[Tensor | None]) -> list[Tensor]:
    found = [piece for piece in pieces if piece is not None]
    assert len(found) == len(pieces)
    return found
