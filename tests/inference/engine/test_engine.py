"""The engine's promises to who submits: every stream ends, faults are told, places are freed. Passes are a fake's here."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from mlx_manager.core.errors import EngineFault
from mlx_manager.inference.engine.block_pool import BlockPool
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine, TokenStream
from mlx_manager.inference.engine.pace import Pace
from mlx_manager.inference.engine.prefix import PrefixKeys
from mlx_manager.inference.engine.scheduler import Chunk, Plan, Policy, Scheduler
from mlx_manager.inference.engine.sequence import Sequence, SequenceSpec, Token, TokenSampling
from tests.inference.engine.passes import KeepsNothing
from tests.inference.fixture_models import (
    GREEDY,
    attached,
    eventually,
    make_engine,
    receive,
    single_run,
    within,
)

Stage = Literal["prefill", "decode", "read"]


@dataclass(frozen=True)
class Step:
    rows: tuple[Sequence | None, ...]
    tokens: tuple[int, ...]
    chunks: tuple[tuple[Chunk, None], ...]

    @property
    def sampling(self) -> tuple[Sequence | None, ...]:
        return self.rows


@dataclass
class Counting(KeepsNothing):
    """Passes whose tokens count up from the last prompt token. They wait for `permits` where there are any, and fail at
    `fails_at` while `num_faults` are left."""

    permits: threading.Semaphore | None = None
    fails_at: Stage | None = None
    num_faults: int = 0
    plans: list[Plan] = field(default_factory=list[Plan])
    decoded: list[tuple[Sequence, ...]] = field(default_factory=list[tuple[Sequence, ...]])
    prefilled: list[Chunk] = field(default_factory=list[Chunk])
    forgotten: list[Sequence] = field(default_factory=list[Sequence])
    num_clears: int = 0

    def queue(self, plan: Plan, unread: Any = None) -> Step:
        self.plans.append(plan)
        for chunk in plan.prefill:
            self._may_fail("prefill")
            self._wait()
            self.prefilled.append(chunk)
            chunk.sequence.num_queued = chunk.stop
        if not plan.decode:
            return Step((), (), tuple((c, None) for c in plan.prefill))
        self._may_fail("decode")
        self._wait()
        self.decoded.append(plan.decode)
        tokens = tuple(row.spec.prompt[-1] + row.num_sampled + 1 for row in plan.decode)
        for row in plan.decode:
            row.num_queued += 1
            row.num_sampled += 1
        return Step(plan.decode, tokens, tuple((c, None) for c in plan.prefill))

    def read(self, pending: Step) -> list[Token | None]:
        self._may_fail("read")
        for chunk, _ in pending.chunks:
            if chunk.sequence.table:
                chunk.sequence.num_computed = chunk.stop
        for row in pending.rows:
            if row is not None and row.table:
                row.num_computed += 1
        return [Token(row.index, token) for row, token in zip(pending.rows, pending.tokens, strict=True) if row is not None]

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence)

    def clear(self) -> None:
        self.num_clears += 1

    def _may_fail(self, stage: Stage) -> None:
        if self.fails_at == stage and self.num_faults:
            self.num_faults -= 1
            raise RuntimeError("the device is on fire")

    def _wait(self) -> None:
        if self.permits is not None:
            assert self.permits.acquire(timeout=10)


def asking(first: int = 0, *, max_tokens: int = 5, prompt_length: int = 1, stop: frozenset[int] = frozenset()) -> SequenceSpec:
    """Its reply is `first` + 1, + 2, …"""
    return SequenceSpec((7,) * (prompt_length - 1) + (first,), max_tokens, GREEDY, stop)


def engine_of(device: Device, runner: Counting, *, max_sequences: int = 4, prefill_budget: int = 10) -> Engine:
    return Engine(device, runner, unhurried(max_sequences=max_sequences), Pace(prefill_budget, target_s=1e6, prefill_s=0.0), check_every=1)


def unhurried(*, max_sequences: int = 4, num_blocks: int = 10_000) -> Scheduler:
    """A scheduler with blocks for everybody."""
    return Scheduler(BlockPool(num_blocks), PrefixKeys("counting", "none"), Policy(max_sequences=max_sequences))


@pytest.fixture
def fast() -> Counting:
    return Counting()


@pytest.fixture
async def engine(device: Device, fast: Counting) -> AsyncIterator[Engine]:
    async with attached(device, engine_of(device, fast)) as engine:
        yield engine


@pytest.fixture
async def stepped(device: Device) -> AsyncIterator[tuple[Engine, Counting, threading.Semaphore]]:
    """An engine that computes only as often as the test permits."""
    permits = threading.Semaphore(0)
    runner = Counting(permits=permits)
    async with attached(device, engine_of(device, runner)) as engine:
        yield engine, runner, permits
        permits.release(10_000)


def computed(plan: Plan) -> list[Sequence]:
    return [chunk.sequence for chunk in plan.prefill]


def decoded(plan: Plan) -> tuple[Sequence, ...]:
    return plan.decode


async def tokens_of(stream: TokenStream) -> list[int]:
    return [item.token async for item in stream if isinstance(item, Token)]


async def is_idle(device: Device, engine: Engine) -> bool:
    return await device.run(lambda: not engine.has_work and engine.num_running == engine.num_waiting == 0)


async def becomes_idle(device: Device, engine: Engine) -> None:
    """The step under way when the last sequence goes has still to be read."""
    async with asyncio.timeout(10):
        while not await is_idle(device, engine):  # noqa: ASYNC110 - the device thread has no event to wait for
            await asyncio.sleep(0.002)


# ---- endings


async def test_a_submission_ends_when_each_of_its_sequences_has(engine: Engine) -> None:
    first, second = await within(receive(engine, [asking(10, max_tokens=3), asking(20, max_tokens=1)]))
    assert (first.tokens, second.tokens) == ([11, 12, 13], [21])
    for result in (first, second):
        assert result.ended is not None
        assert result.ended.reason == "length"
        timing = result.ended.timing
        assert timing.submitted <= (timing.admitted or 0) <= (timing.first_token or 0) <= (timing.finished or 0)


async def test_a_stop_token_ends_a_sequence_and_is_not_among_its_tokens(engine: Engine) -> None:
    (result,) = await within(receive(engine, [asking(10, stop=frozenset({13, 99}))]))
    assert result.tokens == [11, 12]
    assert result.ended is not None
    assert result.ended.reason == "stop"


async def test_a_stop_token_at_once_leaves_no_token_and_no_time_of_a_first_one(engine: Engine) -> None:
    (result,) = await within(receive(engine, [asking(10, stop=frozenset({11}))]))
    assert result.tokens == []
    assert result.ended is not None
    assert (result.ended.reason, result.ended.timing.first_token) == ("stop", None)


async def test_a_stop_token_that_is_the_last_allowed_one_is_a_stop(engine: Engine) -> None:
    (result,) = await within(receive(engine, [asking(10, max_tokens=3, stop=frozenset({13}))]))
    assert result.tokens == [11, 12]
    assert result.ended is not None
    assert result.ended.reason == "stop"


async def test_no_pass_is_spent_past_the_limit_and_one_at_most_past_a_stop_token(engine: Engine, fast: Counting) -> None:
    await within(receive(engine, [asking(10, max_tokens=7)]))
    assert len(fast.decoded) == 7
    await within(receive(engine, [asking(10, max_tokens=50, stop=frozenset({14}))]))
    assert len(fast.decoded) == 7 + 4 + 1


@pytest.mark.requirement("P.1")
async def test_more_than_fit_wait_and_a_place_is_taken_in_the_next_step(engine: Engine, fast: Counting) -> None:
    specs = [asking(100 * i, max_tokens=2 + i % 5) for i in range(20)]
    results = await within(receive(engine, specs))
    assert [r.tokens for r in results] == [[100 * i + n + 1 for n in range(2 + i % 5)] for i in range(20)]
    assert max(len(rows) for rows in fast.decoded) == 4
    assert sum(len(rows) for rows in fast.decoded) == sum(s.max_tokens for s in specs)
    # A limit is seen when the last token is read, a step after it was queued: a place is empty for one pass, no more.
    assert len(fast.decoded) <= sum(s.max_tokens + 1 for s in specs) / 4 + 6


@pytest.mark.requirement("BATCH-04")
async def test_a_prompt_more_urgent_than_all_who_decode_is_computed_without_those_of_others(device: Device) -> None:
    """What is computed beside it is what it waits for."""
    permits = threading.Semaphore(0)
    runner = Counting(permits=permits)
    low = [replace(asking(prompt_length=n, max_tokens=500), priority="low") for n in (1, 4000)]
    async with attached(device, engine_of(device, runner, prefill_budget=100)) as engine:
        streams = [engine.submit([s]) for s in low]
        permits.release(6)
        await eventually(lambda: bool(runner.decoded) and len(runner.prefilled) > 1)
        urgent = engine.submit([replace(asking(max_tokens=1), prompt=(8,) * 60, priority="high")])
        permits.release(10_000)
        await within(tokens_of(urgent))
        for stream in streams:
            stream.close()

    def who(sequences: Iterable[Sequence]) -> set[str]:
        return {s.spec.priority for s in sequences}

    computes, decodes = (next(i for i, p in enumerate(runner.plans) if "high" in who(of(p))) for of in (computed, decoded))
    assert who(computed(runner.plans[computes])) == {"high"}
    assert decodes == computes + 1, "no step of others comes in between"
    assert who(computed(runner.plans[decodes])) == set()


async def test_many_tasks_at_once_each_get_their_own(engine: Engine) -> None:
    replies = await within(asyncio.gather(*(tokens_of(engine.submit([asking(1000 * i)])) for i in range(30))))
    assert list(replies) == [[1000 * i + n for n in range(1, 6)] for i in range(30)]


# ---- cancelling


@pytest.mark.requirement("SRV-03")
async def test_cancelled_while_it_waits_it_never_runs(device: Device, stepped: tuple[Engine, Counting, threading.Semaphore]) -> None:
    engine, runner, permits = stepped
    others = engine.submit([asking(100 * i, max_tokens=3) for i in range(4)])
    waiting = engine.submit([asking(900)])
    permits.release()
    await eventually(lambda: len(runner.decoded) == 1)
    waiting.close()
    permits.release(100)
    assert len(await within(tokens_of(others))) == 12
    assert await within(tokens_of(waiting)) == []
    assert all(row.spec.prompt != (900,) for rows in runner.decoded for row in rows)
    await becomes_idle(device, engine)


async def test_cancelled_while_it_is_prefilled_it_is_gone_within_two_steps(
    device: Device, stepped: tuple[Engine, Counting, threading.Semaphore]
) -> None:
    engine, runner, permits = stepped
    stream = engine.submit([asking(5, prompt_length=1000)])
    permits.release(3)
    await eventually(lambda: len(runner.prefilled) == 3)
    stream.close()
    permits.release(100)
    await becomes_idle(device, engine)
    assert len(runner.prefilled) <= 5
    assert runner.decoded == []
    assert {s.spec.prompt[-1] for s in runner.forgotten} == {5}, "what it held is dropped"


async def test_cancelled_while_it_decodes_it_is_gone_within_two_steps_and_the_others_are_not(
    device: Device, stepped: tuple[Engine, Counting, threading.Semaphore]
) -> None:
    engine, runner, permits = stepped
    other, cancelled = engine.submit([asking(100, max_tokens=20)]), engine.submit([asking(500, max_tokens=1000)])
    permits.release(5)
    await eventually(lambda: len(runner.decoded) == 5)
    cancelled.close()
    permits.release(10_000)
    assert await within(tokens_of(other)) == list(range(101, 121))
    assert sum(any(row.spec.prompt == (500,) for row in rows) for rows in runner.decoded) <= 5 + 2
    await becomes_idle(device, engine)


async def test_cancelled_before_the_device_has_heard_of_it_it_never_runs(device: Device, engine: Engine, fast: Counting) -> None:
    stream = engine.submit([asking(5), asking(6)])
    stream.close()
    assert await within(tokens_of(stream)) == []
    await becomes_idle(device, engine)
    assert sum(len(rows) for rows in fast.decoded) <= 4


async def test_one_of_two_sequences_can_be_cancelled(engine: Engine) -> None:
    stream = engine.submit([asking(100, max_tokens=100_000), asking(500, max_tokens=30)])
    kept: list[int] = []
    async with asyncio.timeout(10):
        async for item in stream:
            if isinstance(item, Token) and item.index == 0:
                stream.cancel(0)
            elif isinstance(item, Token):
                kept.append(item.token)
    assert kept == list(range(501, 531))


async def test_an_event_loop_is_woken_once_for_all_that_comes_until_it_looks(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Steps can be shorter than a turn of the event loop, which reads its wake-ups until there are none."""
    loop = asyncio.get_running_loop()
    wake, num_wakes = loop.call_soon_threadsafe, 0

    def counted(*args: Any, **kwargs: Any) -> asyncio.Handle:
        nonlocal num_wakes
        num_wakes += 1
        return wake(*args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    stream = engine.submit([asking(100, max_tokens=200)])
    time.sleep(0.5)  # noqa: ASYNC251 - the loop does not look
    assert num_wakes == 1
    assert await within(tokens_of(stream)) == list(range(101, 301))


async def test_cancelling_twice_or_after_the_end_does_nothing(device: Device, engine: Engine) -> None:
    stream = engine.submit([asking(5)])
    assert len(await within(tokens_of(stream))) == 5
    stream.close()
    stream.close()
    await becomes_idle(device, engine)
    assert len(await within(tokens_of(engine.submit([asking(5)])))) == 5


# ---- faults


@pytest.mark.parametrize("stage", ["prefill", "decode", "read"])
async def test_a_fault_fails_what_is_under_way_and_the_next_submission_works(device: Device, stage: Stage) -> None:
    runner = Counting(fails_at=stage, num_faults=1)
    async with attached(device, engine_of(device, runner)) as engine:
        under_way = [engine.submit([asking(10, prompt_length=30), asking(20)]), engine.submit([asking(30)])]
        for stream in under_way:
            with pytest.raises(EngineFault) as fault:
                await within(tokens_of(stream))
            assert "on fire" not in fault.value.message, "its text is for the client"
            assert isinstance(fault.value.__cause__, RuntimeError)
            assert await within(tokens_of(stream)) == [], "it has ended"
        assert engine.counters.faults == 1
        await becomes_idle(device, engine)
        assert await within(tokens_of(engine.submit([asking(40, prompt_length=30)]))) == [41, 42, 43, 44, 45]


async def test_a_fault_takes_nothing_from_who_has_finished_before(device: Device) -> None:
    runner = Counting()
    async with attached(device, engine_of(device, runner)) as engine:
        first = engine.submit([asking(10)])
        assert await within(tokens_of(first)) == [11, 12, 13, 14, 15]
        runner.fails_at, runner.num_faults = "read", 1
        with pytest.raises(EngineFault):
            await within(tokens_of(engine.submit([asking(20)])))


async def test_faults_in_a_row_are_each_told(device: Device) -> None:
    async with attached(device, engine_of(device, Counting(fails_at="decode", num_faults=5))) as engine:
        for _ in range(5):
            with pytest.raises(EngineFault):
                await within(tokens_of(engine.submit([asking(10)])))
        assert len(await within(tokens_of(engine.submit([asking(10)])))) == 5
        assert engine.counters.faults == 5


async def test_abort_ends_every_stream_with_its_fault(device: Device, stepped: tuple[Engine, Counting, threading.Semaphore]) -> None:
    engine, _, permits = stepped
    streams = [engine.submit([asking(100 * i, max_tokens=1000)]) for i in range(6)]
    permits.release(3)
    engine.abort(EngineFault("The server is shutting down."))
    permits.release(100)
    for stream in streams:
        with pytest.raises(EngineFault, match="shutting down"):
            await within(tokens_of(stream))
    await becomes_idle(device, engine)
    assert len(await within(tokens_of(engine.submit([asking(5)])))) == 5


async def test_when_sampling_fails_before_the_first_token_nothing_of_it_stays_in_the_batch(device: Device) -> None:
    """A real runner this time: a bias outside the vocabulary fails after the row's cache has joined."""
    engine = make_engine(device, "qwen3")
    good = SequenceSpec((310, 320, 330, 340), 8, GREEDY)
    async with attached(device, engine):
        bad = TokenSampling(seed=0, logit_bias={10**6: 1.0})
        with pytest.raises(EngineFault):
            await within(tokens_of(engine.submit([SequenceSpec((301, 302, 303), 4, bad)])))
        (result,) = await within(receive(engine, [good]))
    assert result.tokens == await single_run(device, "qwen3", good)


# ---- loops and the device


def test_what_was_submitted_from_a_loop_that_is_gone_is_dropped(device: Device) -> None:
    permits = threading.Semaphore(0)
    runner = Counting(permits=permits)
    engine = engine_of(device, runner)

    async def leave() -> None:
        await device.run(lambda: device.attach(engine))
        engine.submit([asking(5, max_tokens=100_000)])

    async def after() -> None:
        await becomes_idle(device, engine)
        assert len(await within(tokens_of(engine.submit([asking(5)])))) == 5
        await device.run(lambda: device.detach(engine))

    asyncio.run(leave())
    permits.release(100_000)
    asyncio.run(after())
    assert len(runner.decoded) < 100


@pytest.fixture
def own_device() -> Iterator[Device]:
    device = Device()
    device.start()
    yield device
    device.stop()


@pytest.mark.requirement("P.6")
async def test_work_from_many_tasks_runs_on_one_thread_that_is_not_the_callers(own_device: Device) -> None:
    threads = await asyncio.gather(*(own_device.run(threading.get_ident) for _ in range(20)))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_work_that_raises_is_its_callers_problem_alone(own_device: Device) -> None:
    def fail() -> None:
        raise KeyError("mine")

    own_device.post(fail)
    results = await asyncio.gather(own_device.run(fail), own_device.run(lambda: 5), return_exceptions=True)
    assert isinstance(results[0], KeyError)
    assert results[1] == 5
    assert own_device.is_alive


async def test_work_runs_to_its_end_though_its_caller_has_gone(own_device: Device) -> None:
    began, goes_on, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        assert goes_on.wait(10)
        done.set()

    caller = asyncio.create_task(own_device.run(work))
    await eventually(began.is_set)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    goes_on.set()
    await eventually(done.is_set)


class Broken:
    """An engine whose every turn fails, even past its own defences."""

    has_work = True

    def step(self) -> None:
        raise RuntimeError("broken")

    def flush(self) -> None: ...


async def test_an_engine_that_fails_in_its_turn_takes_no_turns_from_others(own_device: Device) -> None:
    broken = Broken()
    engine = engine_of(own_device, Counting())
    await own_device.run(lambda: own_device.attach(broken))
    async with attached(own_device, engine):
        assert len(await within(tokens_of(engine.submit([asking(5)])))) == 5
    await own_device.run(lambda: own_device.detach(broken))


@pytest.mark.requirement("P.6")
async def test_a_device_that_has_stopped_says_so(own_device: Device) -> None:
    engine = engine_of(own_device, Counting())
    before = asyncio.create_task(own_device.run(lambda: "done"))
    await asyncio.sleep(0)
    await asyncio.to_thread(own_device.stop)
    assert await within(before) == "done"
    assert not own_device.is_alive
    with pytest.raises(EngineFault):
        await within(own_device.run(lambda: None))
    stream = engine.submit([asking(5)])
    with pytest.raises(EngineFault):
        await within(tokens_of(stream))
    stream.close()
    own_device.stop()


def test_a_device_that_never_started_can_be_stopped() -> None:
    Device().stop()


async def test_the_pieces_of_prompts_are_made_smaller_while_it_runs(device: Device) -> None:
    runner = Counting()
    async with attached(device, engine_of(device, runner, prefill_budget=40)) as engine:
        await within(receive(engine, [SequenceSpec(tuple(range(81)), 1, GREEDY)]))
        engine.limit_pass(20)
        await within(receive(engine, [SequenceSpec(tuple(range(100, 181)), 1, GREEDY)]))
    assert [chunk.stop - chunk.start for chunk in runner.prefilled] == [40, 40, 20, 20, 20, 20]
