"""Which cache a model gets: the first that can keep what its layers keep and gives the logits that mlx-lm's own caches give."""

import logging
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gemma2

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.lanes import choose_cache, num_blocks_within
from mlx_manager.inference.engine.paged_attention import Chunks, Pool, Reference
from tests.inference.fixture_models import weights

KV_BYTES = 8 << 20


def test_kernels_that_work_are_used_and_get_all_the_room() -> None:
    cache = choose_cache(weights("gemma3_text"), KV_BYTES, Reference())
    assert cache.name == "paged"
    block_bytes = cache.token_bytes * BLOCK_TOKENS
    assert num_blocks_within(cache, KV_BYTES) == 1 + KV_BYTES // block_bytes
    assert cache.allocated_bytes == KV_BYTES + block_bytes


def test_without_kernels_there_are_slots_and_half_of_the_room_is_for_rows() -> None:
    cache = choose_cache(weights("qwen3"), KV_BYTES, None)
    assert cache.name == "slots"
    assert num_blocks_within(cache, KV_BYTES) == 1 + KV_BYTES // 2 // (cache.token_bytes * BLOCK_TOKENS)
    assert num_blocks_within(cache, 1) == 3


class ForgetsTheWindow(Reference):
    def append_and_attend(self, *args: Any, **kwargs: Any) -> mx.array:
        return super().append_and_attend(*args, **{**kwargs, "window": 0})


def one_on(chunks: Chunks) -> Chunks:
    return replace(chunks, spans=tuple((first, start + 1, stop + 1) for first, start, stop in chunks.spans))


class WritesOneTooFar(Reference):
    def write(self, keys: mx.array, values: mx.array, pool: Pool, chunks: Chunks) -> None:
        super().write(keys, values, pool, one_on(chunks))


class Fails(Reference):
    def gather(self, pool: Pool, table: mx.array, length: int) -> tuple[mx.array, mx.array]:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("kernels", "why"),
    [(ForgetsTheWindow(), "differs from the reference"), (WritesOneTooFar(), "from the reference"), (Fails(), "no such kernel")],
)
def test_kernels_that_do_not_work_are_not_used_and_it_is_said_why(kernels: Reference, why: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_cache(weights("gemma3_text"), KV_BYTES, kernels).name == "slots"
    (message,) = caplog.messages
    assert message.startswith("this model cannot use paged: ")
    assert why in message


def test_what_was_proven_before_with_these_weights_is_not_tested_again() -> None:
    model = weights("gemma3_text")
    assert choose_cache(model, KV_BYTES, WritesOneTooFar(), proven="paged").name == "paged"
    assert choose_cache(model, KV_BYTES, Reference(), proven="slots").name == "slots"
    assert choose_cache(model, KV_BYTES, Reference(), proven="single").name == "single"


def test_a_model_that_attends_by_itself_is_left_to_do_so(caplog: pytest.LogCaptureFixture) -> None:
    mx.random.seed(0)
    model = gemma2.Model(gemma2.ModelArgs("gemma2", 64, 2, 64, 2, 32, 1e-6, 100, 2))
    with caplog.at_level(logging.INFO):
        assert choose_cache(model, KV_BYTES, Reference()).name == "slots, gathered"
    assert [message.split(":")[0] for message in caplog.messages] == ["this model cannot use paged", "this model cannot use slots"]
