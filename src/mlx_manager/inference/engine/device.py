"""The one thread that owns MLX: loads, forward passes, sampling and frees happen on it; everybody else sends it work.

MLX streams belong to the thread that made them, and one accelerator gains nothing from two drivers, so there is one thread
for all models; their engines take turns by the step.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class Steppable(Protocol):
    """What the device thread runs: one `step` is one turn. `has_work` and `step` are called on the device thread only."""

    @property
    def has_work(self) -> bool: ...

    def step(self) -> None: ...


class Device:
    """Starts with `start`, ends with `stop`. `post` and `run` may be called from any thread."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._engines: list[Steppable] = []
        self._thread = threading.Thread(target=self._loop, name="mlx-device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the turn it is in. What still runs gets no more tokens: drain first."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def post(self, work: Callable[[], None]) -> None:
        """Runs `work` on the device thread before its next turn; returns at once."""
        self._inbox.put(work)

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` on the device thread and gives back what it returns or raises. `work` runs even if the caller goes."""
        future: Future[T] = Future()

        def settle() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it is the caller's, not this loop's
                future.set_exception(error)

        self.post(settle)
        return await asyncio.shield(asyncio.wrap_future(future))

    def attach(self, engine: Steppable) -> None:
        """Gives an engine its turns. On the device thread."""
        self._engines.append(engine)

    def detach(self, engine: Steppable) -> None:
        """Takes an engine's turns away. On the device thread."""
        self._engines.remove(engine)

    def _loop(self) -> None:
        while True:
            idle = not any(engine.has_work for engine in self._engines)
            try:
                while True:
                    work = self._inbox.get(block=idle)
                    if work is None:
                        return
                    work()
                    idle = False
            except queue.Empty:
                pass
            for engine in list(self._engines):
                if engine.has_work:
                    engine.step()
