"""Several models under one limit, through the real engine: who leaves for whom, who waits, who is refused, and that memory returns."""

import asyncio
import gc
import random
import shutil
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_manager.core.errors import ModelLoadFailed, ModelTooLarge, NotEnoughMemory, Overloaded
from mlx_manager.hub.local import find_models
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.sequence import SequenceSpec
from mlx_manager.inference.loader import EngineLimits, Usage, free, let_be, memory_in_use
from mlx_manager.inference.memory import need
from mlx_manager.inference.pool import ModelStatus, Pool, PoolPolicy
from tests.inference.fixture_models import GREEDY, eventually, folder, receive, within

KV = 4 << 20
LIMITS = EngineLimits(kv_bytes=KV, prefill_budget=128, max_sequences=4, step_s=10.0)
NAMES = ("one", "two", "three")


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        self.now += 1e-3  # no two moments are the same
        return self.now


@dataclass
class Memory:
    """Of a machine that says what a test wants it to."""

    active: int = 0
    available: int = 50
    asked: list[int] = field(default_factory=list[int])

    def __call__(self) -> Usage:
        return Usage(active=self.active, cached=0, available=self.available, total=100)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Three models of the same size, and a small one that measures texts."""
    for name in NAMES:
        shutil.copytree(folder("qwen3"), tmp_path / name)
    shutil.copytree(folder("tiny_bert"), tmp_path / "bert")
    return tmp_path


@dataclass
class Pooled:
    """A pool with room for so many of the models, and what was asked of it."""

    pool: Pool
    clock: Clock
    memory: Memory
    each: int

    async def ask(self, name: str, num_tokens: int = 4) -> list[int]:
        async with self.pool.lend(name) as model:
            (received,) = await receive(model.engine, [SequenceSpec((310, 320, 330), num_tokens, GREEDY)])
            return received.tokens

    def of(self, name: str) -> ModelStatus:
        return self.pool.status(name)

    @property
    def hot(self) -> set[str]:
        return {s.checkpoint.id for s in self.pool.statuses() if s.state == "ready"}


@asynccontextmanager
async def pooled(
    device: Device,
    models: Path,
    *,
    room: float = 2.5,
    marks: Path | None = None,
    real: bool = False,
    **settings: Any,
) -> AsyncGenerator[Pooled]:
    def find() -> list[Any]:
        return list(find_models([models], None).models)

    one = next(c for c in find() if c.id == "one")
    each = need(one, available=0, kv_bytes=KV, prefill_tokens=LIMITS.prefill_budget).total
    clock, memory = Clock(), Memory()
    pool = Pool(
        device,
        find,
        replace(LIMITS, **{k: v for k, v in settings.items() if hasattr(LIMITS, k)}),
        PoolPolicy(**{k: v for k, v in settings.items() if not hasattr(LIMITS, k)}),
        limit=lambda: int(room * each),
        in_use=memory_in_use if real else memory,
        clock=clock,
        marks_folder=marks,
    )
    try:
        yield Pooled(pool, clock, memory, each)
    finally:
        await within(pool.close())


def settled(pool: Pool, name: str, state: str) -> Callable[[], bool]:
    return lambda: pool.status(name).state == state


# ---- who leaves


@pytest.mark.requirement("SRV-02", "8.1", "8.2", "D-07", "F7")
async def test_the_least_recently_used_model_leaves_before_a_third_is_loaded(device: Device, models: Path) -> None:
    async with pooled(device, models) as p:
        said = await within(p.ask("one"))
        await within(p.ask("two"))
        assert await within(p.ask("one")) == said
        assert p.hot == {"one", "two"}
        await within(p.ask("three"))
        assert p.hot == {"one", "three"}
        assert await within(p.ask("two")) is not None
        assert p.hot == {"two", "three"}
        assert await within(p.ask("one")) == said, "after a reload it says what it said before"
        assert p.pool.counters.evictions["room"] == 3
        assert p.pool.counters.loads == {"ready": 5, "failed": 0}


@pytest.mark.requirement("F6")
async def test_by_frequency_the_one_leaves_that_was_asked_least_often(device: Device, models: Path) -> None:
    async with pooled(device, models, eviction="lfu") as p:
        for name in ("one", "one", "one", "two"):
            await within(p.ask(name))
        await within(p.ask("three"))
        assert p.hot == {"one", "three"}, "by time it would have been the other"


@pytest.mark.requirement("F6", "D-07")
async def test_a_pinned_model_stays_and_leaves_only_when_it_is_told_to(device: Device, models: Path) -> None:
    async with pooled(device, models) as p:
        await within(p.pool.configure("one", pinned=True))
        await within(p.ask("one"))
        await within(p.ask("two"))
        await within(p.ask("three"))
        assert p.hot == {"one", "three"}
        await within(p.pool.unload("one"))
        assert p.hot == {"three"}
        assert p.of("one").pinned


@pytest.mark.requirement("F3", "Q2")
async def test_a_model_in_use_stays_though_it_is_the_least_recently_used(device: Device, models: Path) -> None:
    async with pooled(device, models) as p, p.pool.lend("one"):
        await within(p.ask("two"))
        await within(p.ask("three"))
        assert p.hot == {"one", "three"}


async def test_models_of_every_kind_share_the_limit(device: Device, models: Path) -> None:
    async with pooled(device, models, room=1.2) as p:
        await within(p.ask("one"))
        async with p.pool.lend_embedder("bert"):
            pass
        assert p.hot == {"bert", "one"}
        need_of_bert = p.of("bert").need
        assert need_of_bert is not None
        assert need_of_bert.kv == 0
        assert need_of_bert.weights > 0


@pytest.mark.requirement("F7", "F8")
async def test_the_memory_is_within_the_limit_at_its_peak_too(device: Device, models: Path) -> None:
    async with pooled(device, models, real=True) as p:
        before = await measured(device)
        await within(device.run(mx.reset_peak_memory))
        for name in (*NAMES, *NAMES):
            async with p.pool.lend(name) as model:
                prompts = [SequenceSpec(tuple(range(300 + i, 700 + i)), 8, GREEDY) for i in range(4)]
                await within(receive(model.engine, prompts))
            del model
        peak = await within(device.run(mx.get_peak_memory))
        host = sum(s.cache.host_bytes for s in p.pool.statuses() if s.cache is not None)
        assert await p.pool.limit() >= peak - before + host > 2 * (models / "one" / "model.safetensors").stat().st_size
        assert p.pool.counters.loads["ready"] == 6


@pytest.mark.requirement("F2", "8.1")
async def test_a_reply_goes_on_while_another_model_is_loaded_piece_by_piece(device: Device, models: Path) -> None:
    async with pooled(device, models, piece_bytes=1000) as p, p.pool.lend("one") as model:
        await within(p.pool.dialect("two"))
        loading = asyncio.create_task(p.pool.load("two"))
        seen: set[int] = set()
        num_meanwhile = 0
        while not loading.done():
            async for _ in model.engine.submit([SequenceSpec((310, 320, 330), 100, GREEDY)]):
                if (status := p.of("two")).state == "loading" and 0 < status.read_bytes < status.checkpoint.size_bytes:
                    seen.add(status.read_bytes)
                    num_meanwhile += 1
        await within(loading)
        assert num_meanwhile > 3
        assert len(seen) > 3, "and it is told how far it is"


# ---- who waits, and who is refused


@pytest.mark.requirement("Q2", "D-02")
async def test_who_finds_nobody_to_leave_waits_and_is_served_when_somebody_is_done(device: Device, models: Path) -> None:
    async with pooled(device, models, room=1.5) as p:
        async with p.pool.lend("one"):
            waiting = asyncio.create_task(p.ask("two"))
            await eventually(settled(p.pool, "two", "queued"))
            no_room = p.of("two").no_room
            assert no_room is not None
            assert (no_room.needed, no_room.available) == (p.each, int(1.5 * p.each) - p.pool.memory().taken)
            assert p.hot == {"one"}
        assert len(await within(waiting)) == 4
        assert p.hot == {"two"}


@pytest.mark.requirement("Q1", "P.2")
async def test_the_queue_goes_by_urgency_and_then_by_arrival(device: Device, models: Path) -> None:
    served: list[str] = []

    async def ask(p: Pooled, name: str, priority: Any) -> None:
        async with p.pool.lend(name, priority=priority):
            served.append(name)

    async with pooled(device, models, room=1.5) as p:
        async with p.pool.lend("one"):
            tasks = [asyncio.create_task(ask(p, "two", "normal"))]
            await eventually(settled(p.pool, "two", "queued"))
            tasks.append(asyncio.create_task(ask(p, "three", "high")))
            await eventually(settled(p.pool, "three", "queued"))
        await within(asyncio.gather(*tasks))
        assert served == ["three", "two"]


@pytest.mark.requirement("D-07", "Q2")
async def test_who_waits_too_long_is_told_the_numbers(device: Device, models: Path) -> None:
    async with pooled(device, models, room=1.5, memory_wait_s=0.05) as p, p.pool.lend("one"):
        with pytest.raises(NotEnoughMemory, match=r"'two' needs 0\.\d+ GB, and only 0\.\d+ GB are available") as refusal:
            await within(p.ask("two"))
        assert (refusal.value.needed, refusal.value.available) == (p.each, int(1.5 * p.each) - p.pool.memory().taken)
        assert p.of("two").state == "cold"
        assert p.pool.counters.refusals == 1


@pytest.mark.requirement("F6", "Q2")
async def test_nobody_waits_where_only_pinned_models_are_in_the_way(device: Device, models: Path) -> None:
    async with pooled(device, models, room=1.5, memory_wait_s=1e6) as p:
        await within(p.pool.configure("one", pinned=True))
        async with p.pool.lend("one"):
            with pytest.raises(NotEnoughMemory):
                await within(p.ask("two"))
        async with p.pool.lend_embedder("bert"):
            assert p.hot == {"one", "bert"}, "and nobody behind it was kept from coming"
        await within(p.pool.configure("one", pinned=False))
        assert len(await within(p.ask("two"))) == 4


async def test_or_is_told_at_once_where_nobody_is_to_wait(device: Device, models: Path) -> None:
    async with pooled(device, models, room=1.5, when_full="refuse") as p:
        async with p.pool.lend("one"):
            refusals = await within(asyncio.gather(*(p.ask("two") for _ in range(3)), return_exceptions=True))
            assert {type(r) for r in refusals} == {NotEnoughMemory}
            assert p.of("two").state == "cold", "nothing is wrong with it"
        assert len(await within(p.ask("two"))) == 4, "the next try is a new one"


async def test_a_model_that_can_never_fit_is_refused_before_its_weights_are_touched(device: Device, models: Path) -> None:
    async with pooled(device, models, room=0.9) as p:
        with pytest.raises(ModelTooLarge) as refusal:
            await within(p.ask("one"))
        assert refusal.value.needed == p.each
        assert p.of("one").state == "failed"


@pytest.mark.requirement("Q1", "F4")
async def test_of_those_who_wait_all_but_one_may_leave_and_with_the_last_the_load_is_given_up(device: Device, models: Path) -> None:
    async with pooled(device, models, room=1.5) as p:
        async with p.pool.lend("one"):
            waiting = [asyncio.create_task(p.ask("two")) for _ in range(8)]
            await eventually(settled(p.pool, "two", "queued"))
            for task in waiting[1:]:
                task.cancel()
            await asyncio.sleep(0.01)
            assert p.of("two").state == "queued"
        assert len(await within(waiting[0])) == 4
        async with p.pool.lend("two"):
            waiting = [asyncio.create_task(p.ask("one")) for _ in range(2)]
            await eventually(settled(p.pool, "one", "queued"))
            for task in waiting:
                task.cancel()
            await eventually(settled(p.pool, "one", "cold"))
        await asyncio.sleep(0.02)
        assert p.hot == {"two"}


async def test_two_that_load_at_once_count_each_other(device: Device, models: Path) -> None:
    async with pooled(device, models) as p:
        await within(asyncio.gather(p.ask("one"), p.ask("two"), p.ask("three")))
        assert len(p.hot) == 2
        assert p.pool.counters.loads["ready"] == 3


@pytest.mark.requirement("Q3", "F4")
async def test_a_load_that_fails_leaves_no_memory_and_no_promise_behind(device: Device, models: Path) -> None:
    weights = models / "two" / "model.safetensors"
    whole = weights.read_bytes()
    async with pooled(device, models, room=1.5) as p:
        await p.pool.dialect("two")
        before = await measured(device)
        weights.write_bytes(whole[: len(whole) // 2])
        failures = await within(asyncio.gather(*(p.ask("two") for _ in range(4)), return_exceptions=True))
        assert {type(f) for f in failures} == {ModelLoadFailed}
        assert (p.of("two").state, p.of("two").need) == ("failed", None)
        assert p.pool.memory().taken == 0
        del failures
        assert await measured(device) - before < len(whole) // 4
        weights.write_bytes(whole)
        assert len(await within(p.ask("two"))) == 4


# ---- leaving by hand and by time


@pytest.mark.requirement("8.6", "API-05")
async def test_unloading_waits_for_replies_and_a_new_request_loads_anew(device: Device, models: Path) -> None:
    async with pooled(device, models) as p:
        async with p.pool.lend("one") as model:
            unloading = asyncio.create_task(p.pool.unload("one"))
            await eventually(settled(p.pool, "one", "unloading"))
            later = asyncio.create_task(p.ask("one"))
            (reply,) = await within(receive(model.engine, [SequenceSpec((310, 320, 330), 32, GREEDY)]))
            assert len(reply.tokens) == 32
            assert not unloading.done()
            assert not later.done()
            del model
        await within(unloading)
        assert (await within(later)) == reply.tokens[:4]
        assert p.pool.counters.loads["ready"] == 2


async def test_unloading_what_is_not_there_does_nothing(device: Device, models: Path) -> None:
    async with pooled(device, models) as p:
        await within(p.pool.unload("one"))
        assert p.of("one").state == "cold"


@pytest.mark.requirement("F3", "F6")
async def test_a_model_that_nobody_uses_leaves_when_its_time_is_over(device: Device, models: Path) -> None:
    async with pooled(device, models, keep_alive_s=300.0) as p:
        await within(p.ask("one"))
        await within(p.ask("two"))
        await within(p.pool.configure("two", pinned=True))
        async with p.pool.lend("three"):
            p.clock.now += 299
            await within(p.pool.look())
            assert p.hot == {"two", "three"}, "of the three the first left for the third"
            expires_in_s = p.of("two").expires_in_s
            assert expires_in_s is None, "it is pinned"
            p.clock.now += 2
            await within(p.pool.look())
            assert p.hot == {"two", "three"}, "one is pinned, and the other in use"
        await within(p.pool.configure("two", pinned=False))
        assert p.hot == {"three"}
        p.clock.now += 301
        await within(p.pool.look())
        assert p.hot == set()
        assert p.pool.counters.evictions["idle"] == 2


async def test_a_model_can_have_a_time_of_its_own(device: Device, models: Path) -> None:
    async with pooled(device, models, keep_alive_s=None) as p:
        await within(p.pool.configure("one", pinned=None, keep_alive_s=0.0))
        await within(p.ask("one"))
        await eventually(settled(p.pool, "one", "cold"))
        await within(p.ask("two"))
        p.clock.now += 1e6
        await within(p.pool.look())
        assert p.hot == {"two"}


@pytest.mark.requirement("F1", "F5")
async def test_ten_times_loaded_used_and_unloaded_it_says_the_same_and_leaves_nothing(device: Device, models: Path) -> None:
    async with pooled(device, models, real=True) as p:
        said = await within(p.ask("one", 8))
        await within(p.pool.unload("one"))
        before = await measured(device)
        for _ in range(10):
            assert await within(p.ask("one", 8)) == said
            await within(p.pool.unload("one"))
        assert await measured(device) - before < 100_000


@pytest.mark.requirement("F5")
async def test_prefixes_of_a_model_that_leaves_are_on_the_disk_and_are_found_when_it_is_back(
    device: Device, models: Path, tmp_path: Path
) -> None:
    disk = {"disk_bytes": 1 << 30, "disk_folder": tmp_path / "prefixes"}
    long = SequenceSpec(tuple(range(300, 400)), 4, GREEDY)
    async with pooled(device, models, room=1.5, **disk) as p:
        said: list[list[int]] = []
        for name in ("one", "two", "one"):
            async with p.pool.lend(name) as model:
                (received,) = await within(receive(model.engine, [long]))
                said.append(received.tokens)
                fetched = model.engine.counters.fetched_blocks
            del model
        assert said[0] == said[2]
        assert fetched == 3, "of its 100 tokens"


@pytest.mark.requirement("F5", "SRV-02", "BUGFIX-07")
async def test_the_parts_of_the_memory_add_up_to_what_is_measured(device: Device, models: Path) -> None:
    # So much that it is not under pressure, whatever other tests keep in this process.
    async with pooled(device, models, real=True, room=10_000) as p:
        before = await measured(device)
        for name in ("one", "two"):
            await within(p.ask(name, 64))
        await within(p.pool.look())
        memory = p.pool.memory()
        assert memory.in_use is not None
        parts = memory.weights + memory.adapters + memory.kv_in_use
        assert memory.in_use - before == pytest.approx(parts, rel=0.05)
        assert memory.kv_in_use <= memory.kv
        assert memory.taken == pytest.approx(2 * p.each, rel=0.01)
        size = (models / "one" / "model.safetensors").stat().st_size
        assert memory.weights == pytest.approx(2 * size, rel=0.01)


# ---- the end of the memory


@pytest.mark.requirement("D-02", "E13", "F8")
async def test_the_fuller_the_memory_the_more_is_given_up_and_it_all_comes_back(device: Device, models: Path) -> None:
    async with pooled(device, models, memory_wait_s=0.05) as p:
        prompt = tuple(range(300, 400))
        for name in ("one", "two"):
            async with p.pool.lend(name) as model:
                await within(receive(model.engine, [SequenceSpec(prompt, 2, GREEDY)]))
            del model
        limit = await p.pool.limit()

        def kept(name: str) -> int:
            cache = p.of(name).cache
            assert cache is not None
            return cache.num_cached

        async def at(pressure: float) -> tuple[str, ...]:
            p.memory.active = int(pressure * limit)
            await within(p.pool.look())
            return p.pool.memory().relief

        host = sum(s.cache.host_bytes for s in p.pool.statuses() if s.cache is not None) / limit
        assert await at(0.84 - host) == ()
        assert await at(0.86) == ("smaller prefill",)
        engines = p.pool.engines()
        assert [engine.num_running for engine in engines.values()] == [0, 0]
        assert kept("one") > 0
        assert (await at(0.92))[-1] == "prefixes"
        await eventually(lambda: kept("one") == kept("two") == 0)
        assert p.hot == {"one", "two"}
        assert (await at(0.96))[-1] == "idle models"
        assert p.hot == {"two"}, "one at a time"
        await at(0.96)
        assert p.hot == set()
        assert (await at(0.99))[-1] == "loads wait"
        with pytest.raises(NotEnoughMemory):
            await within(p.ask("one"))
        assert (await at(1.01))[-1] == "refuse"
        with pytest.raises(Overloaded, match="The models take"):
            await within(p.ask("one"))
        assert await at(0.5) == ()
        assert len(await within(p.ask("one"))) == 4


async def test_under_pressure_nobody_in_use_and_nobody_pinned_leaves(device: Device, models: Path) -> None:
    async with pooled(device, models) as p:
        await within(p.pool.configure("one", pinned=True))
        await within(p.ask("one"))
        async with p.pool.lend("two"):
            p.memory.available = 4
            await within(p.pool.look())
            await within(p.pool.look())
            assert p.hot == {"one", "two"}


# ---- crashes


@pytest.mark.requirement("F10")
async def test_a_model_that_ended_the_process_is_not_preloaded_and_says_so_until_it_has_been_loaded(
    device: Device, models: Path, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    (marks / "left behind").write_text("one")
    async with pooled(device, models, marks=marks) as p:
        assert p.of("one").error == "the server ended while it was being loaded"
        await within(p.pool.preload(["one", "two", "nobody"]))
        assert p.hot == {"two"}
        assert p.of("two").pinned
        assert len(await within(p.ask("one"))) == 4, "who asks for it gets it"
        assert p.of("one").error is None


async def test_a_full_or_missing_disk_only_means_that_nothing_is_remembered(device: Device, models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    async with pooled(device, models, marks=tmp_path / "file" / "marks") as p:
        assert len(await within(p.ask("one"))) == 4


async def measured(device: Device) -> int:
    """What MLX has in use."""

    def look() -> int:
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    return await within(device.run(look))


@pytest.mark.requirement("SRV-02", "Q1", "Q2")
async def test_whoever_comes_and_goes_in_whatever_order_is_answered_and_the_promises_stay_within_the_limit(
    device: Device, models: Path
) -> None:
    lot = random.Random(7)
    async with pooled(device, models, room=2.2, memory_wait_s=1e6) as p:
        said = {name: await within(p.ask(name)) for name in NAMES}
        limit = await p.pool.limit()
        over: list[int] = []
        num_answers = 0

        async def one() -> None:
            nonlocal num_answers
            await asyncio.sleep(lot.random())
            name = lot.choice(NAMES)
            match lot.randrange(8):
                case 0:
                    await p.pool.unload(name)
                case 1:
                    await p.pool.configure(name, pinned=None, keep_alive_s=lot.choice([None, 0.0]))
                case 2:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(lot.random() / 4):
                            await p.ask(name)
                case _:
                    assert await p.ask(name, 4) == said[name]
                    num_answers += 1
            over.append(p.pool.memory().taken - limit)

        async with asyncio.timeout(120):
            await asyncio.gather(*(one() for _ in range(80)))
        assert num_answers > 30
        assert max(over) < 100_000, "the headers of files are no weights"
        for name in NAMES:
            await within(p.pool.unload(name))
        assert (p.hot, p.pool.memory().taken) == (set(), 0)


class HoldsItself:
    def __init__(self) -> None:
        self.itself = self


def test_what_has_left_and_holds_itself_is_gone_when_memory_is_given_back() -> None:
    """The collector does not look at what was there when a model had been loaded."""
    one, other = HoldsItself(), HoldsItself()
    left, stays = weakref.ref(one), weakref.ref(other)
    gc.disable()
    try:
        let_be()
        del one
        gc.collect()
        assert left() is not None, "nobody looked"
        free()
        assert left() is None
        assert stays() is other
        assert gc.get_freeze_count() > 0, "what stays is left alone again"
    finally:
        gc.enable()
        gc.unfreeze()
