"""Keys and values in the blocks of the pool: what a sequence's table says is where they are, in every layer. True paging.

Nothing is copied when a sequence comes, goes or moves to another row, and no row is padded to the length of another. A step writes
one token of each row where its table says and attends to what is there already, in one kernel. Chunks of prompts are in the same pass,
one token beside the other, so that weights are read once for all of them: only attention tells them apart.

The arrays of the pools are made once and written in place. What is queued on a pool happens in the order in which it was queued (see
`paged_attention`), so a block can be given to somebody else while a step that still uses it is under way.
"""
# pyright: basic

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakMethod

import mlx.core as mx
import numpy as np

from mlx_manager.inference.engine import head
from mlx_manager.inference.engine.attention import AttendingCache, Sight
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.cache_layout import (
    Group,
    KeysValues,
    Layer,
    State,
    UnsupportedCache,
    device_array,
    host_view,
    layout,
    prompt_inputs,
    shifted,
    state_arrays,
)
from mlx_manager.inference.engine.paged_attention import (
    Chunks,
    PagedAttention,
    Pool,
    as_chunk,
    as_tokens,
    attend_both_ways,
    is_supported,
    self_test,
)
from mlx_manager.inference.engine.scheduler import Chunk
from mlx_manager.inference.engine.sequence import Sequence

log = logging.getLogger(__name__)

_NARROWEST_TABLE = 8  # blocks
# Of prompts in a step: describing more costs less than computing them. Paces are of 128 tokens and less, to which those come that sample.
_COMMON_TOKENS = (32, 144, 288)
_COMMON_CHUNKS = 8
_SEEN_OFTEN = 3
_MOST_DESCRIBED = 64


class PagedLayer(AttendingCache):
    """One layer in one pass."""

    def __init__(self, pool: Pool, window: int | None) -> None:
        self._pool = pool
        self._window = window
        self._own: KeysValues | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        self._own = keys, values
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Any:
        if return_array:
            raise UnsupportedCache("it computes on masks")
        return Sight(window_size or self._window)

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        if mask is None:
            mask = Sight(self._window)
        if not isinstance(mask, Sight):
            raise UnsupportedCache("it makes masks of its own")
        assert self._own is not None
        return self._attend(queries, *self._own, scale, mask, sinks)

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sight: Sight, sinks: mx.array | None) -> mx.array:
        raise NotImplementedError


class RowLayer(PagedLayer):
    """One layer's rows in one decode step."""

    def __init__(self, step: "RowPass", pool: Pool, window: int | None) -> None:
        super().__init__(pool, window)
        self._step = step

    @property
    def offset(self) -> mx.array:
        return self._step.offsets

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sight: Sight, sinks: mx.array | None) -> mx.array:
        return self._step.attend(queries, keys, values, self._pool, scale, sight, sinks)


@dataclass(frozen=True, slots=True)
class RowPass:
    """What the layers of one decode step share. `lengths` are counted in tokens, `offsets` as the model does."""

    attention: PagedAttention
    table: mx.array
    lengths: mx.array
    offsets: mx.array

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, pool: Pool, scale: float, sight: Sight, sinks: mx.array | None
    ) -> mx.array:
        window = sight.window or 0
        return self.attention.append_and_attend(
            queries, keys, values, pool, self.table, self.lengths, scale=scale, window=window, sinks=sinks
        )


@dataclass(frozen=True, slots=True)
class ChunkPass:
    """What the layers share in a pass for one chunk, all of whose tokens are in one row."""

    attention: PagedAttention
    chunk: Chunks

    @property
    def start(self) -> int:
        ((_, start, _),) = self.chunk.spans
        return start


class ChunkLayer(PagedLayer):
    """One layer of one chunk of a prompt."""

    def __init__(self, chunk: ChunkPass, pool: Pool, window: int | None) -> None:
        super().__init__(pool, window)
        self._pass = chunk
        self.offset = chunk.start

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        self.offset += keys.shape[2]
        return super().update_and_fetch(keys, values)

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sight: Sight, sinks: mx.array | None) -> mx.array:
        attention, chunk = self._pass.attention, self._pass.chunk
        given = as_tokens(queries), as_tokens(keys), as_tokens(values)
        window = sight.window or 0
        if sight.both_ways is None:
            result = attention.attend_chunks(*given, self._pool, chunk, scale=scale, window=window, sinks=sinks)
        else:
            both = sight.both_ways
            result = attend_both_ways(attention, *given, self._pool, chunk, scale=scale, window=window, both_ways=both, sinks=sinks)
        return as_chunk(result)


