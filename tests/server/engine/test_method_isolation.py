"""The isolation promise, method by method, bit for bit: in batches of one shape no row sees what others carry.

Once for pieces of prompts, and once for steps in which every sequence has one row, over keys and values that are kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.server.engine.test_methods import CASES, PAIRS
from tests.support.backbones import VOCABULARY, build
from weft.adapters_store.traits import traits_of
from weft.kernels.batch import Block, Segment, SoftSpan
from weft.kernels.extras import Kind
from weft.server.backbone.model import Backbone
from weft.server.backbone.step import PagedKV, PrefillSpan, SideSpan, Step
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import RequestId, Submit
from weft.server.engine.offline import OfflineEngine
from weft.server.engine.request import NO_TRAITS, Request
from weft.server.engine.runner import Runner
from weft.server.engine.scheduler import Batch, Item

TOKENS = 8
# sequences of a batch
COMPANY = 10
# tokens that each of them has cached while it decodes; they are padded to two lengths
CACHED = (20, 63, 9, 30, 25, 70, 120, 12, 40, 100)
# the one that is watched
WATCHED = 4
# what each is given then; adapters that embed tokens anew have it
TOKEN = 7
PAGE_TOKENS = 16


class Company:
    """Batches of a few sequences, always of one shape, in which each carries a method of a family."""

    def __init__(self, family: str, folder: Path):
        config = EngineConfig(
            model=family, store=str(folder / "store"), adapter_memory_bytes_max=64 << 20, kv_bytes_max=4 << 20
        )
        self.offline = OfflineEngine(config, Backbone(build(family)))
        self.names = [name for of, name in PAIRS if of == family]
        self.blocks = {name: self._block(name, family, folder / name) for name in self.names}
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, VOCABULARY, (COMPANY * TOKENS,), generator=generator)
        drawn = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in CACHED]
        self._prompts = [(*tokens, TOKEN) for tokens in drawn]
        backbone = self.offline.engine.backbone
        # of each sequence, and of a network beside the backbone
        self._pages = -(-2 * max(CACHED) // PAGE_TOKENS)
        slots = (1 + COMPANY * self._pages) * PAGE_TOKENS
        self._kv = PagedKV(backbone.kv_shapes, slots, backbone.dtype, backbone.device)
        for kept in (*self._kv.keys, *self._kv.values):
            kept.normal_(generator=generator)
        self._kv.clear_scratch(PAGE_TOKENS)
        self._runner = Runner(backbone, self.offline.engine.kernels, self._kv, PAGE_TOKENS)

    def company(self, name: str) -> list[str]:
        """A method and those that follow it in the list, as many as a batch has sequences."""
        at = self.names.index(name)
        return [self.names[(at + i) % len(self.names)] for i in range(COMPANY)]

    def _block(self, name: str, family: str, folder: Path) -> Block:
        digest = self.offline.register(name, CASES[name].make(family, folder, sum(name.encode())))
        residency = self.offline.engine.residency
        while (lease := residency.acquire(digest)) is None:
            self.offline.engine.step()
        # never released: blocks stay where they are
        return lease.block

    def logits(self, carried: Sequence[str | None]) -> Tensor:
        """Logits [sequences, tokens, vocabulary] of one pass in which sequence i carries ``carried[i]``."""
        backbone, kernels = self.offline.engine.backbone, self.offline.engine.kernels
        count = len(carried)
        # those of networks beside the backbone, which share slots out, stand behind the texts'
        kv = PagedKV(backbone.kv_shapes, 1 + 2 * count * TOKENS, backbone.dtype, backbone.device)
        slots = torch.arange(1, 1 + count * TOKENS)
        spans, segments, soft, side = [], [], [], []
        positions = torch.arange(TOKENS).repeat(count)
        for i, name in enumerate(carried):
            start, stop = i * TOKENS, (i + 1) * TOKENS
            block = None if name is None else self.blocks[name]
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
            block = None if name is None else self.blocks[name]
            traits = NO_TRAITS if block is None else traits_of(block.directory)
            pages = tuple(range(1 + i * self._pages, 1 + (i + 1) * self._pages))
            slots = torch.arange(pages[0] * PAGE_TOKENS, (pages[-1] + 1) * PAGE_TOKENS)
            submit = Submit(RequestId(str(i)), prompt[traits.extra_rows :], 1)
            request = Request(submit, 0.0, computed=cached, pages=pages, slots=slots, traits=traits)
            items.append(Item(request, cached, 1, samples=True, prefill=False, block=block))
        backbone = self.offline.engine.backbone
        seen: list[Tensor] = []
        forward = backbone.forward

        def kept(*given: Any) -> Tensor:
            seen.append(forward(*given))
            return seen[-1]

        with monkeypatch.context() as patched:
            patched.setattr(backbone, "forward", kept)
            self._runner.run(Batch(tuple(items)))
        return seen[0]


@pytest.fixture(scope="module")
def companies(tmp_path_factory):
    made: dict[str, Company] = {}

    def company(family: str) -> Company:
        if family not in made:
            made[family] = Company(family, tmp_path_factory.mktemp(family))
        return made[family]

    return company


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_neighbours_change_nothing(companies, family, method):
    batch = companies(family)
    mixed = batch.company(method)
    own, *others = mixed
    row = batch.logits(mixed)[0]
    assert torch.equal(batch.logits([own, *([None] * len(others))])[0], row), "beside rows of the base"
    assert torch.equal(batch.logits([own, *others[::-1]])[0], row), "beside others"
    # the control: it is not the base's row
    acts_later = traits_of(batch.blocks[method].directory).token_mask
    assert acts_later or not torch.equal(batch.logits([None] * COMPANY)[0], row)


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_neighbours_change_nothing_while_decoding(companies, family, method, monkeypatch):
    batch = companies(family)
    own, *others = batch.company(method)

    def row(others: Sequence[str | None]) -> Tensor:
        return batch.decoded([*others[:WATCHED], own, *others[WATCHED:]], monkeypatch)[WATCHED]

    want = row(others)
    assert torch.equal(row([None] * len(others)), want), "beside rows of the base"
    assert torch.equal(row(others[::-1]), want), "beside others"
    assert torch.equal(row([own, None] * (len(others) // 2) + [own]), want), "beside rows of its own"
    # the control: it is not the base's row, unless all of the adapter stands in front of the text
    directory = batch.blocks[method].directory
    only_in_front = directory.kinds == {Kind.SOFT} and not directory.sites.any()
    assert only_in_front == torch.equal(batch.decoded([None] * COMPANY, monkeypatch)[WATCHED], want)
