"""The fixture models by family: their folders, dialects and weights, each read once for all tests."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mlx_manager.hub.checkpoint import read
from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.sequence import Ended, SequenceSpec, Token, TokenSampling
from mlx_manager.inference.loader import EngineLimits, load_dialect
from mlx_manager.inference.loader import make_engine as build_engine

T = TypeVar("T")

MODELS = Path(__file__).parents[1] / "fixtures" / "models"
SHARED = Path(__file__).parents[3] / "shared"
FAMILIES = ("qwen3", "llama", "mistral", "gemma3_text", "glm4")
GREEDY = TokenSampling(seed=0, temperature=0.0)


def folder(family: str) -> Path:
    if not (MODELS / family / "config.json").exists():
        pytest.skip(f"the {family} fixture is not there yet")
    return MODELS / family


@cache
def dialect(family: str) -> Dialect:
    path = folder(family)
    return load_dialect(path, read(path, family).context_length)


@cache
def weights(family: str) -> Any:
    """The model itself, evaluated, so that any thread may use it."""
    model, _ = load_model(folder(family))
    return model


is_ahead = True
"""Whether engines are one step ahead, as on a GPU; or read each step at once, as on a CPU."""


def make_engine(device: Device, family: str, **limits: Any) -> Engine:
    """An engine of its own on shared weights, its books checked at every step. Must be detached by who attaches it."""
    asked = EngineLimits(**{"check_every": 1, "ahead": is_ahead, "step_s": 10.0, "kv_bytes": 64 << 20} | limits)
    return build_engine(weights(family), device, asked, vocab_size=dialect(family).vocab_size, model_key=family)


@dataclass
class attached:
    """An engine that gets its turns within the block."""

    device: Device
    engine: Engine

    async def __aenter__(self) -> Engine:
        await within(self.device.run(lambda: self.device.attach(self.engine)))
        return self.engine

    async def __aexit__(self, *_: object) -> None:
        await within(self.device.run(lambda: self.device.detach(self.engine)))


@cache
def _single_run(family: str, prompt: tuple[int, ...], max_tokens: int, stop_tokens: frozenset[int]) -> tuple[int, ...]:
    import mlx.core as mx  # noqa: PLC0415 - only where a reference is computed

    tokens: list[int] = []
    for token, _ in generate_step(mx.array(prompt), weights(family), max_tokens=max_tokens):
        if token in stop_tokens:
            break
        tokens.append(int(token))
    return tuple(tokens)


async def single_run(device: Device, family: str, spec: SequenceSpec) -> list[int]:
    """What mlx-lm's own loop generates greedily for this prompt alone."""
    return list(await device.run(lambda: _single_run(family, spec.prompt, spec.max_tokens, spec.stop_tokens)))


@dataclass
class Received:
    """What came of one sequence."""

    tokens: list[int] = field(default_factory=list[int])
    items: list[Token] = field(default_factory=list[Token])
    ended: Ended | None = None


async def receive(engine: Engine, specs: list[SequenceSpec]) -> list[Received]:
    received = [Received() for _ in specs]
    async for item in engine.submit(specs):
        match item:
            case Token(index, token):
                received[index].tokens.append(token)
                received[index].items.append(item)
            case Ended(index):
                received[index].ended = item
    return received


def words(lot: random.Random, count: int) -> tuple[int, ...]:
    """Ordinary tokens of every family."""
    return tuple(lot.randrange(300, 500) for _ in range(count))


async def eventually(condition: Callable[[], bool], *, within_s: float = 10) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what happens on another thread has no event to wait for
            await asyncio.sleep(0.002)


async def within(work: Coroutine[Any, Any, T], seconds: float = 20) -> T:
    """A hang becomes a failure."""
    async with asyncio.timeout(seconds):
        return await work