@dataclass(frozen=True, slots=True)
class MixedPass:
    """What the layers share in a pass for one token of each of some `rows`, and then chunks of prompts, every token of which is a row for
    the model as well, at its offset."""

    attention: PagedAttention
    rows: RowPass | None
    chunks: Chunks
    offsets: mx.array


class MixedLayer(PagedLayer):
    """One layer of rows and chunks in one pass."""

    def __init__(self, mixed: MixedPass, pool: Pool, window: int | None) -> None:
        super().__init__(pool, window)
        self._pass = mixed

    @property
    def offset(self) -> mx.array:
        return self._pass.offsets

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sight: Sight, sinks: mx.array | None) -> mx.array:
        mixed = self._pass
        n = 0 if mixed.rows is None else mixed.rows.lengths.shape[0]
        given = queries[n:], keys[n:], values[n:]
        of_chunks = mixed.attention.attend_chunks(*given, self._pool, mixed.chunks, scale=scale, window=sight.window or 0, sinks=sinks)
        if mixed.rows is None:
            return of_chunks
        return mx.concatenate([mixed.rows.attend(queries[:n], keys[:n], values[:n], self._pool, scale, sight, sinks), of_chunks])


class Tables:
    """The block tables of the rows, on the host and, as they are now, on the device. A table only grows while its row is there; what
    follows its last block is the null block, and so are the rows that only fill up the batch."""

    def __init__(self) -> None:
        self._rows: list[Sequence] = []
        self._host = np.zeros((0, 0), np.int32)
        self._num_filled: list[int] = []
        self._device: mx.array | None = None

    def set_rows(self, rows: list[Sequence]) -> None:
        self._rows = rows
        self._host = np.zeros((padded_rows(len(rows)), 0), np.int32)
        self._num_filled = [0] * len(rows)
        self._device = None

    def on_device(self) -> mx.array:
        widest = max(len(s.table) for s in self._rows)
        if widest > self._host.shape[1]:
            wider = np.zeros((len(self._host), padded_width(widest)), np.int32)
            wider[:, : self._host.shape[1]] = self._host
            self._host = wider
        for i, (sequence, num_filled) in enumerate(zip(self._rows, self._num_filled, strict=True)):
            num_blocks = len(sequence.table)
            if num_blocks > num_filled:
                self._host[i, num_filled:num_blocks] = sequence.table[num_filled:]
                self._num_filled[i] = num_blocks
                self._device = None
        if self._device is None:
            self._device = mx.array(self._host)
        return self._device


@dataclass(slots=True)
class QueuedPass:
    """A pass that has been queued: done when `made` is there. `snapshot` is of the states at its end, where a block ends there."""

    made: list[mx.array]
    snapshot: list[State] | None = None
    logits: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        return self.made

    def layers(self) -> list[list[mx.array]]:
        return []  # passes write where the next plan may: they keep their order


Pass = Callable[..., tuple[mx.array, list[mx.array]]]


class Described:
    """A pass that is described once for each size that is seen often, and only filled in from then on, if it can be. Describing for good
    takes the time of several descriptions, and each takes some megabytes, so there are so many at most: the last that were used.

    Holds the method weakly: what is described knows the model's arrays, and would keep them and their owner."""

    def __init__(self, describe: Pass, is_compiled: bool) -> None:
        self.is_compiled = is_compiled
        self._describe = WeakMethod(describe)
        self._seen: Counter[Hashable] = Counter()
        self._compiled: OrderedDict[Hashable, Pass] = OrderedDict()

    def __call__(self, size: Hashable, *given: Any) -> tuple[mx.array, list[mx.array]]:
        """What is `given` for one size has the same shapes each time."""
        describe = self._describe()
        assert describe is not None, "its owner asks"
        if not self.is_compiled:
            return describe(*given)
        if size not in self._compiled:
            self._seen[size] += 1
            if self._seen[size] < _SEEN_OFTEN:
                return describe(*given)
            self._compiled[size] = mx.compile(_weakly(self._describe))
            if len(self._compiled) > _MOST_DESCRIBED:
                del self._seen[self._compiled.popitem(last=False)[0]]
        self._compiled.move_to_end(size)
        try:
            return self._compiled[size](*given)
        except Exception as error:  # noqa: BLE001 - whatever a model does on the way that cannot be described beforehand
            log.info("the steps of this model are described anew each time: %s", error)
            self.is_compiled = False
            self._compiled.clear()
            return describe(*given)


