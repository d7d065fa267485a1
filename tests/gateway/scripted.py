"""A backend that does what a test tells it to."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from mlx_manager.core.events import ChoiceFinished, Event, Finished, Started, TextDelta, Usage
from mlx_manager.core.requests import GenerationRequest

STARTED = Started(prompt_tokens=3)
HELLO = (STARTED, TextDelta("Hello"), ChoiceFinished("stop"), Finished(Usage(prompt=3, completion=1)))
WAIT = "wait"

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
