"""Single steps of a few sequences, always of one shape, in which each carries a method of a family."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.support.backbones import VOCABULARY
from tests.support.families import Family
from weft.adapters_store.traits import traits_of
from weft.kernels.batch import Block, Segment, SoftSpan
from weft.kernels.extras import Kind
from weft.server.backbone.step import PagedKV, PrefillSpan, SideSpan, Step
from weft.server.engine.messages import RequestId, Submit
from weft.server.engine.request import NO_TRAITS, Request
from weft.server.engine.runner import Runner
from weft.server.engine.scheduler import Batch, Item

TOKENS = 8
# sequences of a batch
COMPANY = 10
# tokens that each of them has cached while it decodes; they are padded to two lengths
CACHED = (20, 63, 9, 30, 25, 70, 120, 12, 40, 100)
# what each is given then; adapters that embed tokens anew have it
TOKEN = 9
PAGE_TOKENS = 16


class Company:
    """A family's blocks, none of which ever moves, and steps made of them."""

    def __init__(self, family: Family):
        self._engine, self.names = family.offline.engine, family.names
        self._family = family
        self._blocks: dict[str, Block] = {}
        self._known: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, VOCABULARY, (COMPANY * TOKENS,), generator=generator)
        drawn = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in CACHED]
        self._prompts = [(*tokens, TOKEN) for tokens in drawn]
        backbone = self._engine.backbone
        # of each sequence, and of a network beside the backbone
        self._pages = -(-2 * max(CACHED) // PAGE_TOKENS)
        slots = (1 + COMPANY * self._pages) * PAGE_TOKENS
        self._kv = PagedKV(backbone.kv_shapes, slots, backbone.dtype, backbone.device)
        for kept in (*self._kv.keys, *self._kv.values):
            kept.normal_(generator=generator)
        self._kv.clear_scratch(PAGE_TOKENS)
        self._runner = Runner(backbone, self._engine.kernels, self._kv, PAGE_TOKENS)

    def of(self, name: str) -> list[str]:
        """A method and those that follow it in the list, as many as a batch has sequences."""
        at = self.names.index(name)
        return [self.names[(at + i) % len(self.names)] for i in range(COMPANY)]

    def base(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
        """What ``prompted`` and ``decoded`` make of nothing but rows of the base."""
        if not self._known:
            nobody = [None] * COMPANY
            self._known = {"prompted": self.prompted(nobody), "decoded": self.decoded(nobody, monkeypatch)}
        return self._known["prompted"], self._known["decoded"]

    def block(self, name: str) -> Block:
        """The operators of a method, on the device for good."""
        if name not in self._blocks:
            digest = self._family.digest(name)
            while (lease := self._engine.residency.acquire(digest)) is None:
                self._engine.step()
            # never released: blocks stay where they are
            self._blocks[name] = lease.block
        return self._blocks[name]

    def prompted(self, carried: Sequence[str | None]) -> Tensor:
        """Logits [sequences, tokens, vocabulary] of one pass in which sequence i carries ``carried[i]``."""
        backbone, kernels = self._engine.backbone, self._engine.kernels
        count = len(carried)
        # those of networks beside the backbone, which share slots out, stand behind the texts'
        kv = PagedKV(backbone.kv_shapes, 1 + 2 * count * TOKENS, backbone.dtype, backbone.device)
        slots = torch.arange(1, 1 + count * TOKENS)
        spans, segments, soft, side = [], [], [], []
        positions = torch.arange(TOKENS).repeat(count)
        for i, name in enumerate(carried):
            start, stop = i * TOKENS, (i + 1) * TOKENS
            block = None if name is None else self.block(name)
            segments.append(Segment(start, stop, block))
            traits = None if block is None else traits_of(block.directory)
            prefixed = block is not None and Kind.PREFIX in block.directory.kinds
            shift = 0 if traits is None else traits.position_offset
            positions[start:stop] += shift
            spans.append(PrefillSpan(start, stop, slots[start:stop], prefixed, shift > 0))
            if traits is not None and traits.extra_rows:
                assert block is not None
                soft.append(SoftSpan(start, start + min(traits.extra_rows, TOKENS), 0, block))
            if traits is not None and traits.side_reduction:
                first = (1 + (count + i) * TOKENS) * traits.side_reduction
                side.append(SideSpan(start, stop, torch.arange(first, first + TOKENS), shift))
        rows = kernels.rows(segments)
        step = Step(kv, slots, (), tuple(spans), kernels, rows, rows, tuple(soft), tuple(side))
        keep = torch.arange(count * TOKENS)
        return backbone.forward(self.ids, positions, keep, step).view(count, TOKENS, -1)

    def decoded(self, carried: Sequence[str | None], monkeypatch: pytest.MonkeyPatch) -> Tensor:
        """Logits [sequences, vocabulary] of one step in which each sequence has one row more than it has cached."""
        items = []
        for i, (name, cached, prompt) in enumerate(zip(carried, CACHED, self._prompts, strict=True)):
            block = None if name is None else self.block(name)
            traits = NO_TRAITS if block is None else traits_of(block.directory)
            pages = tuple(range(1 + i * self._pages, 1 + (i + 1) * self._pages))
            slots = torch.arange(pages[0] * PAGE_TOKENS, (pages[-1] + 1) * PAGE_TOKENS)
            submit = Submit(RequestId(str(i)), prompt[traits.extra_rows :], 1)
            request = Request(submit, 0.0, computed=cached, pages=pages, slots=slots, traits=traits)
            items.append(Item(request, cached, 1, samples=True, block=block))
        seen: list[Tensor] = []
        forward = self._engine.backbone.forward

        def kept(*given: object) -> Tensor:
            seen.append(forward(*given))  # type: ignore[arg-type]
            return seen[-1]

        with monkeypatch.context() as patched:
            patched.setattr(self._engine.backbone, "forward", kept)
            self._runner.run(Batch(tuple(items)))
        return seen[0]