def _weakly(method: "WeakMethod[Pass]") -> Pass:
    def call(*given: Any) -> tuple[mx.array, list[mx.array]]:
        describe = method()
        assert describe is not None, "its owner calls"
        return describe(*given)

    return call


class PagedCache:
    """The blocks of one model; their numbers are those of the `BlockPool`, the null block's included in `num_blocks`. Owned by the device
    thread. Raises `UnsupportedCache`."""

    name = "paged"
    max_rows: int | None = None
    pads_rows = False
    takes_unread = True
    keeps_tails = False  # on a GPU a few tokens more or less make no difference to a pass
    host_bytes = 0

    def __init__(self, model: Any, attention: PagedAttention, num_blocks: int) -> None:
        self._model = model
        self._attention = attention
        self.layers, self.groups, self._states = layout(model)
        if not self.groups:
            raise UnsupportedCache("its layers keep nothing but states")
        self._attending = [layer for layer in self.layers if not layer.keeps_state]
        for layer in self._attending:
            _check(layer, self.groups[layer.group])
        self._pools = [_pool(self.groups[layer.group], num_blocks) for layer in self._attending]
        mx.eval([(pool.keys, pool.values) for pool in self._pools])
        # Rows and chunks can be in one pass. A state is that after all tokens of a row, in their order; and logits of all tokens would be
        # more than there is memory for.
        self._mixes = not self.needs_states and head.install(model)
        self._rows: list[Sequence | None] = []  # None: forgotten since
        self._tables = Tables()
        # Describing a step takes the host longer than a small model takes the device. States are not handed through; the caches of the
        # rows hold them.
        compiles = attention.can_be_compiled and not self.needs_states
        compiles_chunks = compiles and all(attention.can_compile_chunks(pool) for pool in self._pools)
        self._described_step = Described(self._step, compiles)
        self._described_mix = Described(self._mixed_step, compiles_chunks)

    @property
    def needs_states(self) -> bool:
        return self._states.are_needed

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return sum(g.token_bytes for g in self.groups)

    @property
    def state_bytes(self) -> int:
        return self._states.block_bytes

    @property
    def allocated_bytes(self) -> int:
        return sum(pool.keys.nbytes + pool.values.nbytes for pool in self._pools) + self._states.block_bytes

    def self_test(self) -> str | None:
        """What is wrong with the kernels for layers of these shapes, if anything is."""
        kinds = {(self.groups[s.group], s.num_query_heads, s.window, s.has_sinks) for s in self._attending}
        for group, num_query_heads, window, has_sinks in kinds:
            assert num_query_heads is not None, "it was checked"
            fault = self_test(
                self._attention,
                dtype=group.dtype,
                head_dim=group.key_dim,
                query_heads=num_query_heads,
                kv_heads=group.num_heads,
                window=window or 0,
                has_sinks=has_sinks,
            )
            if fault is not None:
                return fault
        return None

    # ---- sequences come and go

    def admit(self, sequence: Sequence) -> None:
        """Its first `num_computed` tokens are in its blocks."""
        num_blocks = sequence.num_computed // BLOCK_TOKENS
        self._states.begin(sequence, sequence.table[num_blocks - 1] if num_blocks else None)

    def fork(self, child: Sequence, parent: Sequence, source: int | None, target: int | None) -> None:
        """The child begins with what its parent has prefilled; the block that both will write to is copied."""
        self._states.fork(child, parent)
        if source is not None:
            assert target is not None
            for pool in self._pools:
                self._attention.copy_block(pool, source, target)

    def forget(self, sequence: Sequence) -> None:
        """Drops what a sequence holds, its blocks excepted. If it comes back it has other ones."""
        self._states.forget(sequence)
        self._rows = [None if s is sequence else s for s in self._rows]

    def clear(self) -> None:
        """Nobody is in a row any more. A pass that could not be computed must not be waited for by all that come after it."""
        self._rows = []
        self._states.clear()
        mx.synchronize()
        for pool in self._pools:
            pool.epoch = mx.array([0], mx.int32)

    # ---- passes

    def prefill(self, chunks: Items[Chunk]) -> list[QueuedPass]:
        """Queues the keys and values of stretches of prompts, and the logits of those that sample."""
        mixed, apart = self._parted(chunks)
        made = {chunk: self._prefill(chunk) for chunk in apart}
        if mixed:
            made |= zip(mixed, self._mix(None, mixed)[1], strict=True)
        return [made[chunk] for chunk in chunks]

    def _parted(self, chunks: Items[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
        """Those that can be in one pass, and those that need one of their own: what a picture looks like depends on where it stands."""
        mixed = [c for c in chunks if self._mixes and not c.sequence.spec.pictures]
        return mixed, [c for c in chunks if c not in mixed]

    def _prefill(self, chunk: Chunk) -> QueuedPass:
        sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
        states = self._states.of(sequence)
        inputs = prompt_inputs(self._model, sequence, start, stop)
        if self._attention.plans_lengths and not self.needs_states and not sequence.spec.pictures:
            inputs = mx.pad(inputs, [(0, 0), (0, mixed_size(stop - start, 1).num_tokens - (stop - start))])
        with head.only([stop - start - 1] if chunk.samples else None):
            logits = self._run(inputs, ChunkPass(self._attention, Chunks.of([(0, start, stop)], [_blocks(chunk)])), ChunkLayer, states)
        made = self._epochs() + state_arrays(states)
        snapshot = self._states.snapshot(sequence) if self.needs_states and stop % BLOCK_TOKENS == 0 else None
        return QueuedPass(made, snapshot, logits[:, -1] if chunk.samples else None)

    def _mix(self, inputs: mx.array | None, chunks: list[Chunk]) -> tuple[mx.array, list[QueuedPass]]:
        """One pass for a token of each row, if there are `inputs` [B], and for chunks → logits [B, V], and what is queued of each chunk."""
        rows: list[mx.array] = []
        num_inputs = num_rows = 0
        if inputs is not None:
            own = self._row_pass()
            num_inputs, num_rows = inputs.shape[0], own.lengths.shape[0]
            rows = [mx.pad(inputs, (0, num_rows - num_inputs)), own.table, own.lengths, own.offsets]
        ends = list(accumulate(chunk.stop - chunk.start for chunk in chunks))
        firsts = [0, *ends[:-1]]
        size = mixed_size(ends[-1], len(chunks)) if self._attention.plans_lengths else MixedSize(ends[-1], len(chunks), is_common=False)
        tokens, positions = np.zeros((2, size.num_tokens), np.int32)
        for chunk, first, end in zip(chunks, firsts, ends, strict=True):
            tokens[first:end] = chunk.sequence.tokens[chunk.start : chunk.stop]
            positions[first:end] = np.arange(chunk.start, chunk.stop)
        spans = [(first, chunk.start, chunk.stop) for chunk, first in zip(chunks, firsts, strict=True)]
        blocks = [_blocks(chunk) for chunk in chunks]
        width = padded_width(max(len(own) for own in blocks))
        if rows:  # one width for all tables: there are few sizes
            width = max(width, rows[1].shape[1])
            rows[1] = mx.pad(rows[1], [(0, 0), (0, width - rows[1].shape[1])])
        where = Chunks.of(spans, blocks, room=size.num_chunks, width=width)
        # What nobody samples stands for one who does: how many logits there are is part of the size as well.
        wanted = np.full(num_rows + size.num_chunks, num_rows + ends[-1] - 1, np.int32)
        wanted[:num_rows] = np.arange(num_rows)
        wanted[num_rows : num_rows + len(chunks)] = [num_rows + end - 1 for end in ends]
        given = [rows, mx.array(tokens), mx.array(positions), where.on_device, where.table, mx.array(wanted), self._epochs()]
        if size.is_common and self._described_mix.is_compiled:
            logits, epochs = self._described_mix((num_rows, width, size), *given)
        else:
            logits, epochs = self._mixed_step(*given, spans=where.spans)
        for pool, epoch in zip(self._pools, epochs, strict=True):
            pool.epoch = epoch
        of_chunks = [logits[num_rows + i : num_rows + i + 1] if chunk.samples else None for i, chunk in enumerate(chunks)]
        return logits[:num_inputs], [QueuedPass(epochs, logits=own) for own in of_chunks]

    def _mixed_step(
        self,
        rows: list[mx.array],
        tokens: mx.array,
        positions: mx.array,
        on_device: mx.array,
        table: mx.array,
        wanted: mx.array,
        epochs: list[mx.array],
        spans: tuple[tuple[int, int, int], ...] = (),
    ) -> tuple[mx.array, list[mx.array]]:
        """`rows` are their tokens, tables, lengths and offsets, or nothing → logits [wanted, V] and the epochs that the pools have then."""
        for pool, epoch in zip(self._pools, epochs, strict=True):
            pool.epoch = epoch
        of_rows = None
        if rows:
            of_rows = RowPass(self._attention, *rows[1:])
            tokens, positions = mx.concatenate([rows[0], tokens]), mx.concatenate([rows[3], positions])
        mixed = MixedPass(self._attention, of_rows, Chunks(spans, on_device, table), positions)
        with head.of_rows(wanted):
            logits = self._run(tokens[:, None], mixed, MixedLayer, [])[:, -1]
        return logits, self._epochs()

    def arrange(self, wanted: Items[Sequence], awaited: set[Sequence]) -> list[Sequence | None]:
        """Those who stay, in the order they are in, then those who come."""
        staying, before = set(wanted), set(self._rows)
        rows = [s for s in self._rows if s in staying] + [s for s in wanted if s not in before]
        if rows != self._rows:
            sequences = [s for s in rows if s is not None]
            self._states.arrange([*rows, *[None] * (padded_rows(len(rows)) - len(rows))])
            self._tables.set_rows(sequences)
            self._rows = list(rows)
        return list(rows)

    def forward(self, inputs: mx.array, chunks: Items[Chunk] = ()) -> tuple[mx.array, QueuedPass, list[QueuedPass]]:
        """Queues one token for each row, `inputs` [B] int32 → logits [B, V]; and `chunks`, in the same pass as far as they can be."""
        mixed, apart = self._parted(chunks)
        if mixed:
            logits, queued = self._mix(inputs, mixed)
            step = QueuedPass(queued[0].made)
        else:
            logits, step = self._forward(inputs)
            queued = []
        made = dict(zip(mixed, queued, strict=True)) | {chunk: self._prefill(chunk) for chunk in apart}
        return logits, step, [made[chunk] for chunk in chunks]

    def _forward(self, inputs: mx.array) -> tuple[mx.array, QueuedPass]:
        rows = self._row_pass()
        num_rows, num_padding = len(self._rows), rows.lengths.shape[0] - len(self._rows)
        if num_padding:
            inputs = mx.pad(inputs, (0, num_padding))
        logits, epochs = self._described_step(tuple(rows.table.shape), inputs, rows.table, rows.lengths, rows.offsets, self._epochs())
        for pool, epoch in zip(self._pools, epochs, strict=True):
            pool.epoch = epoch
        return logits[:num_rows], QueuedPass(epochs + state_arrays(self._states.rows))

    def _row_pass(self) -> "RowPass":
        rows = [*self._rows, *[None] * (padded_rows(len(self._rows)) - len(self._rows))]
        lengths = np.array([0 if s is None else s.num_queued for s in rows], np.int32)
        return RowPass(self._attention, self._tables.on_device(), mx.array(lengths), mx.array(shifted(lengths, rows)))

    def _step(
        self, inputs: mx.array, table: mx.array, lengths: mx.array, offsets: mx.array, epochs: list[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        """One token for each of B rows → logits [B, V] and the epochs that the pools have then."""
        for pool, epoch in zip(self._pools, epochs, strict=True):
            pool.epoch = epoch
        step = RowPass(self._attention, table, lengths, offsets)
        logits = self._run(inputs[:, None], step, RowLayer, self._states.rows)[:, -1]
        return logits, self._epochs()

    def settle(self, step: QueuedPass) -> None:
        """Everything is where it belongs."""

    # ---- blocks

    def save(self, sequence: Sequence, index: int, block: int, chunk: QueuedPass | None) -> None:
        """Its keys and values are where others find them; a state is only there at the end of a chunk."""
        if chunk is not None and chunk.snapshot is not None:
            self._states.save(block, chunk.snapshot)

    def drop(self, block: int) -> None:
        """Nobody can find this block any more."""
        self._states.drop(block)

    def export(self, block: int) -> dict[str, np.ndarray]:
        """A block's content for a file, as it is after all that is queued; bfloat16 as its bits."""
        table = mx.array([[block]], dtype=mx.int32)
        of_group: list[list[KeysValues]] = [[] for _ in self.groups]
        for layer, pool in zip(self._attending, self._pools, strict=True):
            of_group[layer.group].append(self._attention.gather(pool, table, BLOCK_TOKENS))
        stacks = {
            f"{name}.{g}": mx.concatenate([kv[i] for kv in layers])
            for g, layers in enumerate(of_group)
            for i, name in enumerate(("keys", "values"))
        }
        mx.eval(stacks)
        return {name: host_view(stack).copy() for name, stack in stacks.items()} | self._states.export(block)

    def load(self, block: int, arrays: Mapping[str, np.ndarray]) -> bool:
        """Puts back what `export` gave; whether a sequence can go on from the block's end. Raises `KeyError` and `ValueError`."""
        found = [group.checked(g, arrays) for g, group in enumerate(self.groups)]
        stacks = [tuple(device_array(a, group.dtype) for a in kv) for group, kv in zip(self.groups, found, strict=True)]
        whole = Chunks.of([(0, 0, BLOCK_TOKENS)], [[block]])
        for layer, pool in zip(self._attending, self._pools, strict=True):
            keys, values = (as_tokens(a[layer.place : layer.place + 1]) for a in stacks[layer.group])
            self._attention.write(keys, values, pool, whole)
        mx.async_eval(self._epochs())
        return self._states.load(block, arrays)

    # ---- inside

    def _run(self, inputs: mx.array, shared: Any, kind: Any, states: Items[Any]) -> mx.array:
        attending = (kind(shared, pool, layer.window) for layer, pool in zip(self._attending, self._pools, strict=True))
        state = iter(states)
        return self._model(inputs, cache=[next(state) if layer.keeps_state else next(attending) for layer in self.layers])

    def _epochs(self) -> list[mx.array]:
        return [pool.epoch for pool in self._pools]


def padded_rows(num_rows: int) -> int:
    """A batch has one of a few sizes."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


def _blocks(chunk: Chunk) -> list[int]:
    return chunk.sequence.table[: -(-chunk.stop // BLOCK_TOKENS)]


@dataclass(frozen=True, slots=True)
class MixedSize:
    """How many tokens and chunks of prompts a pass has room for. One that `is_common` may be seen often enough to be described for good."""

    num_tokens: int
    num_chunks: int
    is_common: bool


def mixed_size(num_tokens: int, num_chunks: int) -> MixedSize:
    """A pass has one of a few sizes: matrix products are planned anew for each, and a small one takes as long as its weights do."""
    chunks = 1 if num_chunks == 1 else -(-num_chunks // _COMMON_CHUNKS) * _COMMON_CHUNKS
    common = next((size for size in _COMMON_TOKENS if num_tokens <= size), None)
    if common is not None:
        return MixedSize(common, chunks, is_common=chunks <= _COMMON_CHUNKS)
    step = 64 if num_tokens <= 512 else 128
    return MixedSize(-(-num_tokens // step) * step, chunks, is_common=False)


def padded_width(num_blocks: int) -> int:
    return max(_NARROWEST_TABLE, 1 << (num_blocks - 1).bit_length())


def _check(layer: Layer, group: Group) -> None:
    if layer.num_query_heads is None:
        raise UnsupportedCache("it computes on keys and values itself")
    if group.key_dim != group.value_dim or not is_supported(group.dtype, group.key_dim, layer.num_query_heads, group.num_heads):
        raise UnsupportedCache(
            f"no kernel has {layer.num_query_heads} queries on {group.num_heads} keys of {group.key_dim} and values of {group.value_dim}"
        )


def _pool(group: Group, num_blocks: int) -> Pool:
    shape = (num_blocks, group.num_heads, BLOCK_TOKENS, group.key_dim)
    return Pool(mx.zeros(shape, group.dtype), mx.zeros(shape, group.dtype))
