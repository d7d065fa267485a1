"""Architectures with states, windows, sinks and caches of their own: each in the cache that suits it, each saying what mlx-lm's own
loop says for every sequence alone. Whatever they share, and whoever gives way."""

import random
from dataclasses import dataclass, field

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mlx_manager.hub.checkpoint import kv_bytes_per_token
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.sequence import Ended, SequenceSpec, Token
from mlx_manager.inference.loader import EngineLimits, make_engine
from tests.inference.engine.tiny_models import CONFIGS, VOCABULARY, config_of, tiny
from tests.inference.fixture_models import GREEDY


@dataclass
class Here:
    """A device that is this thread: what a test posts is done at once, and the test takes the turns."""

    posted: list[object] = field(default_factory=list[object])

    def post(self, work) -> bool:  # type: ignore[no-untyped-def]
        work()
        return True


def engine_of(architecture: str, **limits: object) -> Engine:
    asked = EngineLimits(**{"check_every": 1, "ahead": True, "step_s": 10.0, "kv_bytes": 64 << 20, "prefill_budget": 40} | limits)  # type: ignore[arg-type]
    return make_engine(tiny(architecture), Here(), asked, vocab_size=VOCABULARY, model_key=architecture)  # type: ignore[arg-type]


async def run(engine: Engine, specs: list[SequenceSpec]) -> list[list[int]]:
    stream = engine.submit(specs)
    for _ in range(2000):
        if not engine.has_work:
            break
        engine.step()
    tokens: list[list[int]] = [[] for _ in specs]
    async for item in stream:
        match item:
            case Token(index, token):
                tokens[index].append(token)
            case Ended():
                pass
    return tokens


def alone(architecture: str, spec: SequenceSpec) -> list[int]:
    return [int(t) for t, _ in generate_step(mx.array(spec.prompt), tiny(architecture), max_tokens=spec.max_tokens)]


def words(lot: random.Random, count: int) -> tuple[int, ...]:
    return tuple(lot.randrange(1, VOCABULARY) for _ in range(count))


@pytest.fixture(params=CONFIGS)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.requirement("BATCH-01", "9.1")
def test_each_gets_the_cache_that_suits_it(architecture: str) -> None:
    assert engine_of(architecture).cache_state.kind == CONFIGS[architecture][0]


@pytest.mark.requirement("BATCH-01", "9.1")
async def test_ragged_batches_in_chunks_then_shared_prefixes_equal_single_runs(architecture: str) -> None:
    lot = random.Random(architecture)
    engine = engine_of(architecture)
    prefix = words(lot, 70)
    specs = [SequenceSpec(words(lot, n), 10, GREEDY) for n in (1, 5, 37, 90)]
    specs += [SequenceSpec(prefix + words(lot, n), 10, GREEDY) for n in (3, 9, 9)]
    specs.append(specs[-1])
    expected = [alone(architecture, s) for s in specs]
    assert await run(engine, specs) == expected
    before = engine.counters.prefilled_tokens
    assert await run(engine, specs) == expected
    assert engine.counters.prefilled_tokens - before < before / 2


async def test_who_gives_way_says_the_same(architecture: str) -> None:
    lot = random.Random(architecture)
    block_bytes = engine_of(architecture).cache_state.block_bytes
    engine = engine_of(architecture, kv_bytes=2 * 9 * max(1, block_bytes), max_sequences=4)
    specs = [SequenceSpec(words(lot, lot.randrange(2, 50)), 60, GREEDY) for _ in range(4)]
    assert await run(engine, specs) == [alone(architecture, s) for s in specs]
    if engine.cache_state.kind != "single":
        assert engine.cache_state.num_preemptions > 0


def test_a_configuration_says_what_a_token_takes_in_the_cache(architecture: str) -> None:
    if architecture == "llama4":
        pytest.skip("mlx-lm's own caches take memory in larger pieces")
    engine = engine_of(architecture)
    assert kv_bytes_per_token(config_of(architecture) | {"torch_dtype": "float32"}) == engine.cache_state.block_bytes // BLOCK_TOKENS
