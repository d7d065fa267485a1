"""Attention over keys and values that live in the blocks of a pool, found through block tables.

A pool's arrays are never rebound: the kernels write into them in place, through pointers that MLX takes for read-only. Rebinding
(`pool[index] = x`) would copy the layer's whole pool whenever an earlier step still holds it, which with a step queued ahead is
always. MLX cannot see such writes, so their order is carried by the pool's epoch: every kernel takes the epoch that the one
before it made, and makes the next.

Inside `mx.compile` the epochs are inputs and outputs of the compiled function: set `pool.epoch` first, return it last.
"""
# pyright: basic

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.cache_layout import both_ways_mask, first_in_sight, prefill_mask
from mlx_manager.inference.engine.paged_kernels import (
    APPEND_AND_ATTEND,
    ATTEND_CHUNKS,
    COPY_BLOCK,
    GATHER,
    REDUCE,
    WRITE,
    Backend,
    KernelText,
)

_HEAD_DIMS = (32, 64, 128, 256)
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# Four warps take up to four query heads of one key/value head through its pages. Below two such groups a multiprocessor (132 of them)
# the pages of a row are split; fewer pages than this in a split cost more to merge than they save. Measured on an H100, and only there.
_WARPS = 4
_RUNS = 2
_GROUP = 4
_WANTED_GROUPS = 256
_MIN_SPLIT_PAGES = 4
_MIN_CHUNK_SPLIT_PAGES = 2  # a group's four warps go through them together
_COPY_THREADS = 256
_CHUNK_HEAD_DIMS = (64, 128)
_CHUNK_ROWS = 64
_CHUNK_THREADS = 128


@dataclass(slots=True)
class Pool:
    """One layer's blocks. `keys` and `values` [blocks, kv heads, BLOCK_TOKENS, head dim], evaluated and row-contiguous: a kernel
    that is given a copy writes into the copy. `epoch` int32 [1] changes with every use; whoever waits for it has waited for all
    reads and writes queued so far."""

    keys: mx.array
    values: mx.array
    epoch: mx.array = field(default_factory=lambda: mx.array([0], mx.int32))


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where chunks of prompts come from and go to. Of the tokens of a pass, those from `first` on are tokens `start` … `stop` of a
    sequence: `spans` are these three for each chunk, `on_device` int32 [C, 3]. Row c of `table` int32 [C, W] are the blocks of that
    sequence in the order of their tokens. C may be more than there are: what follows is empty. Kernels go by what is on the device
    alone."""

    spans: tuple[tuple[int, int, int], ...]
    on_device: mx.array
    table: mx.array

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int, int]], blocks: Sequence[Sequence[int]], *, room: int = 0, width: int = 0) -> "Chunks":
        """With `room` for so many chunks, of so many blocks (`width`)."""
        table = np.zeros((max(room, len(spans)), max([width, *(len(row) for row in blocks)])), np.int32)
        for row, own in zip(table, blocks, strict=False):
            row[: len(own)] = own
        on_device = np.zeros((len(table), 3), np.int32)
        on_device[: len(spans)] = spans
        return cls(tuple(spans), mx.array(on_device), mx.array(table))


class PagedAttention(Protocol):
    """All methods queue work and return at once. Whatever is queued on one pool happens in the order of the calls.

    B rows, T tokens of a pass, Hq query heads, H key/value heads, D their size, W blocks in a table. `table` int32 [B, W] are the rows'
    blocks in the order of their tokens; `lengths` int32 [B] how many tokens are in the pool. Keys, values and queries share the
    pool's dtype.
    """

    can_be_compiled: bool
    """Whether it may be called inside `mx.compile`."""
    plans_lengths: bool
    """Whether the device plans products anew for each number of tokens, so that passes are better of a few lengths."""

    def can_compile_chunks(self, pool: Pool) -> bool:
        """Whether the same is true of `attend_chunks`, wherever the chunks are."""
        ...

    def append_and_attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        pool: Pool,
        table: mx.array,
        lengths: mx.array,
        *,
        scale: float,
        window: int = 0,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """One new token a row: puts `keys` and `values` [B, H, 1, D] at position `lengths[b]`, and gives what `queries`
        [B, Hq, 1, D] attend to, [B, Hq, 1, D]: the new token and those before it, with a `window` the last `window` of these.
        `sinks` [Hq] are scores of tokens without a value.

        A row that only fills up a batch has a table of null blocks and length 0; its result means nothing.
        """
        ...

    def write(self, keys: mx.array, values: mx.array, pool: Pool, chunks: Chunks) -> None:
        """Puts what is of `chunks` in `keys` and `values` [T, H, 1, D] where it belongs."""
        ...

    def attend_chunks(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        pool: Pool,
        chunks: Chunks,
        *,
        scale: float,
        window: int = 0,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """The same, and gives what the `queries` [T, Hq, 1, D] attend to, [T, Hq, 1, D]: each token of a chunk itself and those before it
        in its sequence, with a `window` the last `window` of these. What comes of tokens of no chunk means nothing."""
        ...

    def gather(self, pool: Pool, table: mx.array, length: int) -> tuple[mx.array, mx.array]:
        """The first `length` keys and values of the one row of `table` [1, W], each [1, H, length, D]: a copy, which stays as it
        is when the blocks change."""
        ...

    def copy_block(self, pool: Pool, source: int, target: int) -> None:
        """Gives block `target` the content of block `source`."""
        ...


def backend() -> Backend | None:
    """What the kernels would run on, in this process."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def is_supported(dtype: mx.Dtype, head_dim: int, query_heads: int, kv_heads: int) -> bool:
    """Whether there is a kernel for layers of this shape. Whether it works here is what `self_test` says."""
    return dtype in _DTYPES and head_dim in _HEAD_DIMS and kv_heads > 0 and query_heads % kv_heads == 0


