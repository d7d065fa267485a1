"""What only a GPU can show: 16-bit models on the kernels, up to ties, and memory. Skipped where there is none.

The tie rule: sums in another order change a 16-bit logit by a few units in its last place, so two tokens whose logits are that close
may change places. Up to there all tokens are the same; from there on each goes its own way.
"""

import random
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.lanes import self_test
from mlx_manager.inference.engine.paged_attention import Kernels, backend
from mlx_manager.inference.engine.paged_cache import PagedCache
from mlx_manager.inference.engine.sequence import SequenceSpec
from mlx_manager.inference.engine.slot_cache import SlotCache, SplitCache
from mlx_manager.inference.loader import EngineLimits
from mlx_manager.inference.loader import make_engine as build_engine
from tests.inference.fixture_models import FAMILIES, GREEDY, attached, dialect, folder, receive, within

pytestmark = pytest.mark.skipif(backend() is None, reason="there is no GPU")

# Of a logit of size 16 to 32 bfloat16 tells apart steps of 0.125.
TIE = 0.25


@cache
def model(family: str, dtype: mx.Dtype) -> Any:
    model, _ = load_model(folder(family))
    model.update(tree_map(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()))
    mx.eval(model.parameters())
    return model


def engine_of(device: Device, family: str, dtype: mx.Dtype, kv_bytes: int = 64 << 20, **limits: Any) -> Engine:
    asked = EngineLimits(**{"check_every": 1, "step_s": 10.0, "kv_bytes": kv_bytes} | limits)
    return build_engine(model(family, dtype), device, asked, vocab_size=dialect(family).vocab_size, model_key=family)


def ragged(family: str, count: int) -> list[SequenceSpec]:
    lot = random.Random(f"{family} {count}")
    return [SequenceSpec(tuple(lot.randrange(300, 1000) for _ in range(lot.randint(2, 300))), 24, GREEDY) for _ in range(count)]


def first_real_difference(family: str, dtype: mx.Dtype, spec: SequenceSpec, tokens: list[int]) -> str | None:
    """Where a reply leaves what mlx-lm's own loop says, other than at a tie."""
    for i, (token, logprobs) in enumerate(generate_step(mx.array(spec.prompt), model(family, dtype), max_tokens=spec.max_tokens)):
        if token != tokens[i]:
            gap = (logprobs[token] - logprobs[tokens[i]]).item()
            return None if gap <= TIE else f"token {i}: {tokens[i]}, which is {gap:.2f} less likely than {token}"
    return None


@pytest.mark.requirement("BATCH-01", "BATCH-02")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
async def test_a_16_bit_batch_equals_single_runs_up_to_ties(device: Device, family: str, dtype: mx.Dtype) -> None:
    specs = ragged(family, 16)
    engine = engine_of(device, family, dtype, prefill_budget=100)
    assert engine.cache_state.kind == "paged"
    async with attached(device, engine):
        first = await within(receive(engine, specs), 60)
        again = await within(receive(engine, specs), 60)  # from what is cached
    for received in (first, again):
        differences = [
            await device.run(lambda s=s, r=r: first_real_difference(family, dtype, s, r.tokens))
            for s, r in zip(specs, received, strict=True)
        ]
        assert [d for d in differences if d is not None] == []


@pytest.mark.parametrize("family", FAMILIES)
async def test_blocks_and_rows_give_the_logits_of_the_model_itself(device: Device, family: str) -> None:
    def compare() -> list[str | None]:
        own = model(family, mx.bfloat16)
        kind = backend()
        assert kind is not None
        return [self_test(own, PagedCache(own, Kernels(kind), 8)), self_test(own, SlotCache(own, SplitCache))]

    assert await device.run(compare) == [None, None]


@pytest.mark.requirement("BATCH-02")
async def test_a_busy_engine_takes_hardly_more_than_its_blocks(device: Device) -> None:
    """A pool that is copied behind our back would show here."""
    kv_bytes = 1 << 30
    engine = engine_of(device, "qwen3", mx.bfloat16, kv_bytes, check_every=0)
    specs = ragged("qwen3", 32)
    async with attached(device, engine):
        await within(receive(engine, specs[:4]), 60)  # whatever is compiled or allocated once
        await device.run(mx.clear_cache)
        before = await device.run(mx.get_active_memory)
        await device.run(mx.reset_peak_memory)
        await within(receive(engine, specs), 60)
        peak = await device.run(mx.get_peak_memory)
    assert engine.cache_state.allocated_bytes == pytest.approx(kv_bytes, rel=0.03)
    assert peak - before <= 0.05 * kv_bytes
