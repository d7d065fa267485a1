"""Keys and values in rows: one buffer a layer, a row for each sequence that decodes. Where no kernel reads blocks (CPU, odd shapes).

A sequence is prefilled with keys and values of its own (`PrefillCache`) and gets a row when it begins to decode. The buffers are
never rebound by a graph, or the device would copy them whole while a step is under way. So a step attends to two things: what the
buffer holds of each row, which is all that was read back before, and the keys and values that this step, and the one before if it
is not read yet, have made themselves. These are written into the buffer in place, by the host, once their step has been read.
Nothing is copied but new tokens, and no step reads what is being written: it masks by length.

Blocks that can be shared are copies beside the rows, written when they are published and laid before a newcomer when it is admitted.
"""
# pyright: basic

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_manager.inference.engine import cpu_math, head
from mlx_manager.inference.engine.attention import AttendingCache, GivingCache, Sight
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.cache_layout import (
    Group,
    HostKeysValues,
    KeysValues,
    Layer,
    State,
    UnsupportedCache,
    device_array,
    first_in_sight,
    host_view,
    layout,
    prefill_mask,
    prompt_inputs,
    shifted,
    state_arrays,
)
from mlx_manager.inference.engine.scheduler import Chunk
from mlx_manager.inference.engine.sequence import Sequence

T = TypeVar("T")

_SMALLEST_ROW = 256  # tokens
# Of passes that several prompts share, in tokens with their padding: up to the first padding costs little, as the weights are read in
# any case; beyond the second a wider pass gains nothing.
_SMALL_PASS = 64
_LARGE_PASS = 1024


class PrefillCache(GivingCache):
    """One layer's keys and values of one sequence while it is prefilled: `parts` in their order, each [1, H, ., D]."""

    def __init__(self, window: int | None, parts: Items[KeysValues] = ()) -> None:
        self.window = window
        self.parts = list(parts)
        self.offset = sum(keys.shape[2] for keys, _ in parts)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        start = first_in_sight(self.offset, self.window)
        self.parts.append((keys, values))
        self.offset += keys.shape[2]
        if len(self.parts) == 1:
            return keys, values
        keys, values = (mx.concatenate(list(part), axis=2) for part in zip(*self.parts, strict=True))
        return (keys, values) if start == 0 else (keys[:, :, start:], values[:, :, start:])

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any):
        past = self.offset - first_in_sight(self.offset, self.window)
        return prefill_mask(N, past, window_size or self.window, return_array)


class PrefillRows(AttendingCache):
    """One layer's stretches of several prompts in one pass: each the beginning of a row, whose rest nobody looks at."""

    def __init__(self, caches: list[PrefillCache], lengths: list[int], positions: mx.array) -> None:
        self.offset = positions
        self._caches = caches
        self._lengths = lengths
        self._num_before = [cache.offset - first_in_sight(cache.offset, cache.window) for cache in caches]
        self._new = sum(cache.offset == 0 for cache in caches)  # they are the first rows
        self._own: KeysValues | None = None
        self._in_sight: list[KeysValues] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        self._own = keys, values
        self._in_sight = [
            cache.update_and_fetch(keys[row : row + 1, :, :length], values[row : row + 1, :, :length])
            for row, (cache, length) in enumerate(zip(self._caches, self._lengths, strict=True))
        ]
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Sight:
        if return_array:
            raise UnsupportedCache("it computes on masks")
        return Sight(window_size or self._caches[0].window)

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        assert self._own is not None
        window = self._caches[0].window if mask is None else mask.window

        def attended(queries: mx.array, keys: mx.array, values: mx.array, num_before: int) -> mx.array:
            mask = prefill_mask(queries.shape[2], num_before, window, return_array=False)
            return cpu_math.attention(queries, keys, values, scale, mask, sinks)

        rows: list[mx.array] = []
        if self._new:  # what comes after a row's end looks back, and nothing looks at it
            rows.append(attended(queries[: self._new], self._own[0][: self._new], self._own[1][: self._new], 0))
        for row in range(self._new, len(self._lengths)):
            length = self._lengths[row]
            one = attended(queries[row : row + 1, :, :length], *self._in_sight[row], self._num_before[row])
            rows.append(mx.pad(one, [(0, 0), (0, 0), (0, queries.shape[2] - length), (0, 0)]))
        return mx.concatenate(rows) if len(rows) > 1 else rows[0]


