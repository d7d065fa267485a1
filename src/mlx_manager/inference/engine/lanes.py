"""Which way of keeping keys and values a model gets: the first that gives the same logits as mlx-lm's own caches."""
# pyright: basic

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_manager.inference.engine import head
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.paged_attention import PagedAttention
from mlx_manager.inference.engine.paged_cache import PagedCache
from mlx_manager.inference.engine.runner import KVCache
from mlx_manager.inference.engine.scheduler import Chunk
from mlx_manager.inference.engine.sequence import Sequence, SequenceSpec, TokenSampling
from mlx_manager.inference.engine.single_cache import SingleCache
from mlx_manager.inference.engine.slot_cache import GatheringCache, GroupedGatheringCache, SlotCache, SplitCache

log = logging.getLogger(__name__)

# The same sums in another order: what float32 and the 16-bit types may differ by, of the largest logit.
_TOLERANCE = {mx.float32: 2e-3, mx.float16: 3e-2, mx.bfloat16: 8e-2}
_PROMPTS = ((3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46), (2, 71, 82), (84, 59))
_TESTED_BLOCKS = 1 + len(_PROMPTS)  # the null block, and one for each
_FEWEST_BLOCKS = 2
_STATE_SHARE = 5
_MOST_BLOCKS = 1 << 18  # 8 million tokens; a model that keeps nothing but states has no other limit
_CONTINUATION = (18, 28, 45)


def choose_cache(model: Any, kv_bytes: int, kernels: PagedAttention | None, proven: str | None = None) -> KVCache:
    """The fastest cache that passes, for `num_blocks_within` these bytes. `kernels` are this device's, if it has any. Reasons why others
    do not pass are logged. `proven` is the one that passed before with the very same weights: it is taken without a test."""
    for name, make in _ways(model, kernels):
        if proven not in (None, name):
            continue
        try:
            tested = make(_TESTED_BLOCKS)
            problem = _problem(model, tested) if proven is None else None
        except Exception as error:  # noqa: BLE001 - whatever a model does with a cache that it does not know
            problem = f"{type(error).__name__}: {error}"
        else:
            if problem is None:
                return make(num_blocks_within(tested, kv_bytes))
        log.info("this model cannot use %s: %s", name, problem)
    return SingleCache(model)


def _problem(model: Any, cache: KVCache) -> str | None:
    problem = cache.self_test() if isinstance(cache, PagedCache) else None
    return problem or self_test(model, cache)


