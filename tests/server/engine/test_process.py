"""The engine process at its start: what it says when it cannot serve, and how loud it is."""

import logging
import signal
from typing import Any

import pytest
import torch

from tests.support.backbones import build
from weft.adapters_store.errors import StoreIOError
from weft.kernels.dispatch import KernelsUnavailable
from weft.server.backbone.errors import BackboneDamaged
from weft.server.backbone.model import Backbone
from weft.server.engine import engine as engines
from weft.server.engine import process
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import StartFailed

CONFIG = EngineConfig(model="m", store="/s")
HOST = "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"


class Pipe:
    """Remembers what was said."""

    def __init__(self):
        self.said = []

    def send(self, said):
        self.said.append(said)


def start(monkeypatch, error):
    def load(config):
        raise error

    monkeypatch.setattr(engines.Engine, "load", load)
    pipe: Any = Pipe()
    process._serve(process.Front(pipe), CONFIG)
    (said,) = pipe.said
    assert isinstance(said, StartFailed)
    return said.message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BackboneDamaged("'m': expected every parameter"), "'m': expected every parameter"),
        (KernelsUnavailable("kernels=triton needs a GPU"), "kernels=triton needs a GPU"),
        (ValueError("device: expected cpu"), "device: expected cpu"),
        (StoreIOError("clearing images: expected"), "store /s: clearing images: expected"),
        (torch.OutOfMemoryError("CUDA out of memory"), "kv_bytes_max, got too little: lower one of them"),
        (RuntimeError(HOST), "got too little: lower one of them"),
        (MemoryError(), "got too little: lower one of them"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_operator_can_change_is_said_in_words(error, words, monkeypatch):
    assert words in start(monkeypatch, error)


def test_a_defect_is_not_taken_for_a_wrong_option(monkeypatch):
    with pytest.raises(RuntimeError, match="what is this"):
        start(monkeypatch, RuntimeError("what is this"))


@pytest.mark.parametrize("option", ["adapter_memory_bytes_max", "working_set_bytes_max", "kv_bytes_max"])
def test_memory_that_cannot_be_had_names_its_option(option, tmp_path):
    sizes = {"adapter_memory_bytes_max": 1 << 20, "working_set_bytes_max": 1 << 20, "kv_bytes_max": 1 << 20}
    config = EngineConfig(model="m", store=str(tmp_path), **(sizes | {option: 1 << 50}))
    with pytest.raises(ValueError, match=f"^{option}: expected memory for .* bytes on cpu, got too little"):
        engines.Engine(config, Backbone(build("llama")))


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "composed" / "folder").mkdir(parents=True)
    config = EngineConfig(model="m", store=str(tmp_path), kv_bytes_max=1 << 20, adapter_memory_bytes_max=1 << 20)
    with pytest.raises(StoreIOError, match="clearing images"):
        engines.Engine(config, Backbone(build("llama")))


@pytest.mark.parametrize("level", ["debug", "error"])
def test_it_logs_at_the_level_that_was_asked_for(level, monkeypatch):
    told = {}
    monkeypatch.setattr(logging, "basicConfig", lambda **said: told.update(said))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(process, "_die_with_parent", lambda: None)
    monkeypatch.setattr(process, "_serve", lambda front, config: None)
    pipe: Any = Pipe()
    process.main(pipe, EngineConfig(model="m", store="s", log_level=level))
    assert told["level"] == level.upper()
