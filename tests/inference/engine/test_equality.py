"""Greedy output in whatever batch is that of mlx-lm's own loop running each prompt alone, token for token."""

import asyncio
import random

import mlx.core as mx
import pytest

from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.sampling import Sampler
from mlx_manager.inference.engine.sequence import SequenceSpec
from tests.inference import fixture_models
from tests.inference.fixture_models import GREEDY, attached, dialect, make_engine, receive, single_run, within

pytestmark = pytest.mark.requirement("BATCH-01", "9.1", "P.1")


@pytest.fixture(params=["ahead", "in turn"], autouse=True)
def is_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(fixture_models, "is_ahead", request.param == "ahead")
    return request.param == "ahead"


def prompts(family: str, count: int, *, shortest: int = 2, longest: int = 60) -> list[SequenceSpec]:
    """Ragged ones of ordinary tokens, the same every time. Stop tokens are off: a sequence has the length it was asked for."""
    random_of = random.Random(f"{family} {count} {longest}")
    vocabulary = min(dialect(family).stop_tokens, default=1000)
    return [
        SequenceSpec(
            prompt=tuple(random_of.randrange(300, max(301, min(vocabulary, 1000))) for _ in range(random_of.randint(shortest, longest))),
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


@pytest.mark.parametrize("count", [1, 2, 8, 16])
async def test_a_batch_equals_single_runs(device: Device, family: str, count: int) -> None:
    assert await differences(device, family, make_engine(device, family), prompts(family, count)) == []


async def test_steps_that_are_read_at_once_give_the_same(device: Device, family: str) -> None:
    """As it is done where the device is the CPU."""
    assert await differences(device, family, make_engine(device, family, ahead=False, prefill_budget=20), prompts(family, 8)) == []


async def test_prompts_computed_in_small_chunks_give_the_same(device: Device, family: str) -> None:
    assert await differences(device, family, make_engine(device, family, prefill_budget=7), prompts(family, 8)) == []


async def test_a_prompt_of_one_token_has_nothing_to_prefill(device: Device, family: str) -> None:
    engine = make_engine(device, family)
    alone = prompts(family, 1, shortest=1, longest=1)
    assert await differences(device, family, engine, alone) == []
    assert engine.counters.prefilled_tokens == 0
    assert await differences(device, family, engine, alone * 2 + prompts(family, 3) + alone) == []


async def test_prompts_past_a_sliding_window_give_the_same(device: Device, family: str) -> None:
    """Gemma's window is 128 tokens; the others take part because their caches grow past a step of 256."""
    specs = prompts(family, 3, shortest=250, longest=300) + prompts(family, 2, shortest=120, longest=128) + prompts(family, 2)
    assert await differences(device, family, make_engine(device, family), specs) == []
    assert await differences(device, family, make_engine(device, family, prefill_budget=50), specs) == []


async def test_stop_tokens_end_a_sequence_where_they_end_it_alone(device: Device, family: str) -> None:
    engine = make_engine(device, family)
    specs = prompts(family, 4)
    endings = [(await single_run(device, family, spec))[-1] for spec in specs]
    stopped = [SequenceSpec(s.prompt, s.max_tokens, s.sampling, frozenset({end})) for s, end in zip(specs, endings, strict=True)]
    async with attached(device, engine):
        received = await within(receive(engine, stopped))
    for spec, result in zip(stopped, received, strict=True):
        assert result.tokens == await single_run(device, family, spec)
        assert result.ended is not None
        assert result.ended.reason == "stop"


async def test_arrivals_and_cancellations_at_any_moment_change_nothing(device: Device, family: str) -> None:
    """Sixteen sequences arrive in random gaps; every fourth is given up after a few tokens."""
    random_of = random.Random(family)
    engine = make_engine(device, family, max_sequences=6, prefill_budget=16)
    specs = prompts(family, 16)
    gaps = [random_of.random() * 0.01 for _ in specs]

    async def one(i: int) -> list[int]:
        await asyncio.sleep(sum(gaps[: i + 1]))
        stream = engine.submit([specs[i]])
        tokens: list[int] = []
        async for item in stream:
            tokens += [item.token] if hasattr(item, "token") else []  # type: ignore[union-attr]
            if i % 4 == 3 and len(tokens) == 2:
                stream.close()
                return tokens
        return tokens

    async with attached(device, engine):
        results = await within(asyncio.gather(*(one(i) for i in range(len(specs)))))
    for i, (spec, tokens) in enumerate(zip(specs, results, strict=True)):
        expected = await single_run(device, family, spec)
        assert tokens == (expected[:2] if i % 4 == 3 else expected)


async def test_one_pass_serves_the_whole_batch(device: Device) -> None:
    specs = [SequenceSpec(s.prompt, 32, GREEDY) for s in prompts("qwen3", 4)]
    engine = make_engine(device, "qwen3")
    async with attached(device, engine):
        await within(receive(engine, specs))
    assert engine.counters.decode_steps <= 40
    assert engine.counters.decoded_tokens == 4 * 32
    assert engine.counters.prefilled_tokens == sum(len(s.prompt) - 1 for s in specs)


async def test_first_tokens_of_a_burst_come_within_a_few_steps(device: Device) -> None:
    """Nobody waits for another's reply to end."""
    specs = [SequenceSpec(s.prompt, 20, GREEDY) for s in prompts("qwen3", 4)]
    engine = make_engine(device, "qwen3")
    firsts: dict[int, int] = {}
    async with attached(device, engine):
        num = 0
        async for item in engine.submit(specs):
            firsts.setdefault(item.index, num)
            num += 1
    assert max(firsts.values()) < 4 * 4


async def test_the_proof_notices_rows_that_are_mixed_up(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is given its neighbour's token."""
    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, logits, masks: sample(self, mx.roll(logits, 1, axis=0), masks))  # type: ignore[no-untyped-def]
    assert await differences(device, "qwen3", make_engine(device, "qwen3"), prompts("qwen3", 4)) != []


async def test_the_count_notices_rows_that_are_computed_one_by_one(device: Device) -> None:
    engine = make_engine(device, "qwen3", max_sequences=1)
    async with attached(device, engine):
        await within(receive(engine, [SequenceSpec(s.prompt, 32, GREEDY) for s in prompts("qwen3", 4)]))
    assert engine.counters.decode_steps > 40
