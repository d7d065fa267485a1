"""A backend that does what a test tells it to."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

from mlx_manager.core.events import ChoiceFinished, Event, Finished, Started, TextDelta, Usage
from mlx_manager.core.requests import EmbeddingRequest, GenerationRequest, RerankRequest
from mlx_manager.core.vectors import Embeddings, Ranking

STARTED = Started(prompt_tokens=3)
HELLO = (STARTED, TextDelta("Hello"), ChoiceFinished("stop"), Finished(Usage(prompt=3, completion=1)))
WAIT = "wait"

T = TypeVar("T")
Step = Event | BaseException | str


class Scripted:
    """Yields the events of its script in order, raises its exceptions, and at `WAIT` waits until it is closed.
    The script can be changed between requests."""

    name = "scripted"

    def __init__(self, *script: Step) -> None:
        self.script: Sequence[Step] = script
        self.num_open = 0
        self.requests: list[GenerationRequest] = []

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        self.requests.append(request)
        self.num_open += 1
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, str):
                    await asyncio.Event().wait()
                else:
                    yield step
        finally:
            self.num_open -= 1

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        return await self._measured(Embeddings((b"",), 7))

    async def rerank(self, request: RerankRequest) -> Ranking:
        return await self._measured(Ranking((0.5,), 7))

    async def _measured(self, made: T) -> T:
        """What the script says of failing and waiting; then that."""
        self.num_open += 1
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, str):
                    await asyncio.Event().wait()
        finally:
            self.num_open -= 1
        return made
