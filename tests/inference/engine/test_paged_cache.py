"""The whole engine on paged keys and values, with the kernels' plain-MLX reference: token for token what mlx-lm's own loop gives.

Without a GPU the kernels' own text runs as well, compiled as C++, on one short batch.
"""

import asyncio
import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models import gemma2, lfm2
from mlx_lm.utils import load_model

from mlx_manager.core.errors import EngineFault
from mlx_manager.inference.engine import engine as engine_module
from mlx_manager.inference.engine import head, paged_cache
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, BlockPool
from mlx_manager.inference.engine.cache_layout import UnsupportedCache
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.lanes import choose_cache
from mlx_manager.inference.engine.pace import Pace
from mlx_manager.inference.engine.paged_attention import Chunks, Kernels, PagedAttention, Pool, Reference
from mlx_manager.inference.engine.paged_cache import _MOST_DESCRIBED as MOST_DESCRIBED  # pyright: ignore[reportPrivateUsage]
from mlx_manager.inference.engine.paged_cache import _SEEN_OFTEN as SEEN_OFTEN  # pyright: ignore[reportPrivateUsage]
from mlx_manager.inference.engine.paged_cache import Described, PagedCache, mixed_size, padded_rows, padded_width
from mlx_manager.inference.engine.prefix import PrefixKeys
from mlx_manager.inference.engine.runner import KVCache, Runner
from mlx_manager.inference.engine.scheduler import Chunk, Policy, Scheduler
from mlx_manager.inference.engine.sequence import Sequence, SequenceSpec, Token, TokenSampling
from mlx_manager.inference.engine.slot_cache import SlotCache
from tests.inference.engine.metal_shim import Shim, why_not
from tests.inference.fixture_models import GREEDY, attached, dialect, eventually, folder, receive, single_run, weights, within

pytestmark = pytest.mark.requirement("BATCH-01", "9.1", "P.1")

FAMILIES = ("qwen3", "llama", "gemma3_text")  # the last one sees 128 tokens in every other layer


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    weights(request.param)
    return request.param


@dataclass
class Built:
    """An engine and what it is made of."""

    engine: Engine
    cache: KVCache
    runner: Runner
    scheduler: Scheduler


def build(device: Device, model: Any, vocab_size: int, cache: KVCache, num_blocks: int, **options: Any) -> Built:
    asked = {"max_sequences": 32, "prefill_budget": 2048} | options
    samples_prompts = cache.takes_unread and not cache.needs_states and head.install(model)
    policy = Policy(max_sequences=asked["max_sequences"], needs_states=cache.needs_states, samples_prompts=samples_prompts)
    runner = Runner(cache, vocab_size)
    scheduler = Scheduler(BlockPool(num_blocks), PrefixKeys("a model", "a cache"), policy)
    engine = Engine(device, runner, scheduler, Pace(asked["prefill_budget"], 10.0), check_every=1)
    return Built(engine, cache, runner, scheduler)


def paged(device: Device, family: str, *, num_blocks: int = 64, attention: PagedAttention | None = None, **options: Any) -> Built:
    """Its books are checked at every step."""
    cache = PagedCache(weights(family), Reference() if attention is None else attention, num_blocks)
    return build(device, weights(family), dialect(family).vocab_size, cache, num_blocks, **options)


def prompts(family: str, count: int, *, shortest: int = 2, longest: int = 60, seed: int = 0) -> list[SequenceSpec]:
    """Ragged ones of ordinary tokens, the same every time. Stop tokens are off: a sequence has the length it was asked for."""
    random_of = random.Random(f"{family} {count} {longest} {seed}")
    return [
        SequenceSpec(
            prompt=tuple(random_of.randrange(300, 1000) for _ in range(random_of.randint(shortest, longest))),
            max_tokens=random_of.randint(3, 14),
            sampling=GREEDY,
        )
        for _ in range(count)
    ]


async def differences(device: Device, family: str, engine: Engine, specs: list[SequenceSpec]) -> list[int]:
    """Which of the specs come out other than alone, when all are submitted at once."""
    async with attached(device, engine):
        received = await within(receive(engine, specs))
    return [i for i, spec in enumerate(specs) if received[i].tokens != await single_run(device, family, spec)]


# ---- equality


@pytest.mark.parametrize("count", [1, 2, 3, 8])
async def test_a_batch_equals_single_runs(device: Device, family: str, count: int) -> None:
    assert await differences(device, family, paged(device, family).engine, prompts(family, count)) == []


async def test_prompts_computed_in_small_chunks_give_the_same(device: Device, family: str) -> None:
    assert await differences(device, family, paged(device, family, prefill_budget=7).engine, prompts(family, 8)) == []