def num_blocks_within(cache: KVCache, kv_bytes: int) -> int:
    """How many blocks there may be, and the null block."""
    # Where rows are padded, one half is for the rows and the other for the blocks that are kept beside them.
    share = kv_bytes - state_bytes_within(cache, kv_bytes)
    share = share // 2 if cache.pads_rows else share
    return 1 + min(_MOST_BLOCKS, max(_FEWEST_BLOCKS, share // max(1, cache.token_bytes * BLOCK_TOKENS)))


def state_bytes_within(cache: KVCache, kv_bytes: int) -> int:
    """What the states may take of it that some blocks stand for."""
    return kv_bytes // _STATE_SHARE if cache.needs_states else 0


def _ways(model: Any, kernels: PagedAttention | None) -> Iterator[tuple[str, Callable[[int], KVCache]]]:
    """From the fastest on; what makes them takes the number of blocks."""
    if kernels is not None:
        yield PagedCache.name, partial(PagedCache, model, kernels)
    for handle in (SplitCache, GatheringCache, GroupedGatheringCache):
        yield handle.name, partial(_slots, model, handle)


def _slots(model: Any, handle: type[SplitCache | GatheringCache], num_blocks: int) -> SlotCache:
    return SlotCache(model, handle)


def self_test(model: Any, cache: KVCache) -> str | None:
    """What is wrong if sequences of different lengths, in chunks and side by side, do not get the logits that each gets alone."""
    expected = [_alone(model, prompt) for prompt in _PROMPTS]
    if not cache.needs_states and (problem := _problem_at_the_end(model, cache, [logits[0] for logits in expected])) is not None:
        return problem
    sequences = [Sequence(SequenceSpec(prompt, 10, TokenSampling(0)), i) for i, prompt in enumerate(_PROMPTS)]
    for s in sequences:
        s.table = [1 + s.index]
        cache.admit(s)
    for part in (2, 1):
        chunks = [Chunk(s, s.num_queued, s.prefill_end // part) for s in sequences if s.prefill_end // part > s.num_queued]
        for queued in cache.prefill(chunks):
            mx.eval(queued.arrays())
        for chunk in chunks:
            chunk.sequence.num_queued = chunk.sequence.num_computed = chunk.stop
    unread: list[Any] = []
    for n in range(len(_CONTINUATION) + 1):
        rows = cache.arrange(sequences, set(sequences) if unread else set())
        inputs = [s.tokens[-1] if n == 0 else _CONTINUATION[n - 1] for s in rows if s is not None]
        logits, step, _ = cache.forward(mx.array(inputs, dtype=mx.int32))
        mx.eval(logits, step.arrays())
        for s in sequences:
            s.num_queued += 1
        if unread:  # one step behind, as in the engine
            cache.settle(unread.pop())
            for s in sequences:
                s.num_computed += 1
        unread.append(step)
        for row, s in enumerate(rows):
            if s is None:
                continue
            difference, scale, tolerance = _compare(logits[row], expected[s.index][n])
            if not difference <= tolerance * scale:
                return f"logits differ by {difference:.3g} of {scale:.3g}"
    return None


def _problem_at_the_end(model: Any, cache: KVCache, expected: list[mx.array]) -> str | None:
    """The same for prompts whose last chunk samples: all of them at once, then the last one beside the others' rows."""
    if not head.install(model):
        return None  # there will be none
    sequences = [Sequence(SequenceSpec(prompt, 1, TokenSampling(0)), i) for i, prompt in enumerate(_PROMPTS)]
    *others, last = sequences
    for s in sequences:
        s.table = [1 + s.index]
        cache.admit(s)
    made = cache.prefill([Chunk(s, 0, len(s.tokens), samples=True) for s in sequences])
    seen = [(s, queued.logits) for s, queued in zip(sequences, made, strict=True)]
    mx.eval([queued.arrays() for queued in made])
    for s in sequences:
        cache.forget(s)
        cache.admit(s)
    for queued in cache.prefill([Chunk(s, 0, s.prefill_end) for s in others]):
        mx.eval(queued.arrays())
    for s in others:
        s.num_queued = s.num_computed = s.prefill_end
    rows = cache.arrange(others, set())
    inputs = mx.array([0 if s is None else s.last_token for s in rows], dtype=mx.int32)
    logits, step, made = cache.forward(inputs, [Chunk(last, 0, len(last.tokens), samples=True)])
    mx.eval(step.arrays(), [queued.arrays() for queued in made])
    seen += [(s, logits[row : row + 1]) for row, s in enumerate(rows) if s is not None]
    seen.append((last, made[0].logits))
    for s in sequences:
        cache.forget(s)
    for s, found in seen:
        assert found is not None
        difference, scale, tolerance = _compare(found[0], expected[s.index])
        if not difference <= tolerance * scale:
            return f"the logits of a prompt differ by {difference:.3g} of {scale:.3g}"
    return None


def _alone(model: Any, prompt: tuple[int, ...]) -> list[mx.array]:
    """The logits after the prompt and after each token of the continuation, as mlx-lm computes them."""
    cache = make_prompt_cache(model)
    inputs = [prompt, *((t,) for t in _CONTINUATION)]
    logits = [model(mx.array([i], dtype=mx.int32), cache=cache)[0, -1] for i in inputs]
    mx.eval(logits)
    return logits


def _compare(ours: mx.array, theirs: mx.array) -> tuple[float, float, float]:
    a, b = ours.astype(mx.float32), theirs.astype(mx.float32)
    return cast(float, mx.max(mx.abs(a - b)).item()), cast(float, mx.max(mx.abs(b)).item()), _TOLERANCE.get(theirs.dtype, 8e-2)
