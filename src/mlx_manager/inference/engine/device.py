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

from mlx_manager.core.errors import EngineFault

T = TypeVar("T")
log = logging.getLogger(__name__)


class Steppable(Protocol):
    """What the device thread runs: one `step` is one turn. `has_work` and `step` are called on the device thread only."""

    @property
    def has_work(self) -> bool: ...

    def step(self) -> None: ...

    def flush(self) -> None:
        """Lets nobody wait for what is done while others have their turns."""
        ...


class Device:
    """Starts with `start`, ends with `stop`. `post` and `run` may be called from any thread."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._after_turn: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._engines: list[Steppable] = []
        self._thread = threading.Thread(target=self._loop, name="mlx-device", daemon=True)
        self._stopping = False
        self._ended = threading.Event()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread's work after the turn it is in and what was posted before. What still runs gets no more tokens:
        drain first.

        The thread itself rests until the process ends. Before Python 3.13 a joined thread may still be in its destructors, and
        MLX's take the GIL: if the interpreter is being taken apart by then, the process aborts.
        """
        self._stopping = True
        if self.is_alive:
            self._inbox.put(None)
            self._ended.wait()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._ended.is_set()

    def post(self, work: Callable[[], None], *, after_turn: bool = False) -> bool:
        """Runs `work` on the device thread before its next turn, or after it; returns at once. False if the device has stopped: it never
        runs."""
        if self._stopping:
            return False
        if after_turn:
            self._after_turn.put(work)
            work = _nothing  # it is woken
        self._inbox.put(work)
        return True

    async def run(self, work: Callable[[], T], *, after_turn: bool = False) -> T:
        """Runs `work` on the device thread and gives back what it returns or raises. `work` runs even if the caller goes. Who asks for one
        thing after the other has each `after_turn`: before it, there would be no turns in between. Raises `EngineFault` once the device
        has stopped."""
        future: Future[T] = Future()

        def settle() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it is the caller's, not this loop's
                future.set_exception(error)

        if not self.post(settle, after_turn=after_turn):
            raise EngineFault("The server is shutting down.")
        return await asyncio.shield(asyncio.wrap_future(future))

    def attach(self, engine: Steppable) -> None:
        """Gives an engine its turns. On the device thread."""
        self._engines.append(engine)

    def detach(self, engine: Steppable) -> None:
        """Takes an engine's turns away. On the device thread."""
        self._engines.remove(engine)

    def _loop(self) -> None:
        while self._empty_inbox(wait=not any(engine.has_work for engine in self._engines)):
            self._take_turns()
            self._work_after_turn()
        self._work_after_turn()
        self._engines.clear()
        self._ended.set()
        threading.Event().wait()

    def _take_turns(self) -> None:
        """A function of its own, so that this thread holds no engine while it waits: one that has been detached is to be freed."""
        working = [engine for engine in self._engines if engine.has_work]
        for engine in working:
            _guarded(engine.step)
            if len(working) > 1 or not self._inbox.empty():
                _guarded(engine.flush)

    def _work_after_turn(self) -> None:
        for _ in range(self._after_turn.qsize()):
            _guarded(self._after_turn.get())

    def _empty_inbox(self, *, wait: bool) -> bool:
        """Does the work that was posted, after waiting for some if there is nothing else to do. False at the end."""
        goes_on = True
        try:
            while True:
                work = self._inbox.get(block=wait)
                wait = False
                if work is None:
                    goes_on = False
                else:
                    _guarded(work)
                    del work  # nor what came with it
        except queue.Empty:
            return goes_on


def _nothing() -> None: ...


def _guarded(work: Callable[[], None]) -> None:
    """Nothing that one engine does may end the thread that all of them need."""
    try:
        work()
    except Exception:
        log.exception("work on the device thread failed")