async def test_prompts_past_a_sliding_window_give_the_same(device: Device, family: str) -> None:
    specs = prompts(family, 2, shortest=250, longest=300) + prompts(family, 2, shortest=120, longest=128) + prompts(family, 2)
    assert await differences(device, family, paged(device, family).engine, specs) == []
    assert await differences(device, family, paged(device, family, prefill_budget=50).engine, specs) == []


async def test_a_prefix_that_is_there_is_not_computed_again(device: Device, family: str) -> None:
    """The second turn begins with the first one's reply, and goes past a window."""
    built = paged(device, family, prefill_budget=40)
    (first,) = prompts(family, 1, shortest=150, longest=150)
    async with attached(device, built.engine) as engine:
        (reply,) = await within(receive(engine, [first]))
        assert reply.tokens == await single_run(device, family, first)
        second = replace(first, prompt=(*first.prompt, *reply.tokens, *range(500, 517)))
        stream = engine.submit([second])
        tokens = [item.token async for item in stream if isinstance(item, Token)]
    assert stream.num_cached(0) == (len(first.prompt) + len(reply.tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert tokens == await single_run(device, family, second)


async def test_a_row_that_gives_way_is_computed_again_to_the_same_end(device: Device, family: str) -> None:
    built = paged(device, family, num_blocks=13)
    specs = [replace(spec, max_tokens=50) for spec in prompts(family, 6, shortest=20, longest=60)]
    assert await differences(device, family, built.engine, specs) == []
    assert built.scheduler.num_preemptions > 0


async def test_neighbours_that_come_and_go_at_any_moment_change_nothing(device: Device, family: str) -> None:
    random_of = random.Random(family)
    built = paged(device, family, max_sequences=6, prefill_budget=16)
    specs = prompts(family, 12)
    gaps = [random_of.random() * 0.01 for _ in specs]

    async def one(i: int) -> list[int]:
        await asyncio.sleep(sum(gaps[: i + 1]))
        stream = built.engine.submit([specs[i]])
        tokens: list[int] = []
        async for item in stream:
            tokens += [item.token] if isinstance(item, Token) else []
            if i % 3 == 2 and len(tokens) == 2:
                stream.close()
                break
        return tokens

    async with attached(device, built.engine):
        results = await within(asyncio.gather(*(one(i) for i in range(len(specs)))))
    for i, (spec, tokens) in enumerate(zip(specs, results, strict=True)):
        expected = await single_run(device, family, spec)
        assert tokens == (expected[:2] if i % 3 == 2 else expected)


# ---- forks


@dataclass
class Copying(Reference):
    """Remembers what was copied: (source, target)."""

    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def copy_block(self, pool: Pool, source: int, target: int) -> None:
        self.copies.append((source, target))
        super().copy_block(pool, source, target)


@pytest.mark.parametrize("length", [41, 65])  # the second one's blocks are full: nothing is copied
async def test_replies_to_one_prompt_go_their_own_ways(device: Device, family: str, length: int) -> None:
    (spec,) = prompts(family, 1, shortest=length, longest=length)
    own = [replace(spec, sampling=TokenSampling(seed=i, temperature=1.5), max_tokens=16) for i in range(3)]
    specs = [replace(spec, max_tokens=16), *own]
    attention = Copying()
    built = paged(device, family, attention=attention)
    num_layers = len(weights(family).layers)
    async with attached(device, built.engine) as engine:
        together = [r.tokens for r in await within(receive(engine, specs))]
    assert built.engine.counters.prefilled_tokens == length - 1
    assert len(attention.copies) == (0 if length % BLOCK_TOKENS == 1 else 3 * num_layers)
    assert together[0] == await single_run(device, family, specs[0])
    assert len({tuple(tokens) for tokens in together}) == 4
    async with attached(device, paged(device, family).engine) as engine:
        alone = [(await within(receive(engine, [spec])))[0].tokens for spec in specs]
    assert together == alone


# ---- memory


def test_the_blocks_take_what_their_tokens_take_and_no_more() -> None:
    model = weights("qwen3")
    PagedCache(model, Reference(), 2)  # whatever is made once is there
    gc.collect()
    before = mx.get_active_memory()
    cache = PagedCache(model, Reference(), 300)
    num_bytes = 300 * BLOCK_TOKENS * cache.token_bytes
    assert cache.token_bytes == 4 * 2 * 2 * 32 * 4  # layers, keys and values, heads, their size, float32
    assert cache.allocated_bytes == num_bytes
    assert 0 <= mx.get_active_memory() - before - num_bytes < 0.01 * num_bytes


def test_a_batch_has_one_of_a_few_sizes() -> None:
    assert [padded_rows(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 32)] == [1, 2, 4, 8, 8, 16, 16, 24, 32]
    assert [padded_width(n) for n in (1, 8, 9, 100)] == [8, 8, 16, 128]


@pytest.mark.parametrize("kind", ["chunk", "row"])
def test_who_waits_for_a_pass_waits_for_every_layer(kind: str) -> None:
    """MLX does not see that a pool is written to: the epochs are what there is to wait for."""

    @dataclass
    class Seen(Reference):
        pools: list[Pool] = field(default_factory=list[Pool])

        def write(self, keys: mx.array, values: mx.array, pool: Pool, chunks: Chunks) -> None:
            super().write(keys, values, pool, chunks)
            self.pools.append(pool)

    attention = Seen()
    cache = PagedCache(weights("qwen3"), attention, 4)
    sequence = Sequence(SequenceSpec((3, 1, 4), 5, GREEDY), 0)
    sequence.table = [2]
    cache.admit(sequence)
    (queued,) = cache.prefill([Chunk(sequence, 0, 2)])
    sequence.num_queued = 2
    if kind == "row":
        cache.arrange([sequence], set())
        _, queued, _ = cache.forward(mx.array([4], dtype=mx.int32))
    assert len(attention.pools) == 4
    assert {id(pool.epoch) for pool in attention.pools} <= {id(a) for a in queued.arrays()}


# ---- rows and chunks of prompts in one pass


def waiting(prompt: list[int], blocks: list[int], cache: PagedCache) -> Sequence:
    sequence = Sequence(SequenceSpec(tuple(prompt), 50, GREEDY), 0)
    sequence.table = blocks
    cache.admit(sequence)
    return sequence


def decoding(sequence: Sequence, cache: PagedCache) -> Sequence:
    """The same, when all of its prompt but the last token is there."""
    mx.eval(cache.prefill([Chunk(sequence, 0, sequence.prefill_end)])[0].arrays())
    sequence.num_queued = sequence.num_computed = sequence.prefill_end
    return sequence


def test_a_step_reads_the_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = weights("qwen3")
    cache = PagedCache(model, Reference(), 16)
    rows = [decoding(waiting([3, 1, 4, n], [1 + n], cache), cache) for n in range(3)]
    coming = [waiting([2, 7, 1, 8, n], [5 + n], cache) for n in range(2)]
    shapes: list[tuple[int, ...]] = []
    call = type(model).__call__

    def seen(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        shapes.append(inputs.shape)
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", seen)
    cache.arrange(rows, set())
    logits, _, made = cache.forward(mx.array([9, 9, 9], dtype=mx.int32), [Chunk(coming[0], 0, 5, samples=True), Chunk(coming[1], 0, 2)])
    assert shapes == [(4 + 32, 1)]
    assert logits.shape[0] == 3
    assert [None if queued.logits is None else queued.logits.shape[0] for queued in made] == [1, None]


def test_a_pass_has_one_of_a_few_sizes() -> None:
    assert [mixed_size(n, 1).num_tokens for n in (1, 32, 33, 129, 289, 512, 513, 2048)] == [32, 32, 144, 144, 320, 512, 640, 2048]
    assert [mixed_size(100, n).num_chunks for n in (1, 2, 8, 9)] == [1, 8, 8, 16]
    assert mixed_size(288, 3).is_common
    assert not mixed_size(289, 3).is_common
    assert not mixed_size(100, 9).is_common


def test_a_pass_is_described_for_good_when_it_has_been_seen_often_and_not_for_ever() -> None:
    class Owner:
        traced = 0

        def describe(self, x: mx.array) -> tuple[mx.array, list[mx.array]]:
            self.traced += 1
            return x + 1, []

    owner = Owner()
    described = Described(owner.describe, True)
    for _ in range(3 * SEEN_OFTEN):
        assert described(3, mx.zeros(3))[0].tolist() == [1, 1, 1]
    assert owner.traced == SEEN_OFTEN
    for size in range(1, MOST_DESCRIBED + 20):
        for _ in range(SEEN_OFTEN + 1):
            described(size, mx.zeros(size))
    assert len(described._compiled) == MOST_DESCRIBED  # pyright: ignore[reportPrivateUsage]
    assert described(1, mx.zeros(1))[0].tolist() == [1]


@pytest.mark.parametrize("compiles", [False, True])
def test_what_a_model_took_is_there_again_when_it_has_left(compiles: bool) -> None:
    """Nobody looks for cycles then: they would be found too late for whoever waits for the memory."""
    gc.collect()
    gc.disable()
    try:
        model, _ = load_model(folder("llama"))
        left = weakref.ref(model)
        cache = choose_cache(model, 4 << 20, Traceable() if compiles else Reference(), proven="paged" if compiles else None)
        assert isinstance(cache, PagedCache)
        if compiles:
            sequence = waiting([3, 1, 4, 1, 5], [1], cache)
            for _ in range(2 * SEEN_OFTEN):
                mx.eval(cache.prefill([Chunk(sequence, 0, 5, samples=True)])[0].arrays())
            assert cache._described_mix._compiled  # pyright: ignore[reportPrivateUsage]
            del sequence
        del model, cache
        assert left() is None
    finally:
        gc.enable()


async def test_a_few_tokens_behind_a_long_beginning_give_the_same_as_alone(device: Device, family: str) -> None:
    built = paged(device, family)
    (first,) = prompts(family, 1, shortest=300, longest=300)
    again = [replace(first, prompt=(*first.prompt[:n], *range(500, 500 + k))) for n, k in ((290, 9), (256, 2), (300, 5), (40, 12))]
    async with attached(device, built.engine) as engine:
        await within(receive(engine, [first]))
        received = await within(receive(engine, again))
        alone = await within(receive(engine, [replace(first, prompt=(*first.prompt[:288], 501, 502))]))
    expected = [await single_run(device, family, spec) for spec in (*again, replace(first, prompt=(*first.prompt[:288], 501, 502)))]
    assert [r.tokens for r in (*received, *alone)] == expected


class Arithmetic(Reference):
    """What comes out depends on everything that a kernel is given on the device, and nothing is kept."""

    def append_and_attend(self, queries: Any, keys: Any, values: Any, pool: Pool, table: Any, lengths: Any, **_: Any) -> mx.array:
        pool.epoch = pool.epoch + 1
        return queries * (1 + 0.01 * lengths[:, None, None, None]) + 0.1 * mx.sum(table) + mx.mean(keys) * mx.mean(values)

    def attend_chunks(self, queries: Any, keys: Any, values: Any, pool: Pool, chunks: Chunks, **_: Any) -> mx.array:
        pool.epoch = pool.epoch + 1
        ends = mx.sum(chunks.on_device * mx.array([1, 3, 7]))
        return queries + 0.01 * ends + 0.1 * mx.sum(chunks.table) + mx.mean(keys) * mx.mean(values)


class Traceable(Arithmetic):
    can_be_compiled = True

    def can_compile_chunks(self, pool: Pool) -> bool:
        return True


def test_a_pass_that_is_described_beforehand_is_filled_in_with_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_cache, "_SEEN_OFTEN", 2)
    found: list[list[mx.array]] = []
    traces: list[int] = []
    for attention in (Arithmetic(), Traceable()):
        cache = PagedCache(weights("llama"), attention, 40)
        logits: list[mx.array] = []
        for n in range(6):
            rows = [decoding(waiting([3, 1, 4 + n, 5], [1 + i + n], cache), cache) for i in range(1 + n % 2)]
            coming = [waiting([2, 7 + i, *range(10 + n, 40 + 3 * n)], [6 + 2 * n + i, 9], cache) for i in range(2)]
            cache.arrange(rows, set())
            chunks = [Chunk(coming[0], 0, len(coming[0].tokens), samples=True), Chunk(coming[1], 0, 20 + n)]
            of_rows, step, made = cache.forward(mx.array([5 + n] * len(rows), dtype=mx.int32), chunks)
            alone = cache.prefill([Chunk(coming[1], 20 + n, len(coming[1].tokens), samples=True)])
            assert made[0].logits is not None
            assert alone[0].logits is not None
            mx.eval(step.arrays(), made[0].arrays())
            logits += [of_rows, made[0].logits, alone[0].logits]
        found.append(logits)
        traces.append(len(cache._described_mix._compiled))  # pyright: ignore[reportPrivateUsage]
    assert traces[0] == 0
    assert traces[1] > 0, "no pass could be described beforehand"
    for one, other in zip(*found, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-4).item()


# ---- who is urgent, a step ahead


@dataclass
class Queue:
    """What the engine had its runner queue: who decodes, whose prompts are read, and whether the step before had not been read yet."""

    built: Built
    passes: list[tuple[set[str], set[str], bool]] = field(default_factory=list[tuple[set[str], set[str], bool]])

    def __post_init__(self) -> None:
        queue = self.built.runner.queue

        def noted(plan: Any, unread: Any = None) -> Any:
            decode, read = ({s.spec.priority for s in of} for of in (plan.decode, [chunk.sequence for chunk in plan.prefill]))
            self.passes.append((decode, read, unread is not None))
            return queue(plan, unread)

        self.built.runner.queue = noted


@pytest.mark.requirement("BATCH-04")
async def test_where_somebody_urgent_is_expected_no_step_is_queued_behind_another(device: Device) -> None:
    built = paged(device, "llama")
    low, high = ([replace(spec, priority=priority, max_tokens=40) for spec in prompts("llama", 3)] for priority in ("low", "high"))
    async with attached(device, built.engine) as engine:
        queue = Queue(built)
        await within(receive(engine, low))
        assert any(is_ahead for _, _, is_ahead in queue.passes), "steps overlap where all are alike"
        await within(receive(engine, high[:1]))
        queue.passes.clear()
        waiting = asyncio.ensure_future(receive(engine, low))
        await eventually(lambda: engine.counters.decoded_tokens > 3 * 40 + 40 + 10)
        urgent = await within(receive(engine, high[1:2]))
        received = await within(waiting)
    of_low = [is_ahead for decode, _, is_ahead in queue.passes if decode == {"low"}]
    assert of_low
    assert not any(of_low)
    first = next(i for i, (_, read, _) in enumerate(queue.passes) if "high" in read)
    assert queue.passes[first] == (set(), {"high"}, False), "nothing else is in the pass that it waits for"
    assert urgent[0].tokens == await single_run(device, "llama", high[1])
    assert [r.tokens for r in received] == [await single_run(device, "llama", spec) for spec in low]


async def test_nobody_urgent_shares_a_pass_with_prompts_of_others_where_nobody_decodes(device: Device) -> None:
    built = paged(device, "llama", prefill_budget=64, num_blocks=200)
    low = [replace(spec, priority="low") for spec in prompts("llama", 3, shortest=900, longest=900)]
    high = [replace(spec, priority="high") for spec in prompts("llama", 2, shortest=20, longest=20)]
    async with attached(device, built.engine) as engine:
        await within(receive(engine, high[:1]))
        queue, waiting = Queue(built), asyncio.ensure_future(receive(engine, low))
        await eventually(lambda: len(queue.passes) > 3)
        urgent = await within(receive(engine, high[1:]))
        received = await within(waiting)
    first = next(i for i, (_, read, _) in enumerate(queue.passes) if "high" in read)
    assert queue.passes[first] == (set(), {"high"}, False)
    assert not any(is_ahead for _, _, is_ahead in queue.passes[:first])
    assert urgent[0].tokens == await single_run(device, "llama", high[1])
    assert [r.tokens for r in received] == [await single_run(device, "llama", spec) for spec in low]


async def test_of_the_tokens_of_a_step_first_ones_are_handed_over_first_and_of_these_the_most_urgent(device: Device) -> None:
    built = paged(device, "llama")
    taken: list[str] = []
    engine: Any = built.engine
    take = engine._take

    def noted(sequence: Sequence, token: Token) -> None:
        taken.append(sequence.spec.priority)
        take(sequence, token)

    engine._take = noted
    async with attached(device, built.engine):
        decoding = asyncio.ensure_future(receive(engine, [replace(prompts("llama", 1)[0], priority="high", max_tokens=60)]))
        await eventually(lambda: len(taken) > 4)
        await within(
            receive(engine, [replace(s, priority=p, max_tokens=1) for s, p in zip(prompts("llama", 2), ("low", "normal"), strict=True)])
        )
        await within(decoding)
    first = taken.index("normal")
    assert taken[first : first + 3] == ["normal", "low", "high"]


@dataclass
class Asked:
    """Replies to one prompt, asked for after a while; who asks may give up after `patience` tokens."""

    specs: list[SequenceSpec]
    after_s: float
    patience: int | None
    received: list[list[int]] = field(default_factory=list[list[int]])

    async def ask(self, engine: Engine) -> None:
        await asyncio.sleep(self.after_s)
        self.received = [[] for _ in self.specs]
        stream = engine.submit(self.specs)
        async for item in stream:
            if isinstance(item, Token):
                self.received[item.index].append(item.token)
            if self.patience is not None and sum(map(len, self.received)) >= self.patience:
                stream.close()
                break


def some_requests(lot: random.Random) -> list[Asked]:
    """Of all kinds and classes, some of which begin alike."""
    beginnings = [tuple(lot.randrange(300, 1000) for _ in range(150)) for _ in range(3)]
    requests: list[Asked] = []
    for _ in range(20):
        prompt = (*lot.choice(beginnings)[: lot.randint(0, 150)], *(lot.randrange(300, 1000) for _ in range(lot.randint(1, 40))))
        sampling = lot.choice([GREEDY, GREEDY, TokenSampling(0, 1.2, top_p=0.9), TokenSampling(0, 0.0, repetition_penalty=1.3)])
        priority = lot.choice(("high", "normal", "low", "low"))
        spec = SequenceSpec(prompt, lot.randint(1, 25), sampling, priority=priority, client=lot.choice("ab"))
        specs = [replace(spec, sampling=replace(sampling, seed=seed)) for seed in range(lot.choice((1, 1, 2, 3)))]
        requests.append(Asked(specs, lot.random() * 0.2, lot.choice((None, None, None, lot.randint(1, 8)))))
    return requests


@pytest.mark.parametrize(
    ("family", "expected_s", "num_blocks"),
    [("llama", 0.0, 20), ("llama", 60.0, 100), ("qwen3", 0.03, 20), ("qwen3", 60.0, 20), ("gemma3_text", 0.03, 100)],
)
async def test_whoever_comes_whenever_with_whatever_claims_everybody_says_what_they_say_alone(
    device: Device, family: str, expected_s: float, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(family)
    monkeypatch.setattr(engine_module, "_EXPECTED_S", expected_s)
    lot = random.Random(f"{family} {expected_s} {num_blocks}")
    requests = some_requests(lot)
    limits = {"max_sequences": lot.choice((3, 8)), "prefill_budget": lot.choice((16, 60, 2048))}
    built = paged(device, family, num_blocks=num_blocks, **limits)
    async with attached(device, built.engine) as engine:
        await within(asyncio.gather(*(request.ask(engine) for request in requests)))
        await device.run(engine.check_integrity)
    assert built.scheduler.pool.num_held == 0
    async with attached(device, paged(device, family, num_blocks=100).engine) as engine:
        for request in requests:
            for spec, received in zip(request.specs, request.received, strict=True):
                alone = (await within(receive(engine, [spec])))[0].tokens
                assert received == (alone if request.patience is None else alone[: len(received)])


async def test_a_first_token_is_handed_over_before_the_next_step_is_queued_where_nobody_else_decodes(device: Device) -> None:
    built = paged(device, "llama")
    async with attached(device, built.engine) as engine:
        queue = Queue(built)
        await within(receive(engine, prompts("llama", 1)))
    assert queue.passes[0] == (set(), {"normal"}, False)
    assert queue.passes[1] == ({"normal"}, set(), False)


# ---- blocks on their way to a disk and back


def take_out(built: Built) -> list[tuple[Any, dict[str, np.ndarray]]]:
    """Everything that can be found, as it would be written to files."""
    return [(content, dict(built.runner.export(block) or {})) for block, content in built.scheduler.pool.cached_contents()]


def put_in(built: Built, blocks: list[tuple[Any, dict[str, np.ndarray]]]) -> None:
    pool = built.scheduler.pool
    spare = pool.allocate()  # so that no block has the number that it had
    assert spare is not None
    for content, arrays in blocks:
        block = pool.allocate()
        assert block is not None
        assert built.runner.load(block, arrays) is content.resumable
        pool.publish(block, content)
        pool.release(block)
    pool.release(spare)


def slots(device: Device, family: str) -> Built:
    return build(device, weights(family), dialect(family).vocab_size, SlotCache(weights(family)), 64)


Make = Callable[[Device, str], Built]


@pytest.mark.parametrize(("source", "target"), [(paged, paged), (slots, paged), (paged, slots)])
async def test_blocks_that_were_written_to_files_serve_another_cache(device: Device, family: str, source: Make, target: Make) -> None:
    (spec,) = prompts(family, 1, shortest=140, longest=140)
    first, second = source(device, family), target(device, family)
    async with attached(device, first.engine) as engine:
        await within(receive(engine, [spec]))
    blocks = await device.run(lambda: take_out(first))
    assert len(blocks) == 4
    await device.run(lambda: put_in(second, blocks))
    (again,) = prompts(family, 1, shortest=20, longest=20)
    longer = replace(spec, prompt=(*spec.prompt[:130], *again.prompt))
    async with attached(device, second.engine) as engine:
        (received,) = await within(receive(engine, [longer]))
    assert second.engine.counters.cached_tokens == 128
    assert received.tokens == await single_run(device, family, longer)
    restored = {content.digest: arrays for content, arrays in await device.run(lambda: take_out(second))}
    for content, arrays in blocks:
        assert restored[content.digest].keys() == arrays.keys()
        assert all(np.array_equal(restored[content.digest][name], array) for name, array in arrays.items())
        assert all(array.shape == (4, 2, BLOCK_TOKENS, 32) for array in arrays.values())


@pytest.mark.parametrize("make", [paged, slots])
async def test_a_block_of_another_model_is_refused(device: Device, make: Make) -> None:
    built = make(device, "qwen3")
    right = np.zeros((4, 2, BLOCK_TOKENS, 32), np.float32)
    for wrong in (right[:3], right.astype(np.float16)):
        with pytest.raises(ValueError, match="another model"):
            built.runner.load(1, {"keys.0": right, "values.0": wrong})
    with pytest.raises(KeyError):
        built.runner.load(1, {"keys.0": right})


# ---- a pass that fails


async def test_a_pass_that_fails_does_not_fail_those_after_it(device: Device) -> None:
    @dataclass
    class Failing(Reference):
        num_left: int = 21  # in the second half of the layers of a decode step

        def append_and_attend(self, *args: Any, **kwargs: Any) -> mx.array:
            self.num_left -= 1
            if self.num_left == 0:
                raise RuntimeError("the device is on fire")
            return super().append_and_attend(*args, **kwargs)

    built = paged(device, "qwen3", attention=Failing())
    specs = [replace(spec, max_tokens=12) for spec in prompts("qwen3", 3)]
    async with attached(device, built.engine) as engine:
        with pytest.raises(EngineFault):
            await within(receive(engine, specs))
        received = await within(receive(engine, specs))
    for spec, result in zip(specs, received, strict=True):
        assert result.tokens == await single_run(device, "qwen3", spec)


# ---- layers that keep a state


@dataclass
class Hybrid:
    """A small model of random weights, whose layers convolve but for two that attend."""

    vocab_size: int = 200
    model: Any = None

    def __post_init__(self) -> None:
        mx.random.seed(1)
        self.model = lfm2.Model(
            lfm2.ModelArgs(
                model_type="lfm2",
                vocab_size=self.vocab_size,
                hidden_size=64,
                num_hidden_layers=5,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=1000,
                norm_eps=1e-5,
                conv_bias=False,
                conv_L_cache=3,
                block_dim=64,
                block_multiple_of=16,
                block_ffn_dim_multiplier=1.0,
                block_auto_adjust_ff_dim=False,
                block_ff_dim=96,
                layer_types=["conv", "full_attention", "conv", "conv", "full_attention"],
            )
        )
        self.model.update(tree_map(lambda a: a * 3 if a.ndim == 2 else a, self.model.parameters()))  # or all replies are the same
        mx.eval(self.model.parameters())

    def built(self, device: Device, *, is_paged: bool, num_blocks: int = 64, **options: Any) -> Built:
        cache = PagedCache(self.model, Reference(), num_blocks) if is_paged else SlotCache(self.model)
        return build(device, self.model, self.vocab_size, cache, num_blocks, **options)

    def specs(self, *lengths: int) -> list[SequenceSpec]:
        random_of = random.Random(str(lengths))
        return [
            SequenceSpec(tuple(random_of.randrange(1, self.vocab_size) for _ in range(n)), random_of.randint(5, 40), GREEDY)
            for n in lengths
        ]

    async def alone(self, device: Device, spec: SequenceSpec) -> list[int]:
        return await device.run(lambda: [int(t) for t, _ in generate_step(mx.array(spec.prompt), self.model, max_tokens=spec.max_tokens)])


@pytest.fixture(scope="module")
def hybrid() -> Hybrid:
    return Hybrid()


@pytest.mark.parametrize("is_paged", [True, False])
async def test_states_come_and_go_with_their_rows(device: Device, hybrid: Hybrid, is_paged: bool) -> None:
    """There are too few blocks for all."""
    specs = [replace(spec, max_tokens=64) for spec in hybrid.specs(1, 40, 7, 70, 33)]
    built = hybrid.built(device, is_paged=is_paged, num_blocks=9, prefill_budget=40)
    async with attached(device, built.engine) as engine:
        received = await within(receive(engine, specs))
    assert [r.tokens for r in received] == [await hybrid.alone(device, spec) for spec in specs]
    assert built.scheduler.num_preemptions > 0


@pytest.mark.parametrize("is_paged", [True, False])
async def test_states_are_found_copied_and_begun_with_side_by_side(device: Device, hybrid: Hybrid, is_paged: bool) -> None:
    """Two that have no state yet, one that goes on from a block, and replies to one prompt come in together the second time."""
    one, other, block, long = hybrid.specs(1, 1, 33, 45)
    specs = [one, other, block, long, long, long]
    built = hybrid.built(device, is_paged=is_paged)
    async with attached(device, built.engine) as engine:
        for _ in range(2):
            received = await within(receive(engine, specs))
            assert [r.tokens for r in received] == [await hybrid.alone(device, spec) for spec in specs]
    counters = built.engine.counters
    assert (counters.prefilled_tokens, counters.cached_tokens) == (32 + 44 + 12, 2 * 44 + 32 + 32 + 2 * 44)


def test_a_row_that_comes_back_at_once_has_its_new_blocks_and_state(hybrid: Hybrid) -> None:
    """It gave way and was found room for again before anybody decoded."""
    cache = PagedCache(hybrid.model, Reference(), 8)
    (spec,) = hybrid.specs(9)
    stays, comes_back, other = (Sequence(spec, i) for i in range(3))

    def prefill(sequence: Sequence, block: int) -> None:
        sequence.table, sequence.num_queued = [block], 0
        cache.admit(sequence)
        mx.eval(cache.prefill([Chunk(sequence, 0, sequence.prefill_end)])[0].arrays())
        sequence.num_queued = sequence.prefill_end

    def decode() -> mx.array:
        assert cache.arrange([stays, comes_back], set()) == [stays, comes_back]
        logits, step, _ = cache.forward(mx.array([spec.prompt[-1]] * 2, dtype=mx.int32))
        mx.eval(logits, step.arrays())
        return logits

    prefill(stays, 1)
    prefill(comes_back, 2)
    before = decode()
    cache.forget(comes_back)
    other.tokens = list(range(1, 10))
    prefill(other, 2)
    prefill(comes_back, 3)
    assert mx.allclose(decode()[1], before[1], atol=1e-4)


@pytest.mark.parametrize(("source", "target"), [(True, True), (True, False), (False, True)])
async def test_states_are_written_to_files_too(device: Device, hybrid: Hybrid, source: bool, target: bool) -> None:
    (spec,) = hybrid.specs(100)
    first, second = (hybrid.built(device, is_paged=is_paged, prefill_budget=64) for is_paged in (source, target))
    async with attached(device, first.engine) as engine:
        await within(receive(engine, [spec]))
    blocks = await device.run(lambda: take_out(first))
    await device.run(lambda: put_in(second, blocks))
    async with attached(device, second.engine) as engine:
        (received,) = await within(receive(engine, [spec]))
    assert second.engine.counters.cached_tokens >= 64
    assert received.tokens == await hybrid.alone(device, spec)


# ---- who cannot be served


def test_a_model_that_keeps_something_else_is_refused() -> None:
    class Odd:
        layers = ()

        def make_cache(self) -> list[Any]:
            return [object()]

    with pytest.raises(UnsupportedCache, match="keep a object"):
        PagedCache(Odd(), Reference(), 2)


def test_a_shape_without_a_kernel_is_refused() -> None:
    mx.random.seed(0)
    kinds = ["conv", "full_attention"]
    args = lfm2.ModelArgs("lfm2", 50, 48, 2, 2, 1, 100, 1e-5, False, 3, 48, 16, 1.0, False, 64, layer_types=kinds)
    with pytest.raises(UnsupportedCache, match="no kernel has 2 queries on 1 keys of 24"):
        PagedCache(lfm2.Model(args), Reference(), 2)


def test_a_model_that_attends_by_itself_is_refused() -> None:
    args = gemma2.ModelArgs("gemma2", 64, 1, 64, 2, 32, 1e-6, 50, 1)
    with pytest.raises(UnsupportedCache, match="computes on keys and values itself"):
        PagedCache(gemma2.Model(args), Reference(), 2)


# ---- the kernels' text


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    folder: Path = tmp_path_factory.mktemp("kernels")
    reason = why_not(folder)
    if reason is not None:
        pytest.skip(f"kernels need a C++ compiler to run here: {reason}")
    return Shim(folder)


@pytest.mark.parametrize("family", ["gemma3_text"], indirect=True)
async def test_the_kernels_text_gives_the_same_and_writes_in_place(device: Device, family: str, shim: Shim) -> None:
    """In chunks, past a window, with a prompt twice, whose last block is copied."""
    built = paged(device, family, num_blocks=24, attention=Kernels("metal", shim.metal_kernel), prefill_budget=100)
    assert isinstance(built.cache, PagedCache)
    (long,), (short,) = prompts(family, 1, shortest=150, longest=150), prompts(family, 1, shortest=10, longest=10)
    specs = [replace(spec, max_tokens=5) for spec in (long, short, short)]
    async with attached(device, built.engine) as engine:
        received = await within(receive(engine, specs), 60)
    for spec, result in zip(specs, received, strict=True):
        assert result.tokens == await single_run(device, family, spec)
    kernels = {launch.name.rsplit("_", 1)[0] for launch in shim.launches}
    pools = {id(launch.inputs[3]) for launch in shim.launches if launch.name.startswith("paged_append")}
    assert len(pools) == len(weights(family).layers), "an array of a pool was replaced"
    assert kernels == {"paged_write", "paged_gather", "paged_copy_block", "paged_append_and_attend", "paged_reduce"}