class GatheringCache:
    """One layer's rows in one decode step, for a model that computes on keys and values itself: they are copied together."""

    name = "slots, gathered"

    def __init__(self, step: "DecodeStep", layer: Layer) -> None:
        self._step = step
        self._layer = layer

    @property
    def offset(self) -> mx.array:
        return self._step.offsets

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        self._step.made[self._layer.group].append((keys, values))  # layers come in their order
        parts = [*self._step.before(self._layer), (keys, values)]
        return _joined([k for k, _ in parts]), _joined([v for _, v in parts])

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> mx.array:
        return self._step.mask(window_size or self._layer.window)


class GroupedGatheringCache(GatheringCache):
    """The same for a model whose scores have an axis more: the heads that share keys."""

    name = "slots, gathered by heads"

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> mx.array:
        return super().make_mask(N, window_size=window_size)[:, None]


class SplitCache(AttendingCache):
    """One layer's rows in one decode step: attends to the buffer where it is and to the newest tokens beside it."""

    name = "slots"

    def __init__(self, step: "DecodeStep", layer: Layer) -> None:
        self._step = step
        self._layer = layer
        self._own: KeysValues | None = None

    @property
    def offset(self) -> mx.array:
        return self._step.offsets

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        self._own = keys, values
        self._step.made[self._layer.group].append((keys, values))  # layers come in their order
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Sight:
        if return_array:
            raise UnsupportedCache("it computes on masks")
        return Sight(window_size or self._layer.window)

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        assert self._own is not None
        (old_keys, old_values), *unread = self._step.before(self._layer)
        recent = [*unread, self._own]
        new_keys, new_values = _joined([k for k, _ in recent]), _joined([v for _, v in recent])
        (num_rows, num_queries, _, _), num_heads = queries.shape, new_keys.shape[1]
        # The queries of the heads that share keys stand where a longer query would have its positions.
        queries = (queries * scale).reshape(num_rows, num_heads, num_queries // num_heads, -1)
        # With many keys and few queries a product is faster the tall way round.
        old_scores = (old_keys @ queries.swapaxes(-1, -2)).swapaxes(-1, -2)
        scores = mx.concatenate([old_scores, queries @ new_keys.swapaxes(-1, -2)], axis=-1)
        bias = self._step.bias(self._layer.window if mask is None else mask.window)
        if bias is not None:
            scores = scores + bias.astype(scores.dtype)
        if sinks is not None:
            column = mx.broadcast_to(sinks.reshape(1, num_heads, -1, 1), (*scores.shape[:-1], 1)).astype(scores.dtype)
            scores = mx.concatenate([scores, column], axis=-1)
        weights = cpu_math.softmax(scores)
        old, end = old_keys.shape[2], old_keys.shape[2] + len(recent)
        return (weights[..., :old] @ old_values + weights[..., old:end] @ new_values).reshape(num_rows, num_queries, 1, -1)


class DecodeStep:
    """What the layers of one decode step share. `made[group][place]` fills with the keys and values [B, H, 1, D] of this step."""

    def __init__(
        self, buffers: list["Buffer"], positions: np.ndarray, offsets: np.ndarray, written: np.ndarray, unread: "Unread | None"
    ) -> None:
        """`positions` are counted in tokens, `offsets` as the model does (`Sequence.position_shift`)."""
        self.positions = mx.array(positions)
        self.offsets = mx.array(offsets)
        self._num_written = max(1, int(written.max()))
        self._is_even = unread is None and bool((written == self._num_written).all())
        self.made: list[list[KeysValues]] = [[] for _ in buffers]
        self._buffers = buffers
        self._num_rows = len(positions)
        self._longest = int(positions.max())
        self._written = mx.array(written)[:, None]
        self._unread = unread
        self._masks: dict[int | None, mx.array] = {}
        self._biases: dict[int | None, mx.array | None] = {}

    def before(self, layer: Layer) -> list[KeysValues]:
        """What was there before this step: the rows of the buffer, then the token of the step that is not read yet."""
        rows = self._buffers[layer.group].part(layer.place, self._num_rows, self._num_written)
        return [rows] if self._unread is None else [rows, self._unread.of(layer)]

    def mask(self, window: int | None) -> mx.array:
        """Boolean [B, 1, 1, written + recent]: what each row may look at."""
        if window not in self._masks:
            at = mx.arange(self._num_written)
            seen = at < self._written
            if window is not None:
                seen = seen & (at > (self.positions - window)[:, None])
            parts = [seen]
            if self._unread is not None:
                parts.append(self._unread.valid if window is None or window > 1 else mx.zeros_like(self._unread.valid))
            parts.append(mx.ones((self._num_rows, 1), dtype=mx.bool_))
            self._masks[window] = mx.concatenate(parts, axis=1)[:, None, None]
        return self._masks[window]

    def bias(self, window: int | None) -> mx.array | None:
        """The same to be added to scores: 0 or minus infinity. None: everybody may look at everything."""
        if window not in self._biases:
            sees_all = self._is_even and (window is None or self._longest < window)
            self._biases[window] = None if sees_all else mx.where(self.mask(window), mx.array(0.0), mx.array(-mx.inf))
        return self._biases[window]


@dataclass(slots=True)
class Unread:
    """Keys and values of a step that is queued, [layers, B, H, 1, D] for each group. `valid` [B, 1]: whether the row has one."""

    stacks: list[KeysValues]
    valid: mx.array

    def of(self, layer: Layer) -> KeysValues:
        keys, values = self.stacks[layer.group]
        return keys[layer.place : layer.place + 1].squeeze(0), values[layer.place : layer.place + 1].squeeze(0)


class Buffer:
    """The rows of one group: for each layer, keys [rows, H, tokens, Dk] and values [rows, H, tokens, Dv]. The host sees the same
    memory as [layers, rows, H, tokens, D]."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._num_rows = self._num_tokens = 0
        self._layers: list[KeysValues] = []
        self._host: HostKeysValues | None = None
        self._high: list[int] = []  # up to where each row may hold something

    @property
    def num_bytes(self) -> int:
        return 0 if self._host is None else sum(a.nbytes for a in self._host)

    def reserve(self, num_rows: int, num_tokens: int) -> None:
        """Makes room; what is there stays. A step that is under way keeps the memory that it was queued with."""
        if num_rows <= self._num_rows and num_tokens <= self._num_tokens:
            return
        g, old = self._group, self._host
        # Some more than is needed, so that it is not soon needed again; not much, as every row is as long as the longest.
        if num_tokens > self._num_tokens:
            self._num_tokens = -(-max(num_tokens + _SMALLEST_ROW // 2, num_tokens * 9 // 8) // _SMALLEST_ROW) * _SMALLEST_ROW
        if num_rows > self._num_rows:
            self._num_rows = num_rows + num_rows // 4
        shape = (g.num_layers, self._num_rows, g.num_heads, self._num_tokens)
        both = [mx.zeros((*shape, d), g.dtype) for d in (g.key_dim, g.value_dim)]
        layers = [_pair(a[i : i + 1].squeeze(0) for a in both) for i in range(g.num_layers)]  # views: slices copy nothing
        mx.eval(both, layers)
        self._layers, self._host = layers, _pair(host_view(a) for a in both)
        if old is not None:
            for mine, theirs in zip(self._host, old, strict=True):
                mine[:, : theirs.shape[1], :, : theirs.shape[3]] = theirs
        self._high += [0] * (self._num_rows - len(self._high))

    def _arrays(self) -> HostKeysValues:
        assert self._host is not None, "nothing is reserved"
        return self._host

    def part(self, place: int, num_rows: int, num_tokens: int) -> KeysValues:
        """What a layer's first rows hold; a view."""
        keys, values = self._layers[place]
        return keys[:num_rows, :, :num_tokens], values[:num_rows, :, :num_tokens]

    def fill(self, row: int, place: int, parts: Items[KeysValues]) -> None:
        """Puts a layer's parts, each [1, H, ., D], at the beginning of a row."""
        for i, host in enumerate(self._arrays()):
            at = 0
            for part in parts:
                length = part[i].shape[2]
                host[place, row, :, at : at + length] = host_view(part[i])[0]
                at += length

    def finish(self, row: int, length: int) -> None:
        """From `length` on the row is empty. What was there could be infinite, and nothing times that is not nothing."""
        if self._high[row] > length:
            for host in self._arrays():
                host[:, row, :, length : self._high[row]] = 0
        self._high[row] = length

    def move(self, source: int, row: int, length: int) -> None:
        for host in self._arrays():
            host[:, row, :, :length] = host[:, source, :, :length]
        self.finish(row, length)

    def write(self, rows: np.ndarray, positions: np.ndarray, made: HostKeysValues) -> None:
        """`made` [layers, B, H, D]: a token for each of B rows, each at its position."""
        for host, new in zip(self._arrays(), made, strict=True):
            host[:, rows, :, positions] = new.swapaxes(0, 1)
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            self._high[row] = max(self._high[row], position + 1)

    def read(self, row: int, start: int, stop: int) -> HostKeysValues:
        """A copy of a stretch of a row, [layers, H, stop - start, D]."""
        return _pair(host[:, row, :, start:stop].copy() for host in self._arrays())


@dataclass(slots=True)
class QueuedChunk:
    """Keys and values of a stretch of a prompt that are being computed, of each layer that attends, and its `states`, of which `snapshot`
    has those at its end, where a block ends there; `logits` [1, V] of its last token, if it samples."""

    made: list[KeysValues]
    states: list[mx.array] = field(default_factory=list)
    snapshot: list[State] | None = None
    logits: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        return [a for kv in self.made for a in kv] + self.states

    def layers(self) -> list[list[mx.array]]:
        return [list(kv) for kv in self.made]


@dataclass(slots=True)
class QueuedStep:
    """A decode step that is being computed: `rows` (None: nobody wants what comes of it), each at its position, and what it made in each
    layer that attends: in `stacks` those of a group lie together."""

    rows: list[Sequence | None]
    positions: np.ndarray
    made: list[KeysValues]
    stacks: list[KeysValues]

    def arrays(self) -> list[mx.array]:
        return [a for stack in self.stacks for a in stack]

    def layers(self) -> list[list[mx.array]]:
        return [list(kv) for kv in self.made]


class SlotCache:
    """All rows of one model. Owned by the device thread.

    `handle` is what each layer of a decode step is given: for models that compute on keys and values themselves, rows are copied together.
    Raises `UnsupportedCache`.
    """

    max_rows: int | None = None
    pads_rows = True
    takes_unread = False

    @property
    def keeps_tails(self) -> bool:
        return not self.needs_states

    def __init__(self, model: Any, handle: type[SplitCache | GatheringCache] = SplitCache) -> None:
        self._model = model
        self._handle = handle
        self.name = handle.name
        self.layers, self.groups, self._states = layout(model)
        self._attending = [layer for layer in self.layers if not layer.keeps_state]
        self._rows: list[Sequence | None] = []
        self._row_of: dict[Sequence, int] = {}
        self._buffers = [Buffer(group) for group in self.groups]
        self._prefilling: dict[Sequence, list[PrefillCache]] = {}  # one for each layer that attends, until there is a row
        self._blocks: dict[int, list[HostKeysValues]] = {}  # keys and values [layers, H, 32, D] of each group
        self._last: QueuedStep | None = None

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
        rows = sum(b.num_bytes for b in self._buffers)
        return rows + self.host_bytes + self._states.block_bytes

    @property
    def host_bytes(self) -> int:
        return len(self._blocks) * self.token_bytes * BLOCK_TOKENS

    # ---- sequences come and go

    def admit(self, sequence: Sequence) -> None:
        """Its first `num_computed` tokens are in its blocks."""
        num_blocks = sequence.num_computed // BLOCK_TOKENS
        blocks = sequence.table[:num_blocks] if sequence.tail is None else [*sequence.table[:num_blocks], sequence.tail]
        groups = [self._joined_blocks(g, blocks, sequence.num_computed) for g in range(len(self.groups))] if blocks else []
        caches: list[PrefillCache] = []
        for layer in self._attending:
            part = _pair(a[layer.place : layer.place + 1] for a in groups[layer.group]) if blocks else None
            caches.append(PrefillCache(layer.window, [] if part is None else [part]))
        self._prefilling[sequence] = caches
        self._states.begin(sequence, sequence.table[num_blocks - 1] if num_blocks else None)

    def fork(self, child: Sequence, parent: Sequence, source: int | None, target: int | None) -> None:
        """The child begins with what its parent has prefilled. Arrays are shared; blocks are copies anyway."""
        self._prefilling[child] = [PrefillCache(cache.window, cache.parts) for cache in self._prefilling[parent]]
        self._states.fork(child, parent)

    def forget(self, sequence: Sequence) -> None:
        """Drops what a sequence holds, its blocks excepted."""
        self._prefilling.pop(sequence, None)
        self._states.forget(sequence)
        self._row_of.pop(sequence, None)

    def clear(self) -> None:
        """Nobody is in a row any more."""
        self._rows = []
        self._row_of = {}
        self._states.clear()
        self._last = None

    # ---- passes

    def prefill(self, chunks: Items[Chunk]) -> list[QueuedChunk]:
        """Queues the keys and values of stretches of prompts, in as few passes as pays, and the logits of those that sample."""
        if self.needs_states or not issubclass(self._handle, AttendingCache):
            return [self._prefill(chunk) for chunk in chunks]
        queued: dict[Chunk, QueuedChunk] = {}
        for group in together(chunks):
            if len(group) == 1:
                queued[group[0]] = self._prefill(group[0])
            else:
                queued |= self._prefill_together(group)
        return [queued[chunk] for chunk in chunks]

    def _prefill_together(self, group: list[Chunk]) -> dict[Chunk, QueuedChunk]:
        lengths = [chunk.stop - chunk.start for chunk in group]
        tokens = np.zeros((len(group), max(lengths)), np.int32)
        for row, chunk in enumerate(group):
            tokens[row, : lengths[row]] = chunk.sequence.tokens[chunk.start : chunk.stop]
        positions = mx.array([chunk.start for chunk in group], dtype=mx.int32)
        of_rows = [self._prefilling[chunk.sequence] for chunk in group]
        layers = [PrefillRows(list(caches), lengths, positions) for caches in zip(*of_rows, strict=True)]
        with head.only([length - 1 for length in lengths] if any(chunk.samples for chunk in group) else None):
            logits = self._run(mx.array(tokens), layers, [])
        queued: dict[Chunk, QueuedChunk] = {}
        for row, (chunk, caches) in enumerate(zip(group, of_rows, strict=True)):
            made = [cache.parts[-1] for cache in caches]
            queued[chunk] = QueuedChunk(made, logits=logits[row : row + 1, -1] if chunk.samples else None)
        return queued

    def _prefill(self, chunk: Chunk) -> QueuedChunk:
        sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
        caches, states = self._prefilling[sequence], self._states.of(sequence)
        with head.only([stop - start - 1] if chunk.samples else None):
            logits = self._run(prompt_inputs(self._model, sequence, start, stop), caches, states)
        snapshot = self._states.snapshot(sequence) if self.needs_states and stop % BLOCK_TOKENS == 0 else None
        return QueuedChunk([cache.parts[-1] for cache in caches], state_arrays(states), snapshot, logits[:, -1] if chunk.samples else None)

    def arrange(self, wanted: Items[Sequence], awaited: set[Sequence]) -> list[Sequence | None]:
        """Gives each of `wanted` a row; who stays keeps theirs if possible. `awaited` are those of whom the step under way computes
        something: their rows must not be written to. None is a row that nobody is in, in the midst of others."""
        old = [s if s in self._row_of else None for s in self._rows]
        under_way = () if self._last is None else self._last.rows
        rows = arranged(old, wanted, {i for i, s in enumerate(under_way) if s in awaited})
        if rows == self._rows == old:  # else somebody is back in the row that they had left
            return rows
        self._states.arrange(rows)
        longest = max((s.num_queued for s in wanted), default=0) + 1
        for buffer in self._buffers:
            buffer.reserve(len(rows), longest)
        for row, sequence in enumerate(rows):
            if sequence is None:
                continue
            was = self._row_of.get(sequence)
            if was is None:
                self._move_in(sequence, row)
            elif was != row:
                for buffer in self._buffers:
                    buffer.move(was, row, sequence.num_computed)
                self._row_of[sequence] = row
        self._rows = rows
        return rows

    def forward(self, inputs: mx.array, chunks: Items[Chunk] = ()) -> tuple[mx.array, QueuedStep, list[QueuedChunk]]:
        """Queues one token for each row, `inputs` [B] int32 → logits [B, V]; then `chunks`."""
        rows = self._rows
        positions = np.array([s.num_queued if s is not None else 0 for s in rows], np.int32)
        written = np.array([s.num_computed if s is not None else 0 for s in rows], np.int32)
        for buffer in self._buffers:
            buffer.reserve(len(rows), int(positions.max()) + 1)
        step = DecodeStep(self._buffers, positions, shifted(positions, rows), written, self._unread(rows))
        logits = self._run(inputs[:, None], [self._handle(step, layer) for layer in self._attending], self._states.rows)[:, -1, :]
        stacks = [_pair(mx.stack([kv[i] for kv in made]) for i in (0, 1)) for made in step.made]
        made = [step.made[layer.group][layer.place] for layer in self._attending]
        self._last = QueuedStep(list(rows), positions, made, stacks)
        return logits, self._last, self.prefill(chunks)

    def settle(self, step: QueuedStep) -> None:
        """Writes what a step made, which has been computed by now, into the rows of those who are still there."""
        here = [(i, self._row_of[s]) for i, s in enumerate(step.rows) if s is not None and s in self._row_of]
        if here:
            rows = np.array([row for _, row in here])
            stay = slice(None) if len(here) == len(step.rows) else [i for i, _ in here]  # a slice copies nothing
            for buffer, stacks in zip(self._buffers, step.stacks, strict=True):
                buffer.write(rows, step.positions[stay], _pair(host_view(a)[:, :, :, 0][:, stay] for a in stacks))
        if self._last is step:
            self._last = None

    # ---- blocks

    def save(self, sequence: Sequence, index: int, block: int, chunk: QueuedChunk | None) -> None:
        """Copies tokens 32 index … of a sequence, as far as they have been computed, to where others find them."""
        start, stop = index * BLOCK_TOKENS, min((index + 1) * BLOCK_TOKENS, sequence.num_computed)
        row = self._row_of.get(sequence)
        if row is not None:
            self._blocks[block] = [buffer.read(row, start, stop) for buffer in self._buffers]
        else:
            pairs = list(zip(self._prefilling[sequence], self._attending, strict=True))
            of_group = [[cache for cache, layer in pairs if layer.group == g] for g in range(len(self.groups))]
            self._blocks[block] = [_stacked(group, start, stop) for group in of_group]
        if chunk is not None and chunk.snapshot is not None:
            self._states.save(block, chunk.snapshot)

    def drop(self, block: int) -> None:
        """Nobody can find this block any more."""
        self._blocks.pop(block, None)
        self._states.drop(block)

    def export(self, block: int) -> dict[str, np.ndarray]:
        """A block's content for a file: bfloat16 as its bits."""
        arrays = {f"{name}.{g}": kv[i] for g, kv in enumerate(self._blocks[block]) for i, name in enumerate(("keys", "values"))}
        return arrays | self._states.export(block)

    def load(self, block: int, arrays: Mapping[str, np.ndarray]) -> bool:
        """Puts back what `export` gave; whether a sequence can go on from the block's end. Raises `KeyError` and `ValueError`."""
        self._blocks[block] = [group.checked(g, arrays) for g, group in enumerate(self.groups)]
        return self._states.load(block, arrays)

    # ---- inside

    def _run(self, inputs: mx.array, attending: Items[Any], states: Items[Any]) -> mx.array:
        attend, state = iter(attending), iter(states)
        with cpu_math.one_pass():
            return self._model(inputs, cache=[next(state) if layer.keeps_state else next(attend) for layer in self.layers])

    def _joined_blocks(self, group: int, blocks: list[int], num_tokens: int) -> KeysValues:
        both = (np.concatenate([self._blocks[b][group][i] for b in blocks], axis=2)[:, :, :num_tokens] for i in (0, 1))
        return _pair(device_array(a, self.groups[group].dtype) for a in both)

    def _move_in(self, sequence: Sequence, row: int) -> None:
        caches = self._prefilling.pop(sequence)
        mx.eval([cache.parts for cache in caches])  # one wait for all: looking at each would be one for each
        for cache, layer in zip(caches, self._attending, strict=True):
            self._buffers[layer.group].fill(row, layer.place, cache.parts)
        for buffer in self._buffers:
            buffer.finish(row, sequence.num_computed)
        self._row_of[sequence] = row

    def _unread(self, rows: list[Sequence | None]) -> "Unread | None":
        """What the step under way makes, in the order of the rows now."""
        last = self._last
        if last is None:
            return None
        at = {s: i for i, s in enumerate(last.rows) if s is not None}
        source = [at.get(s, -1) if s is not None else -1 for s in rows]
        valid = mx.array([[i >= 0] for i in source])
        if source == list(range(len(last.rows))):
            return Unread(last.stacks, valid)
        index = mx.array([max(i, 0) for i in source], dtype=mx.int32)
        return Unread([_pair(mx.take(a, index, axis=1) for a in stack) for stack in last.stacks], valid)


def arranged(old: Items[Sequence | None], wanted: Items[Sequence], blocked: set[int]) -> list[Sequence | None]:
    """Who is in which row: newcomers fill holes, then the last rows do. Into a row that is `blocked` nobody moves. Pure."""
    staying, before = set(wanted), set(old)
    rows = [s if s in staying else None for s in old]
    newcomers = deque(s for s in wanted if s not in before)
    for i, s in enumerate(rows):
        if s is None and i not in blocked and newcomers:
            rows[i] = newcomers.popleft()
    rows.extend(newcomers)
    _drop_the_end(rows)
    for i in range(len(rows)):
        if i < len(rows) and rows[i] is None and i not in blocked:
            rows[i] = rows.pop()
            _drop_the_end(rows)
    return rows


def _drop_the_end(rows: list[Sequence | None]) -> None:
    while rows and rows[-1] is None:
        rows.pop()


def _stacked(caches: list[PrefillCache], start: int, stop: int) -> HostKeysValues:
    """Tokens [start, stop) of the layers of one group: [layers, H, stop - start, D]."""
    return _pair(np.stack([_between([kv[i] for kv in c.parts], start, stop) for c in caches]) for i in (0, 1))


def _between(parts: list[mx.array], start: int, stop: int) -> np.ndarray:
    pieces: list[np.ndarray] = []
    at = 0
    for part in parts:
        length = part.shape[2]
        if at < stop and at + length > start:
            pieces.append(host_view(part)[0, :, max(0, start - at) : stop - at])
        at += length
    return np.concatenate(pieces, axis=1)


def together(chunks: Items[Chunk]) -> list[list[Chunk]]:
    """Which chunks share a pass: of similar length, as rows are padded to the longest; those that begin a prompt first. A prompt
    with pictures has a pass of its own. Pure."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda c: (bool(c.sequence.spec.pictures), c.start - c.stop)):
        length = chunk.stop - chunk.start
        if groups and not chunk.sequence.spec.pictures:
            group = groups[-1]
            padded = (len(group) + 1) * (group[0].stop - group[0].start)
            wanted = sum(c.stop - c.start for c in group) + length
            if padded <= _SMALL_PASS or (padded <= _LARGE_PASS and 4 * padded <= 5 * wanted):
                group.append(chunk)
                continue
        groups.append([chunk])
    return [sorted(group, key=lambda c: c.start > 0) for group in groups]


def _pair(both: Iterable[T]) -> tuple[T, T]:
    keys, values = both
    return keys, values


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