def num_splits(num_groups: int, num_pages: int, min_pages: int = _MIN_SPLIT_PAGES) -> int:
    """Into how many parts the pages of a sequence are divided, each for a group of its own, if there are `num_groups` without that."""
    splits = 1
    while splits * num_groups < _WANTED_GROUPS and splits * 2 * min_pages <= num_pages:
        splits *= 2
    return splits


class Kernels:
    """`PagedAttention` in place, on the GPU. Tests hand in what stands for `mx.fast.metal_kernel` or `mx.fast.cuda_kernel`."""

    can_be_compiled = True
    plans_lengths: bool

    def __init__(self, backend: Backend, make_kernel: Callable[..., Any] | None = None) -> None:
        if make_kernel is None:
            make_kernel = mx.fast.cuda_kernel if backend == "cuda" else mx.fast.metal_kernel

        def made(text: KernelText) -> Callable[..., Any]:
            return make_kernel(**text.definition(backend))

        self._append_and_attend = made(APPEND_AND_ATTEND)
        self._reduce = made(REDUCE)
        self._write = made(WRITE)
        self._attend_chunks = made(ATTEND_CHUNKS) if backend == "cuda" else None
        self._gather = made(GATHER)
        self._copy_block = made(COPY_BLOCK)
        self._scales: dict[float, mx.array] = {}
        self.plans_lengths = backend == "cuda"

    def append_and_attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        pool: Pool,
        table: mx.array,
        lengths: mx.array,
        *,
        scale: float,
        window: int = 0,
        sinks: mx.array | None = None,
    ) -> mx.array:
        rows, query_heads, _, head_dim = queries.shape
        kv_heads = pool.keys.shape[1]
        shared_by = query_heads // kv_heads
        group = next(g for g in range(_GROUP, 0, -1) if shared_by % g == 0)
        num_pages = table.shape[1] if window == 0 else min(table.shape[1], window // BLOCK_TOKENS + 2)
        splits = num_splits(rows * query_heads // group, num_pages)
        is_direct = splits == 1
        scales = self._scale(scale)
        sink_dtype = mx.float32 if sinks is None else sinks.dtype
        out_dtype = queries.dtype if is_direct else mx.float32
        out, statistics, pool.epoch = self._append_and_attend(
            inputs=[
                queries,
                keys,
                values,
                pool.keys,
                pool.values,
                table,
                lengths,
                scales,
                scales if sinks is None else sinks,
                pool.epoch,
            ],
            # CUDA keeps compiled kernels by these alone, so they have to tell apart whatever changes the signature.
            template=[
                ("T", queries.dtype),
                ("OUT", out_dtype),
                ("SINK", sink_dtype),
                ("D", head_dim),
                ("HEADS", kv_heads),
                ("GQA", shared_by),
                ("GROUP", group),
                ("RUNS", _RUNS),
                ("WARPS", _WARPS),
                ("PAGE", BLOCK_TOKENS),
                ("WINDOW", window),
                ("SINKS", sinks is not None),
                ("DIRECT", is_direct),
            ],
            grid=(32 * _WARPS, query_heads // group, rows * splits),
            threadgroup=(32 * _WARPS, 1, 1),
            output_shapes=[
                (rows, query_heads, splits, head_dim),
                (1,) if is_direct else (rows, query_heads, splits, 2),
                (1,),
            ],
            output_dtypes=[out_dtype, mx.float32, mx.int32],
        )
        return out if is_direct else self._merged(out, statistics, queries)

    def _merged(self, parts: mx.array, statistics: mx.array, queries: mx.array) -> mx.array:
        """What the splits made for `queries` [B, Hq, 1, D]: `parts` [B, Hq, S, D] and `statistics` [B, Hq, S, 2]."""
        head_dim = queries.shape[3]
        return self._reduce(
            inputs=[parts, statistics],
            template=[("T", queries.dtype), ("D", head_dim)],
            grid=(queries.size, 1, 1),
            threadgroup=(head_dim, 1, 1),
            output_shapes=[queries.shape],
            output_dtypes=[queries.dtype],
        )[0]

    def can_compile_chunks(self, pool: Pool) -> bool:
        return self._attend_chunks is not None and pool.keys.dtype.size == 2 and pool.keys.shape[3] in _CHUNK_HEAD_DIMS

    def write(self, keys: mx.array, values: mx.array, pool: Pool, chunks: Chunks) -> None:
        head_dim = pool.keys.shape[3]
        (pool.epoch,) = self._write(
            inputs=[keys, values, pool.keys, pool.values, chunks.table, chunks.on_device, pool.epoch],
            template=_template(pool),
            grid=(_whole_groups(keys.shape[0] * head_dim // 8), keys.shape[1], chunks.table.shape[0]),
            threadgroup=(_COPY_THREADS, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
        )

    def attend_chunks(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        pool: Pool,
        chunks: Chunks,
        *,
        scale: float,
        window: int = 0,
        sinks: mx.array | None = None,
    ) -> mx.array:
        head_dim = pool.keys.shape[3]
        if self._attend_chunks is None or not self.can_compile_chunks(pool):
            return _attend_one_by_one(self, queries, keys, values, pool, chunks, scale, window, sinks)
        self.write(keys, values, pool, chunks)
        query_heads, kv_heads = queries.shape[1], pool.keys.shape[1]
        scales = self._scale(scale)
        shared_by, (room, num_pages) = query_heads // kv_heads, chunks.table.shape
        num_tiles = -(-queries.shape[0] * shared_by // _CHUNK_ROWS)  # as if all were of one chunk
        if window > 0:
            num_pages = min(num_pages, (window + _CHUNK_ROWS // shared_by) // BLOCK_TOKENS + 2)
        most_tiles = num_tiles + room - 1  # of all chunks together; the other groups have nothing to do
        splits = num_splits(most_tiles * kv_heads, num_pages, _MIN_CHUNK_SPLIT_PAGES)
        is_direct = splits == 1
        out_dtype = queries.dtype if is_direct else mx.float32
        out, statistics, pool.epoch = self._attend_chunks(
            inputs=[
                queries,
                pool.keys,
                pool.values,
                chunks.table,
                chunks.on_device,
                scales,
                scales if sinks is None else sinks,
                pool.epoch,
            ],
            template=[
                ("T", queries.dtype),
                ("OUT", out_dtype),
                ("SINK", mx.float32 if sinks is None else sinks.dtype),
                ("D", head_dim),
                ("HEADS", kv_heads),
                ("GQA", shared_by),
                ("PAGE", BLOCK_TOKENS),
                ("WINDOW", window),
                ("SINKS", sinks is not None),
                ("IS_HALF", queries.dtype == mx.float16),
                ("DIRECT", is_direct),
            ],
            grid=(_CHUNK_THREADS, num_tiles, kv_heads * room * splits),
            threadgroup=(_CHUNK_THREADS, 1, 1),
            output_shapes=[
                queries.shape if is_direct else (*queries.shape[:2], splits, head_dim),
                (1,) if is_direct else (*queries.shape[:2], splits, 2),
                (1,),
            ],
            output_dtypes=[out_dtype, mx.float32, mx.int32],
        )
        return out if is_direct else self._merged(out, statistics, queries)

    def _scale(self, scale: float) -> mx.array:
        if scale not in self._scales:
            self._scales[scale] = mx.array([scale], mx.float32)
        return self._scales[scale]

    def gather(self, pool: Pool, table: mx.array, length: int) -> tuple[mx.array, mx.array]:
        _, kv_heads, _, head_dim = pool.keys.shape
        shape, dtype = (1, kv_heads, length, head_dim), pool.keys.dtype
        keys, values, pool.epoch = self._gather(
            inputs=[pool.keys, pool.values, table, mx.array([length], mx.int32), pool.epoch],
            template=_template(pool),
            grid=(_whole_groups(length * head_dim // 8), kv_heads, 1),
            threadgroup=(_COPY_THREADS, 1, 1),
            output_shapes=[shape, shape, (1,)],
            output_dtypes=[dtype, dtype, mx.int32],
        )
        return keys, values

    def copy_block(self, pool: Pool, source: int, target: int) -> None:
        _, kv_heads, _, head_dim = pool.keys.shape
        (pool.epoch,) = self._copy_block(
            inputs=[pool.keys, pool.values, mx.array([source, target], mx.int32), pool.epoch],
            template=_template(pool),
            grid=(_whole_groups(kv_heads * BLOCK_TOKENS * head_dim // 8), 1, 1),
            threadgroup=(_COPY_THREADS, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
        )


def _template(pool: Pool) -> list[tuple[str, Any]]:
    _, kv_heads, page, head_dim = pool.keys.shape
    return [("T", pool.keys.dtype), ("D", head_dim), ("HEADS", kv_heads), ("PAGE", page)]


def _whole_groups(num_threads: int) -> int:
    return -(-num_threads // _COPY_THREADS) * _COPY_THREADS


class Reference:
    """`PagedAttention` in plain MLX, on any device: slow, and what the kernels are measured by. Computes in float32.

    Writes change the pool's array objects as `array[index] = x` does.
    """

    can_be_compiled = False
    plans_lengths = True

    def can_compile_chunks(self, pool: Pool) -> bool:
        return False

    def append_and_attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        pool: Pool,
        table: mx.array,
        lengths: mx.array,
        *,
        scale: float,
        window: int = 0,
        sinks: mx.array | None = None,
    ) -> mx.array:
        blocks = mx.take_along_axis(table, (lengths // BLOCK_TOKENS)[:, None], axis=1)[:, 0]
        _put(pool, blocks, lengths % BLOCK_TOKENS, keys[:, :, 0], values[:, :, 0])
        positions = mx.arange(table.shape[1] * BLOCK_TOKENS)
        is_seen = positions <= lengths[:, None]
        if window > 0:
            is_seen &= positions > lengths[:, None] - window
        # What is left in other slots may be NaN, which no mask takes back.
        known_keys, known_values = (
            mx.where(is_seen[:, None, :, None], _pages(array, table).astype(mx.float32), 0.0) for array in (pool.keys, pool.values)
        )
        return mx.fast.scaled_dot_product_attention(
            queries.astype(mx.float32),
            known_keys,
            known_values,
            scale=scale,
            mask=is_seen[:, None, None, :],
            sinks=None if sinks is None else sinks.astype(mx.float32),
        ).astype(queries.dtype)

    def write(self, keys: mx.array, values: mx.array, pool: Pool, chunks: Chunks) -> None:
        for c, (first, start, stop) in enumerate(chunks.spans):
            positions = mx.arange(start, stop)
            own = slice(first, first + stop - start)
            _put(pool, chunks.table[c][positions // BLOCK_TOKENS], positions % BLOCK_TOKENS, keys[own, :, 0], values[own, :, 0])

    def attend_chunks(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        pool: Pool,
        chunks: Chunks,
        *,
        scale: float,
        window: int = 0,
        sinks: mx.array | None = None,
    ) -> mx.array:
        return _attend_one_by_one(self, queries, keys, values, pool, chunks, scale, window, sinks)

    def gather(self, pool: Pool, table: mx.array, length: int) -> tuple[mx.array, mx.array]:
        return _pages(pool.keys, table)[:, :, :length], _pages(pool.values, table)[:, :, :length]

    def copy_block(self, pool: Pool, source: int, target: int) -> None:
        pool.keys[target] = pool.keys[source]
        pool.values[target] = pool.values[source]
        _after_write(pool)


def _attend_one_by_one(
    attention: PagedAttention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    pool: Pool,
    chunks: Chunks,
    scale: float,
    window: int,
    sinks: mx.array | None,
) -> mx.array:
    """`attend_chunks` by MLX's own attention, on a copy of what comes before each."""
    attention.write(keys, values, pool, chunks)
    results = mx.zeros_like(queries)
    for c, (first, start, stop) in enumerate(chunks.spans):
        own = slice(first, first + stop - start)
        chunk = as_chunk(queries[own]), as_chunk(keys[own]), as_chunk(values[own])
        before = first_in_sight(start, window or None)
        mask = prefill_mask(stop - start, start - before, window or None, return_array=False)
        results[own] = as_tokens(_attend_masked(attention, *chunk, pool, chunks.table[c : c + 1], start, stop, before, scale, mask, sinks))
    return results


def attend_both_ways(
    attention: PagedAttention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    pool: Pool,
    chunks: Chunks,
    *,
    scale: float,
    window: int = 0,
    both_ways: mx.array,
    sinks: mx.array | None = None,
) -> mx.array:
    """`attend_chunks` for a single one, of which some tokens see each other `both_ways` [L, L]: no kernel does that."""
    ((_, start, stop),) = chunks.spans
    attention.write(keys, values, pool, chunks)
    before = first_in_sight(start, window or None)
    mask = both_ways_mask(start - before, window or None, both_ways)
    chunk = as_chunk(queries), as_chunk(keys), as_chunk(values)
    return as_tokens(_attend_masked(attention, *chunk, pool, chunks.table, start, stop, before, scale, mask, sinks))


def _attend_masked(
    attention: PagedAttention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    pool: Pool,
    table: mx.array,
    start: int,
    stop: int,
    before: int,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """[1, Hq, L, D] of a chunk that has been written. `mask` is for its tokens on those from `before` on."""
    if start > 0:
        page = before // BLOCK_TOKENS
        gone = page * BLOCK_TOKENS
        keys, values = (array[:, :, before - gone :] for array in attention.gather(pool, table[:, page:], stop - gone))
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def as_chunk(array: mx.array) -> mx.array:
    """The tokens [L, H, 1, D] of a pass as those of one sequence: [1, H, L, D]."""
    return array.transpose(2, 1, 0, 3)


as_tokens = as_chunk  # and back


def _put(pool: Pool, blocks: mx.array, slots: mx.array, keys: mx.array, values: mx.array) -> None:
    """Tokens [n, H, D] into `slots` [n] of `blocks` [n]."""
    pool.keys[blocks, :, slots] = keys
    pool.values[blocks, :, slots] = values
    _after_write(pool)


def _after_write(pool: Pool) -> None:
    pool.epoch = mx.depends(pool.epoch + 1, [pool.keys, pool.values])


def _pages(array: mx.array, table: mx.array) -> mx.array:
    """[blocks, H, BLOCK_TOKENS, D] as the rows of `table` [B, W] see it: [B, H, W * BLOCK_TOKENS, D]."""
    rows, width = table.shape
    _, kv_heads, page, head_dim = array.shape
    return array[table].swapaxes(1, 2).reshape(rows, kv_heads, width * page, head_dim)


# A wider window is tested as one of this size: it is one number in one comparison, and room for it would cost memory.
_WIDEST_TESTED_WINDOW = 512
# How far a head's result may be from the reference's, relative to its length. Measured on an H200: 5e-8 in float32, 8e-5 in
# float16, 7e-4 in bfloat16; the reference itself may multiply in TF32 (5e-4). Attending to one token too many or too few of 300
# changes a head's result by some 3e-2.
_TOLERANCE = {mx.float32: 3e-3, mx.float16: 3e-3, mx.bfloat16: 1e-2}


def self_test(
    attention: PagedAttention,
    *,
    dtype: mx.Dtype,
    head_dim: int,
    query_heads: int,
    kv_heads: int,
    window: int = 0,
    has_sinks: bool = False,
) -> str | None:
    """Runs `attention` and `Reference` through the same reads and writes, for layers of this shape, and compares everything they
    give and leave behind. None if they agree, else a sentence saying what differed. A model with several kinds of layers needs a
    run for each: a narrow window, for one, is never split."""
    tested_window = min(window, _WIDEST_TESTED_WINDOW)

    def results_of(tested: PagedAttention) -> Iterator[tuple[str, mx.array]]:
        return _exercise(tested, dtype, head_dim, query_heads, kv_heads, tested_window, has_sinks)

    try:
        found, expected = list(results_of(attention)), list(results_of(Reference()))
        mx.eval(found, expected)
        for (what, mine), (_, reference) in zip(found, expected, strict=True):
            if what.startswith("attention"):
                errors = _relative_errors(mine, reference)
                if not mx.all(errors <= _TOLERANCE[dtype]).item():
                    worst = mx.max(mx.where(mx.isnan(errors), mx.inf, errors)).item()
                    return f"The {what} differs from the reference by {worst:.1e}, more than {_TOLERANCE[dtype]:.0e}."
            elif not mx.array_equal(mine, reference, equal_nan=True).item():
                return f"The {what} differ from the reference."
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in here would go wrong in service
        return f"The kernels failed: {type(error).__name__}: {error}"
    return None


def _relative_errors(found: mx.array, expected: mx.array) -> mx.array:
    """How far each head's result is from the expected one, relative to its length: [..., D] gives [...]."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return mx.linalg.norm(found - expected, axis=-1) / mx.linalg.norm(expected, axis=-1)


def _exercise(
    attention: PagedAttention, dtype: mx.Dtype, head_dim: int, query_heads: int, kv_heads: int, window: int, has_sinks: bool
) -> Iterator[tuple[str, mx.array]]:
    """Named results, queued without waiting in between, so that only the epoch keeps them in order. Every number is the same at
    every call."""
    seeds = iter(range(1_000_000))

    def some(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.key(next(seeds))).astype(dtype)

    # On both sides of a block's edge, in the middle of one, past the window, and long enough to be split.
    lengths = [0, 31, 32, 75, window + 45, 300]
    wanted = [length // BLOCK_TOKENS + 2 for length in lengths]
    blocks = random.Random(0).sample(range(1, sum(wanted) + 4), sum(wanted) + 3)
    spare, taken = blocks[:3], iter(blocks[3:])
    width = max(wanted)
    tables = [[next(taken) for _ in range(number)] + [0] * (width - number) for number in wanted]
    shape = (len(blocks) + 1, kv_heads, BLOCK_TOKENS, head_dim)
    # Whatever is read outside the sequences shows.
    pool = Pool(mx.full(shape, float("nan"), dtype), mx.full(shape, float("nan"), dtype))
    mx.eval(pool.keys, pool.values)
    sinks = some(query_heads) if has_sinks else None

    def write(table: list[int], start: int, stop: int) -> None:
        keys, values = some(stop - start, kv_heads, 1, head_dim), some(stop - start, kv_heads, 1, head_dim)
        attention.write(keys, values, pool, Chunks.of([(0, start, stop)], [table]))

    def decode(rows: list[tuple[list[int], int]]) -> mx.array:
        return attention.append_and_attend(
            some(len(rows), query_heads, 1, head_dim),
            some(len(rows), kv_heads, 1, head_dim),
            some(len(rows), kv_heads, 1, head_dim),
            pool,
            mx.array([table for table, _ in rows], mx.int32),
            mx.array([length for _, length in rows], mx.int32),
            scale=head_dim**-0.5,
            window=window,
            sinks=sinks,
        )

    def read(num_tokens: int, chunks: Chunks) -> mx.array:
        queries, keys, values = (some(num_tokens, heads, 1, head_dim) for heads in (query_heads, kv_heads, kv_heads))
        return attention.attend_chunks(queries, keys, values, pool, chunks, scale=head_dim**-0.5, window=window, sinks=sinks)

    rows = list(zip(tables, lengths, strict=True))
    longest = tables[-1]
    for table, length in rows:
        middle = length * 2 // 5
        for start, stop in ((0, middle), (middle, length)):
            if start < stop:
                write(table, start, stop)
    padding = ([0] * width, 0)
    yield "attention of a batch", decode([*rows, padding])
    yield "attention of a batch with narrow tables", decode([(table[:4], length + 1) for table, length in rows[:4]])
    yield "attention of one long row", decode([(longest, 301)])
    keys, values = attention.gather(pool, mx.array([longest], mx.int32), 302)
    yield "gathered keys", keys
    yield "gathered values", values
    # What the reads above saw is overwritten at once; then the new content is read.
    write(longest, 260, 310)
    yield "attention after a chunk", decode([(longest, 310)])
    source, copy = longest[310 // BLOCK_TOKENS], spare[0]
    attention.copy_block(pool, source, copy)
    write(longest, 311, 312)
    fork = [copy if block == source else block for block in longest]
    yield "attention of a fork", decode([(longest, 312), (fork, 311)])
    together = Chunks.of([(3, 0, 70), (80, 313, 348), (150, 0, 1)], [tables[3], longest, tables[0]], room=4)
    seen = read(160, together)
    for first, start, stop in together.spans:
        yield f"attention of a chunk from {start} to {stop}", seen[first : first + stop - start]
    yield "attention of a beginning", read(40, Chunks.of([(0, 0, 40)], [tables[3][:2]]))  # too few pages to be shared out
    yield "attention of a short chunk", read(6, Chunks.of([(0, 344, 350)], [longest]))
    mx.eval(pool.epoch)  # MLX would not wait for the writes: it takes the arrays for unchanged
    yield "keys left in the pool", pool.keys[1:]
    yield "values left in the pool", pool.values[1:]
