"""Ten thousand requests, a third of them given up at some moment, leave blocks, memory and threads where they started."""

import asyncio
import random
import threading

import mlx.core as mx
import psutil
import pytest

from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.sequence import SequenceSpec, Token
from tests.inference.fixture_models import GREEDY, attached, make_engine, receive

NUM_REQUESTS = 10_000
AT_ONCE = 32


@pytest.mark.requirement("BATCH-01", "P.3")
async def test_ten_thousand_requests_leave_nothing_behind(device: Device) -> None:
    # Its books are checked at the end: at every step that would be all there is to do.
    engine = make_engine(device, "qwen3", max_sequences=16, kv_bytes=12 << 20, check_every=500)
    lot = random.Random(11)
    prefixes = [tuple(lot.randrange(300, 500) for _ in range(n)) for n in (5, 40, 70)]
    async with attached(device, engine):
        # What is made once is made by now: rows for as many as there are places, as long as they get, and blocks up to their limit.
        await receive(engine, [SequenceSpec(prefixes[-1] + tuple(lot.randrange(300, 500) for _ in range(70)), 4, GREEDY)] * 16)
        await many(engine, lot, prefixes, 1000)
        before = await footprint(device, engine)
        await many(engine, lot, prefixes, NUM_REQUESTS - 1000)
        after = await footprint(device, engine)
        await device.run(engine.check_integrity)
    assert engine.cache_state.num_held == 0
    assert engine.cache_state.num_evictions > 0
    assert engine.counters.faults == 0
    assert after["threads"] == before["threads"]
    assert after["allocated"] <= before["allocated"] * 1.2
    assert after["mlx"] <= before["mlx"] + (1 << 20)
    assert after["rss"] <= before["rss"] + (48 << 20)


async def many(engine: Engine, lot: random.Random, prefixes: list[tuple[int, ...]], count: int) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(spec: SequenceSpec, gives_up_after: int | None) -> None:
        async with places:
            stream = engine.submit([spec])
            num_tokens = 0
            if gives_up_after == 0:
                stream.close()
            async for item in stream:
                num_tokens += isinstance(item, Token)
                if num_tokens == gives_up_after:
                    stream.close()

    def request() -> SequenceSpec:
        own = tuple(lot.randrange(300, 500) for _ in range(lot.randrange(1, 9) if lot.random() < 0.9 else 64))
        return SequenceSpec(lot.choice(prefixes) + own, lot.randrange(1, 5), GREEDY)

    async with asyncio.timeout(600), asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one(request(), lot.choice([None, None, lot.randrange(3)])))


async def footprint(device: Device, engine: Engine) -> dict[str, int]:
    async with asyncio.timeout(10):
        while await device.run(lambda: engine.has_work):  # noqa: ASYNC110 - it is another thread's work
            await asyncio.sleep(0.01)
    return {
        "threads": threading.active_count(),
        "allocated": engine.cache_state.allocated_bytes,
        "mlx": await device.run(mx.get_active_memory),
        "rss": psutil.Process().memory_info().rss,
    }
