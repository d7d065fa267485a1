"""One model's continuous batching: take submissions → plan → run → deliver, one turn at a time on the device thread."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_manager.core.errors import EngineFault
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.scheduler import Chunk, Scheduler
from mlx_manager.inference.engine.sequence import Ended, EndReason, Sequence, SequenceSpec, Token

log = logging.getLogger(__name__)

Item = Token | Ended | EngineFault


class ForwardPasses(Protocol):
    """What the engine needs of a `Runner`. What `decode` returns comes back to `read`, untouched."""

    def prefill(self, chunk: Chunk) -> None: ...
    def decode(self, rows: Items[Sequence]) -> "PendingStep": ...
    def read(self, pending: Any) -> list[Token]: ...
    def forget(self, sequence: Sequence) -> None: ...
    def clear(self) -> None: ...


class PendingStep(Protocol):
    @property
    def rows(self) -> tuple[Sequence, ...]: ...


@dataclass(slots=True)
class Counters:
    """What the engine has done since it started; written on the device thread, read anywhere."""

    decode_steps: int = 0
    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    faults: int = 0


class TokenStream(AsyncIterator[Token | Ended]):
    """The tokens of one submission, on the event loop that asked for them. Ends after the `Ended` of every sequence;
    raises `EngineFault` if the engine failed. Closing it early cancels what still runs."""

    def __init__(self, engine: "Engine", sequences: tuple[Sequence, ...]) -> None:
        self._engine = engine
        self.loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._arrived = asyncio.Event()
        self._running = {s.index: s for s in sequences}

    async def __anext__(self) -> Token | Ended:
        while not self._items:
            if not self._running:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        item = self._items.popleft()
        if isinstance(item, EngineFault):
            self._running.clear()
            raise EngineFault(item.message) from item.__cause__  # one of its own: others may be told of the same fault
        if isinstance(item, Ended):
            self._running.pop(item.index, None)
        return item

    def cancel(self, index: int) -> None:
        """Stops one sequence: its tokens that are on their way still come, its `Ended` does not."""
        sequence = self._running.pop(index, None)
        if sequence is not None:
            self._engine.cancel(sequence)

    def close(self) -> None:
        for index in list(self._running):
            self.cancel(index)

    def deliver(self, item: Item) -> None:
        """On the event loop."""
        self._items.append(item)
        self._arrived.set()


Delivery = tuple[TokenStream, Item]


class Engine:
    """Submissions come from an event loop; everything else happens on the device thread.

    One step ahead: step N + 1 is queued before the tokens of step N are read, so the device does not wait for the host.
    A sequence that turns out to have ended at N has a surplus token in N + 1, which is dropped.
    """

    def __init__(self, device: Device, runner: ForwardPasses, scheduler: Scheduler) -> None:
        self._device = device
        self._runner = runner
        self._scheduler = scheduler
        self._streams: dict[Sequence, TokenStream] = {}
        self._pending: PendingStep | None = None
        self.counters = Counters()

    # ---- from an event loop

    def submit(self, specs: Items[SequenceSpec]) -> TokenStream:
        """Starts work on `specs`; the items of the stream say by `index` which they belong to."""
        sequences = tuple(Sequence(spec, index) for index, spec in enumerate(specs))
        stream = TokenStream(self, sequences)

        def add() -> None:
            for sequence in sequences:
                self._streams[sequence] = stream
                self._scheduler.add(sequence)

        if not self._device.post(add):
            stream.deliver(EngineFault("The server is shutting down."))
        return stream

    def cancel(self, sequence: Sequence) -> None:
        self._device.post(lambda: self._drop(sequence))

    def abort(self, fault: EngineFault) -> None:
        """Ends every sequence, its stream with `fault`."""
        self._device.post(lambda: self._hand_over(self._fail_all(fault)))

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    # ---- on the device thread

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._pending is not None

    def step(self) -> None:
        """Queues the next pass, then reads the one before. A fault fails what is under way; the engine goes on."""
        deliveries: list[Delivery] = []
        try:
            self._advance(deliveries)
        except Exception as error:
            log.exception("the engine failed; the requests it was serving are told")
            self.counters.faults += 1
            fault = EngineFault("The engine failed while it was working on this request.")
            fault.__cause__ = error
            deliveries += self._fail_all(fault)
        self._hand_over(deliveries)

    def _advance(self, deliveries: list[Delivery]) -> None:
        plan = self._scheduler.plan()
        queued = self._runner.decode(plan.decode) if plan.decode else None
        for chunk in plan.prefill:
            self._runner.prefill(chunk)
            self.counters.prefilled_tokens += chunk.stop - chunk.start
        pending, self._pending = self._pending, queued
        if pending is not None:
            self._read(pending, deliveries)
        if queued is None:
            self._runner.clear()

    def _read(self, pending: PendingStep, deliveries: list[Delivery]) -> None:
        tokens = self._runner.read(pending)
        self.counters.decode_steps += 1
        for sequence, token in zip(pending.rows, tokens, strict=True):
            if sequence.finished:
                continue  # its surplus token
            stream = self._streams[sequence]
            reason: EndReason | None = "stop" if token.token in sequence.spec.stop_tokens else None
            if reason is None:
                if sequence.first_token is None:
                    sequence.first_token = time.monotonic()
                sequence.generated.append(token.token)
                self.counters.decoded_tokens += 1
                deliveries.append((stream, token))
                if len(sequence.generated) == sequence.spec.max_tokens:
                    reason = "length"
            if reason is not None:
                self._drop(sequence)
                deliveries.append((stream, Ended(sequence.index, reason, sequence.timing())))

    def _drop(self, sequence: Sequence) -> None:
        sequence.finished = True
        self._scheduler.remove(sequence)
        self._runner.forget(sequence)
        self._streams.pop(sequence, None)

    def _fail_all(self, fault: EngineFault) -> list[Delivery]:
        streams = dict.fromkeys(self._streams.values())
        for sequence in list(self._streams):
            self._drop(sequence)
        self._pending = None
        self._runner.clear()
        return [(stream, fault) for stream in streams]

    def _hand_over(self, deliveries: list[Delivery]) -> None:
        """All of a step's items cross to their event loop in one call. Work for a loop that is gone is dropped."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        for delivery in deliveries:
            by_loop.setdefault(delivery[0].loop, []).append(delivery)
        for loop, batch in by_loop.items():

            def deliver(batch: list[Delivery] = batch) -> None:
                for stream, item in batch:
                    stream.deliver(item)

            try:
                loop.call_soon_threadsafe(deliver)
            except RuntimeError:  # the loop is closed; asking first would leave a moment in which it closes
                for sequence in [s for s, stream in self._streams.items() if stream.loop is loop]:
                    self._drop(sequence)
