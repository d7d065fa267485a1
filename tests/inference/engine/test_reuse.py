"""What was computed once is computed once: prefixes, forks, siblings, the disk and those who gave way. And it changes no token."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.paged_attention import backend
from mlx_manager.inference.engine.sequence import SequenceSpec, TokenSampling
from tests.inference import fixture_models
from tests.inference.fixture_models import GREEDY, Received, attached, make_engine, receive, single_run, within, words

BLOCK = 32


@pytest.fixture(params=["ahead", "in turn"], autouse=True)
def is_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(fixture_models, "is_ahead", request.param == "ahead")
    return request.param == "ahead"


def asking(prompt: tuple[int, ...], max_tokens: int = 6) -> SequenceSpec:
    return SequenceSpec(prompt, max_tokens, GREEDY)


async def same_as_alone(device: Device, family: str, specs: list[SequenceSpec], received: list[Received]) -> bool:
    return [r.tokens for r in received] == [await single_run(device, family, s) for s in specs]


def engine_with_blocks(device: Device, family: str, num_blocks: int, **limits: object) -> Engine:
    block_bytes = make_engine(device, family).cache_state.block_bytes
    shares = 1 if backend() else 2  # where there are no kernels, half of the room is for rows
    engine = make_engine(device, family, kv_bytes=shares * num_blocks * block_bytes, **limits)
    assert engine.cache_state.num_blocks == num_blocks
    return engine


@pytest.mark.requirement("BATCH-02", "9.2")
async def test_a_prompt_that_begins_like_an_earlier_one_is_computed_from_where_it_differs(
    device: Device, family: str, lot: random.Random
) -> None:
    engine = make_engine(device, family)
    prefix = words(lot, 5 * BLOCK + 9)
    first, second = asking(prefix + words(lot, 20)), asking(prefix + words(lot, 33))
    async with attached(device, engine):
        assert await same_as_alone(device, family, [first], await within(receive(engine, [first])))
        computed = engine.counters.prefilled_tokens
        stream_of_second = await within(receive(engine, [second]))
        assert await same_as_alone(device, family, [second], stream_of_second)
    in_common = 5 * BLOCK if backend() else len(prefix)
    assert engine.counters.cached_tokens == in_common
    assert engine.counters.prefilled_tokens - computed == len(second.prompt) - 1 - in_common


async def test_the_very_same_prompt_again_computes_less_than_a_block(device: Device, family: str, lot: random.Random) -> None:
    engine = make_engine(device, family)
    specs = [asking(words(lot, n)) for n in (BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5)]
    async with attached(device, engine):
        for spec in specs:
            await within(receive(engine, [spec]))
        computed = engine.counters.prefilled_tokens
        assert await same_as_alone(device, family, specs, await within(receive(engine, specs)))
    less_than_blocks = sum((len(s.prompt) - 1) % BLOCK for s in specs) + BLOCK
    assert engine.counters.prefilled_tokens - computed <= (less_than_blocks if backend() else 4), "four are not worth a copy"


async def test_a_tail_is_left_where_another_prompt_differs_from_it(device: Device, family: str, lot: random.Random) -> None:
    engine = make_engine(device, family)
    first = asking(words(lot, BLOCK + 20))
    second = asking(first.prompt[: BLOCK + 11] + words(lot, 40))
    third = asking(first.prompt[: BLOCK - 9])
    async with attached(device, engine):
        for spec in (first, second, third, first):
            assert await same_as_alone(device, family, [spec], await within(receive(engine, [spec])))
    if backend() is None:
        assert engine.counters.cached_tokens == (BLOCK + 11) + (BLOCK - 10) + (BLOCK + 19)


async def test_the_next_turn_begins_with_what_the_last_one_said(device: Device, family: str, lot: random.Random) -> None:
    engine = make_engine(device, family)
    first = asking(words(lot, BLOCK + 13), max_tokens=2 * BLOCK)
    async with attached(device, engine):
        (said,) = await within(receive(engine, [first]))
        second = asking(first.prompt + tuple(said.tokens) + words(lot, 9))
        assert await same_as_alone(device, family, [second], await within(receive(engine, [second])))
    computed = len(first.prompt) + len(said.tokens) - 1  # the last token that was said was never an input
    assert engine.counters.cached_tokens == (computed // BLOCK * BLOCK if backend() else computed)


@pytest.mark.requirement("BATCH-02")
async def test_several_replies_to_one_prompt_compute_it_once(device: Device, family: str, lot: random.Random) -> None:
    for length in (5, BLOCK, BLOCK + 1, 3 * BLOCK + 11):
        engine = make_engine(device, family)
        spec = asking(words(lot, length), max_tokens=9)
        drawn = [replace(spec, sampling=TokenSampling(seed=seed, temperature=1.0)) for seed in range(3)]
        async with attached(device, engine):
            received = await within(receive(engine, [spec, *drawn, spec]))
            alone = [(await within(receive(engine, [s])))[0].tokens for s in drawn]
        assert received[0].tokens == received[-1].tokens == await single_run(device, family, spec)
        assert [r.tokens for r in received[1:-1]] == alone, "a seed draws the same from a fork"
        assert engine.counters.prefilled_tokens <= length - 1 + 3 * ((length - 1) % BLOCK)


@pytest.mark.requirement("BATCH-02")
async def test_a_burst_with_one_new_prefix_computes_it_once(device: Device, family: str, lot: random.Random) -> None:
    engine = make_engine(device, family, prefill_budget=64)
    prefix = words(lot, 6 * BLOCK)
    specs = [asking(prefix + words(lot, 3 + i)) for i in range(8)]
    async with attached(device, engine):
        received = await within(asyncio.gather(*(receive(engine, [s]) for s in specs)))
    assert await same_as_alone(device, family, specs, [r for (r,) in received])
    assert engine.counters.prefilled_tokens == len(prefix) + sum(len(s.prompt) - 1 - len(prefix) for s in specs)


@pytest.mark.requirement("BATCH-01")
async def test_who_gives_way_is_computed_again_and_says_the_same(device: Device, family: str, lot: random.Random) -> None:
    engine = engine_with_blocks(device, family, 14, max_sequences=6)
    specs = [asking(words(lot, lot.randrange(2, 60)), max_tokens=lot.randrange(60, 110)) for _ in range(6)]
    async with attached(device, engine):
        received = await within(receive(engine, specs), 60)
    assert await same_as_alone(device, family, specs, received)
    assert engine.cache_state.num_preemptions > 0
    assert engine.cache_state.num_held == 0


async def test_what_is_kept_gives_way_to_what_is_needed(device: Device, family: str, lot: random.Random) -> None:
    engine = engine_with_blocks(device, family, 8, max_sequences=2)
    specs = [asking(words(lot, 3 * BLOCK + 1)) for _ in range(8)]
    async with attached(device, engine):
        for _ in range(2):
            assert await same_as_alone(device, family, specs, await within(receive(engine, specs)))
    assert engine.cache_state.num_evictions > 0
    assert engine.cache_state.num_cached <= 8


async def close(device: Device, engine: Engine) -> None:
    disk = await within(device.run(engine.close))
    assert disk is not None
    await asyncio.to_thread(disk.stop)


@pytest.mark.requirement("BATCH-02")
async def test_a_restart_keeps_the_prefixes_that_lie_on_the_disk(device: Device, family: str, lot: random.Random, tmp_path: Path) -> None:
    disk = {"disk_bytes": 1 << 30, "disk_folder": tmp_path}
    specs = [asking(words(lot, 6 * BLOCK + 5)) for _ in range(3)]
    before = make_engine(device, family, **disk)
    async with attached(device, before):
        await within(receive(before, specs))
        await close(device, before)
    after = make_engine(device, family, **disk)
    async with attached(device, after):
        received = await within(receive(after, specs))
        assert await same_as_alone(device, family, specs, received)
        await close(device, after)
    assert after.counters.fetched_blocks == 18
    assert after.counters.prefilled_tokens == 3 * 4


async def test_what_memory_has_no_room_for_comes_back_from_the_disk(
    device: Device, family: str, lot: random.Random, tmp_path: Path
) -> None:
    engine = engine_with_blocks(device, family, 10, max_sequences=1, disk_bytes=1 << 30, disk_folder=tmp_path)
    specs = [asking(words(lot, 4 * BLOCK + 1)) for _ in range(6)]
    async with attached(device, engine):
        for _ in range(3):
            for spec in specs:
                assert await same_as_alone(device, family, [spec], await within(receive(engine, [spec])))
        await close(device, engine)
    assert engine.counters.fetched_blocks > 0
    assert engine.cache_state.num_evictions > 0


@pytest.mark.parametrize("harm", ["truncated", "another model's", "gone"])
async def test_a_file_that_is_no_good_is_computed_again(device: Device, tmp_path: Path, harm: str) -> None:
    disk = {"disk_bytes": 1 << 30, "disk_folder": tmp_path}
    spec = asking(words(random.Random(5), 4 * BLOCK + 5))
    before = make_engine(device, "qwen3", **disk)
    async with attached(device, before):
        await within(receive(before, [spec]))
        await close(device, before)
    files = sorted(tmp_path.rglob("*.safetensors"))  # noqa: ASYNC240 - nobody else is on this loop
    assert len(files) == 4
    after = make_engine(device, "qwen3", **disk)
    for path in files[::2]:
        if harm == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif harm == "gone":
            path.unlink()
        else:
            path.write_bytes(files[1].read_bytes())
    async with attached(device, after):
        assert await same_as_alone(device, "qwen3", [spec], await within(receive(after, [spec])))
        await close(device, after)
    assert after.counters.faults == 0


async def test_tenants_share_nothing(device: Device) -> None:
    engine = make_engine(device, "qwen3")
    spec = asking(words(random.Random(1), 3 * BLOCK))
    async with attached(device, engine):
        for tenant in ("one", "other"):
            await within(receive(engine, [replace(spec, tenant=tenant)]))
    assert engine.counters.cached_tokens == 0
    assert engine.counters.prefilled_tokens == 2 * (3 * BLOCK - 1)


@pytest.fixture
def explained(device: Device) -> Engine:
    return make_engine(device, "qwen3")


@pytest.mark.requirement("BATCH-02")
async def test_the_explainer_says_where_a_prefix_stopped_matching_and_why(device: Device, explained: Engine) -> None:
    lot = random.Random(2)
    prompt = words(lot, 4 * BLOCK)
    async with attached(device, explained):
        new = await explained.explain(asking(prompt))
        await within(receive(explained, [asking(prompt, max_tokens=1)]))
        again = await explained.explain(asking((*prompt, 7)))
        longer = await explained.explain(asking(prompt + words(lot, 2 * BLOCK)))
        other = (*prompt[:50], prompt[50] + 1, *prompt[51:])
        differs = await explained.explain(asking(other))
        short = await explained.explain(asking(prompt[:BLOCK]))
        elsewhere = await explained.explain(replace(asking(prompt), tenant="another"))
    assert (new.reason, new.num_cached) == ("new", 0)
    assert (again.reason, again.num_cached) == ("all", 4 * BLOCK)
    assert (longer.reason, longer.num_cached) == ("differs", 4 * BLOCK)
    assert (differs.reason, differs.num_cached, differs.position) == ("differs", BLOCK if backend() else 50, 50)
    assert (differs.ours[0], differs.theirs[0]) == (prompt[50] + 1, prompt[50])
    assert short.reason == ("short" if backend() else "all")
    assert (elsewhere.reason, elsewhere.num_cached) == ("new", 0)


async def test_the_explainer_tells_what_gave_way(device: Device) -> None:
    engine = engine_with_blocks(device, "qwen3", 8, max_sequences=1)
    lot = random.Random(3)
    first, *others = [asking(words(lot, 5 * BLOCK)) for _ in range(4)]
    async with attached(device, engine):
        for spec in (first, *others):
            await within(receive(engine, [spec]))
        assert (await engine.explain(first)).reason == "evicted"
