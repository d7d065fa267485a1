"""Where a step is read at once, it stands still between two layers while the first token of somebody more urgent is computed: if others
of that urgency have come before."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from mlx_manager.core.requests import Priority
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine, TokenStream
from mlx_manager.inference.engine.sequence import SequenceSpec, Token
from tests.inference.fixture_models import GREEDY, attached, eventually, make_engine, receive, single_run, within, words

pytestmark = pytest.mark.requirement("BATCH-04")

Hook = Callable[[Any, int], None]


def asking(prompt: tuple[int, ...], max_tokens: int, priority: Priority) -> SequenceSpec:
    return SequenceSpec(prompt, max_tokens, GREEDY, priority=priority)


def engine_in_turn(device: Device, family: str, **limits: object) -> Engine:
    engine = make_engine(device, family, ahead=False, **limits)
    if not engine.cache_state.kind.startswith("slots"):
        pytest.skip("a step is queued as a whole here")
    return engine


def between_layers(engine: Engine, hook: Hook) -> list[int]:
    """`hook(pending, depth)` is called on the device thread after each layer; depth 0 is a step that stands still for nobody. What
    comes back fills with the depths at which passes are read."""
    runner: Any = engine._runner  # type: ignore[reportPrivateUsage]
    compute, read = runner.compute, runner.read
    depth, read_at = 0, list[int]()

    def watched(pending: Any) -> Iterator[None]:
        nonlocal depth
        depth += 1
        try:
            for _ in compute(pending):
                hook(pending, depth - 1)
                yield
        finally:
            depth -= 1

    def noted(pending: Any) -> Any:
        read_at.append(depth)
        return read(pending)

    runner.compute, runner.read = watched, noted
    return read_at


async def expect_others(engine: Engine) -> None:
    """The engine looks out for who is urgent from now on."""
    for priority in ("normal", "high"):
        await within(receive(engine, [asking((5,), 1, priority)]))


class Stop:
    """Lets the first step for which `where` holds stand at its `layer` until it is let go."""

    def __init__(self, engine: Engine, where: Callable[[Any], bool], layer: int = 1) -> None:
        self._where = where
        self._at: Any = None
        self._left = layer
        self._go = threading.Event()
        self.is_reached = False
        between_layers(engine, self._hook)

    def _hook(self, pending: Any, depth: int) -> None:
        if self._at is None and self._where(pending):
            self._at = pending
        if pending is self._at and not self.is_reached:
            self._left -= 1
            if self._left <= 0:
                self.is_reached = True
                assert self._go.wait(20)

    async def reached(self) -> None:
        await eventually(lambda: self.is_reached)

    def let_go(self) -> None:
        self._go.set()


def decodes(pending: Any) -> bool:
    return bool(pending.rows)


def reads_a_prompt(pending: Any) -> bool:
    return bool(pending.chunks)


class Order:
    """In which order passes were read, by what they were for."""

    def __init__(self, engine: Engine) -> None:
        self.read: list[set[str]] = []
        runner: Any = engine._runner  # type: ignore[reportPrivateUsage]
        read = runner.read

        def noted(pending: Any) -> Any:
            everybody = [*(s for s in pending.rows if s is not None), *(chunk.sequence for chunk, _ in pending.chunks)]
            self.read.append({s.spec.priority for s in everybody})
            return read(pending)

        runner.read = noted


@pytest.mark.parametrize("where", [decodes, reads_a_prompt])
async def test_a_first_token_comes_before_the_step_that_was_under_way_has_ended(
    device: Device, family: str, lot: random.Random, where: Callable[[Any], bool]
) -> None:
    engine = engine_in_turn(device, family)
    low = [asking(words(lot, n), 8, "low") for n in (20, 40, 33)]
    high = asking(words(lot, 50), 3, "high")
    async with attached(device, engine):
        await expect_others(engine)
        order, stop = Order(engine), Stop(engine, where)
        replies = asyncio.gather(*(receive(engine, [spec]) for spec in low))
        await stop.reached()
        urgent = engine.submit([high])
        stop.let_go()
        tokens = [item.token async for item in urgent if isinstance(item, Token)]
        received = await within(replies)
    first = order.read.index({"high"})
    assert where is reads_a_prompt or {"low"} in order.read[:first]
    assert {"low"} in order.read[first:]
    assert tokens == await single_run(device, family, high)
    assert [r.tokens for (r,) in received] == [await single_run(device, family, spec) for spec in low]


async def test_it_comes_while_the_step_still_stands(device: Device) -> None:
    engine = engine_in_turn(device, "llama")
    lot = random.Random(1)
    stands, tokens = threading.Event(), asyncio.Queue[int]()
    high = asking(words(lot, 50), 3, "high")
    loop = asyncio.get_running_loop()

    async def listen() -> None:
        async for item in engine.submit([high]):
            if isinstance(item, Token):
                tokens.put_nowait(item.token)

    listening: list[Future[None]] = []
    seen: list[int] = []

    def hook(pending: Any, depth: int) -> None:
        if depth or not pending.rows:
            return
        if not stands.is_set():
            stands.set()
            listening.append(asyncio.run_coroutine_threadsafe(listen(), loop))
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), loop).result(10)  # it has come by now
        elif not seen:  # the next layer of the same step
            seen.append(asyncio.run_coroutine_threadsafe(tokens.get(), loop).result(10))

    async with attached(device, engine):
        await expect_others(engine)
        between_layers(engine, hook)
        await within(receive(engine, [asking(words(lot, 9), 4, "low")]))
        await within(asyncio.wrap_future(listening[0]))
    assert seen == (await single_run(device, "llama", high))[:1]


@pytest.mark.parametrize("again", ["the same prompt", "a prompt of one token"])
async def test_where_nothing_is_left_but_the_last_token_it_need_not_wait_for_a_row(device: Device, family: str, again: str) -> None:
    engine = engine_in_turn(device, family)
    lot = random.Random(family)
    high = asking(words(lot, 40 if again == "the same prompt" else 1), 3, "high")
    low = asking(words(lot, 30), 30, "low")
    async with attached(device, engine):
        await within(receive(engine, [high]))
        order, stop = Order(engine), Stop(engine, decodes)
        reply = asyncio.ensure_future(receive(engine, [low]))
        await stop.reached()
        urgent = asyncio.ensure_future(receive(engine, [high]))
        await asyncio.sleep(0.01)
        stop.let_go()
        (result,), (other,) = await within(urgent), await within(reply)
    first = order.read.index({"high"})
    assert {"low"} in order.read[first:]
    assert result.tokens == await single_run(device, family, high)
    assert other.tokens == await single_run(device, family, low)


@pytest.mark.parametrize("kv_blocks", [None, 12])
async def test_whoever_comes_at_whatever_layer_everybody_says_what_they_say_alone(
    device: Device, family: str, lot: random.Random, kv_blocks: int | None
) -> None:
    """With few blocks, who is under way gives way as well."""
    limits: dict[str, object] = {"max_sequences": 5, "prefill_budget": 40}
    if kv_blocks is not None:
        limits["kv_bytes"] = 2 * kv_blocks * make_engine(device, family).cache_state.block_bytes
    engine = engine_in_turn(device, family, **limits)
    shared = words(lot, 37)
    priorities: tuple[Priority, ...] = ("low", "normal", "high")
    to_come = [
        asking((*(shared if lot.random() < 0.4 else ()), *words(lot, lot.randrange(1, 50))), lot.randrange(1, 20), lot.choice(priorities))
        for _ in range(16)
    ]
    to_come += to_come[:4]
    begin = [replace(spec, priority="low") for spec in to_come[:3]]
    loop = asyncio.get_running_loop()
    streams: list[tuple[SequenceSpec, TokenStream]] = []

    async def submit(spec: SequenceSpec) -> None:
        streams.append((spec, engine.submit([spec])))

    def hook(_pending: Any, _depth: int) -> None:
        if to_come and lot.random() < 0.3:
            asyncio.run_coroutine_threadsafe(submit(to_come.pop()), loop).result(10)

    async with attached(device, engine):
        await expect_others(engine)
        depths = between_layers(engine, hook)
        received = await within(receive(engine, begin), 60)
        while to_come:
            await submit(to_come.pop())
        tokens = [[item.token async for item in stream if isinstance(item, Token)] for _, stream in streams]
    assert max(depths) >= 1
    assert [r.tokens for r in received] == [await single_run(device, family, spec) for spec in begin]
    assert tokens == [await single_run(device, family, spec) for spec, _ in streams]
    assert engine.cache_state.num_held == 0
    if kv_blocks is not None:
        assert engine.cache_state.num_preemptions > 0


@pytest.mark.parametrize("num_low", [1, 2])
async def test_who_gave_way_and_comes_back_to_the_same_row_says_the_same(
    device: Device, family: str, lot: random.Random, num_low: int
) -> None:
    """Nobody has decoded in the meantime, so that the rows look as they were."""
    engine = engine_in_turn(device, family, max_sequences=num_low)
    low, high = [asking(words(lot, 20), 40, "low") for _ in range(num_low)], asking(words(lot, 30), 1, "high")
    async with attached(device, engine):
        await expect_others(engine)
        stop = Stop(engine, lambda pending: decodes(pending) and pending.rows[0].num_generated > 5)
        replies = asyncio.ensure_future(receive(engine, low))
        await stop.reached()
        urgent = asyncio.ensure_future(receive(engine, [high]))
        await asyncio.sleep(0.01)
        stop.let_go()
        received, (other,) = await within(replies), await within(urgent)
    assert engine.cache_state.num_preemptions == 1
    assert [r.tokens for r in received] == [await single_run(device, family, spec) for spec in low]
    assert other.tokens == await single_run(device, family, high)


async def test_who_needs_a_row_for_a_first_token_does_not_wait_for_prompts_of_others(device: Device) -> None:
    """Penalties count what was generated, so that such a prompt ends in decode."""
    engine = engine_in_turn(device, "llama", prefill_budget=32)
    lot = random.Random(4)
    high = replace(asking(words(lot, 30), 3, "high"), sampling=replace(GREEDY, repetition_penalty=1.1))
    others = [asking(words(lot, 9), 40, "low"), asking(words(lot, 400), 3, "low"), asking(words(lot, 300), 3, "normal")]
    passes: list[tuple[str, set[str]]] = []
    runner: Any = engine._runner  # type: ignore[reportPrivateUsage]
    queue = runner.queue

    def noted(plan: Any, unread: Any = None) -> Any:
        kinds = (("decodes", plan.decode), ("reads", [chunk.sequence for chunk in plan.prefill]))
        passes.extend((kind, {s.spec.priority for s in sequences}) for kind, sequences in kinds if sequences)
        return queue(plan, unread)

    async with attached(device, engine):
        streams = [engine.submit([others[0]])]
        await eventually(lambda: engine.counters.decoded_tokens > 3)
        runner.queue = noted
        streams += [engine.submit([spec]) for spec in others[1:]]
        await within(receive(engine, [high]))
        for stream in streams:
            stream.close()
    read = next(i for i, (kind, who) in enumerate(passes) if kind == "reads" and "high" in who)
    assert passes[read] == ("reads", {"high"})
    assert passes[read + 1][0] == "decodes"
    assert "high" in passes[read + 1][1]


async def test_nothing_is_stopped_for_whom_nobody_expects(device: Device) -> None:
    """It would cost a tenth of every step."""
    engine = engine_in_turn(device, "llama")
    lot, stops = random.Random(2), list[int]()
    between_layers(engine, lambda _, depth: stops.append(depth))
    async with attached(device, engine):
        await within(receive(engine, [asking(words(lot, 9), 4, "low"), asking(words(lot, 9), 4, "low")]))
        assert stops == []
        await within(receive(engine, [asking((5,), 1, "normal")]))
        await within(receive(engine, [asking(words(lot, 9), 4, "normal")]))
        assert stops == []
        await within(receive(engine, [asking(words(lot, 9), 4, "low")]))
        assert set(stops) == {0}
