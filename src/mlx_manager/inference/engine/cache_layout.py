"""What the layers of a model keep for a sequence: keys and values, or a state. The part that our caches have in common.

Keys and values are kept per token and can be found in blocks. A state (recurrence, convolution) stands for everything before it: it
is kept in mlx-lm's own batch of states, and a copy of it belongs to the block that it was there at the end of.
"""
# pyright: basic

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_manager.inference.engine import attention
from mlx_manager.inference.engine.attention import WatchingCache
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.sequence import Sequence

KeysValues = tuple[mx.array, mx.array]
HostKeysValues = tuple[np.ndarray, np.ndarray]
State = list[mx.array | None]  # the arrays of one layer

_DTYPE_NAMES = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16", mx.int32: "i32"}


class UnsupportedCache(Exception):
    """This architecture keeps something that a cache of ours cannot keep."""


@dataclass(frozen=True, slots=True)
class Layer:
    """`group` and `place` say where its keys and values are; a layer that keeps a state has no group (-1). `window` in tokens.
    `num_query_heads` is None for a layer that does not leave it to the cache to attend."""

    group: int
    place: int
    window: int | None = None
    num_query_heads: int | None = None
    has_sinks: bool = False

    @property
    def keeps_state(self) -> bool:
        return self.group < 0


@dataclass(frozen=True, slots=True)
class Group:
    """Layers whose keys [H, ., Dk] and values [H, ., Dv] have one shape and type, so that they are kept together."""

    num_layers: int
    num_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype

    @property
    def token_bytes(self) -> int:
        return self.num_layers * self.num_heads * (self.key_dim + self.value_dim) * self.dtype.size

    def checked(self, index: int, arrays: Mapping[str, np.ndarray]) -> HostKeysValues:
        """Its keys and values of an exported block, [layers, H, BLOCK_TOKENS, D]. Raises `KeyError` and `ValueError`."""
        found = arrays[f"keys.{index}"], arrays[f"values.{index}"]
        itemsize = self.dtype.size
        for array, dim in zip(found, (self.key_dim, self.value_dim), strict=True):
            if array.shape != (self.num_layers, self.num_heads, BLOCK_TOKENS, dim) or array.itemsize != itemsize:
                raise ValueError("a block of another model")
        return found


def layout(model: Any) -> tuple[list[Layer], list[Group], "States"]:
    """What each layer keeps, found out by computing one token. Raises `UnsupportedCache`."""
    attention.install()
    caches = [_probe(kind) for kind in make_prompt_cache(model)]
    mx.eval(model(mx.array([[0]], dtype=mx.int32), cache=caches))
    members: dict[tuple[int, int, int, mx.Dtype], int] = {}
    layers: list[Layer] = []
    for cache in caches:
        if isinstance(cache, ArraysCache):
            layers.append(Layer(-1, 0))
            continue
        if len(cache.kept) != 1:
            raise UnsupportedCache("some of its layers use the keys and values of others")
        keys, values = cache.kept[0]
        shape = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        place = members.get(shape, 0)
        members[shape] = place + 1
        layers.append(Layer(list(members).index(shape), place, cache.window, cache.num_query_heads, cache.has_sinks))
    states = States([list(cache.cache) for cache in caches if isinstance(cache, ArraysCache)])
    return layers, [Group(count, *shape) for shape, count in members.items()], states


def prompt_inputs(model: Any, sequence: Sequence, start: int, stop: int) -> Any:
    """What a model is given of tokens [start, stop) of a sequence: [1, stop - start]. Pictures in it are the model's to show."""
    if sequence.spec.pictures:
        return model.shown(sequence, start, stop)
    return mx.array([sequence.tokens[start:stop]], dtype=mx.int32)


def shifted(positions: np.ndarray, rows: Items[Sequence | None]) -> np.ndarray:
    """Positions [B] of the rows' next tokens, as the model counts them."""
    return positions + np.array([0 if s is None else s.position_shift for s in rows], np.int32)


def prefill_mask(num_tokens: int, num_before: int, window: int | None, return_array: bool) -> mx.array | str | None:
    """What tokens of a prompt may look at, which come after `num_before` that are handed to attention together with them."""
    if window is not None and num_before + num_tokens > window:
        return create_causal_mask(num_tokens, num_before, window_size=window)
    if return_array:
        return create_causal_mask(num_tokens, num_before)
    return None if num_tokens == 1 else "causal"


def both_ways_mask(num_before: int, window: int | None, both_ways: mx.array) -> mx.array:
    """The same [L, before + L] for L tokens of which some see each other `both_ways` [L, L]."""
    mask = create_causal_mask(both_ways.shape[0], num_before, window_size=window)
    return mx.concatenate([mask[:, :num_before], mask[:, num_before:] | both_ways], axis=1)


def first_in_sight(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


class States:
    """The states of one model's layers: of sequences that have no row yet, of the rows, and of blocks. Owned by the device thread.

    `rows` are one cache for each layer that keeps a state. What a sequence without tokens has is all zeros.
    """

    def __init__(self, examples: list[State]) -> None:
        self._zeros: list[State] = [[None if a is None else mx.zeros_like(a) for a in state] for state in examples]
        mx.eval(self._zeros)
        self.rows: list[ArraysCache] = []
        self._in_rows: list[Sequence | None] = []
        self._own: dict[Sequence, list[ArraysCache]] = {}
        self._of_block: dict[int, list[State]] = {}
        self.block_bytes = 0
        """Of what is kept for blocks."""

    @property
    def are_needed(self) -> bool:
        return bool(self._zeros)

    def begin(self, sequence: Sequence, block: int | None) -> None:
        """A sequence goes on from the end of a block, or begins with nothing."""
        self._own[sequence] = [_cache_of(state) for state in (self._zeros if block is None else self._of_block.get(block, []))]

    def of(self, sequence: Sequence) -> list[ArraysCache]:
        """Of a sequence that has no row yet."""
        return self._own[sequence]

    def snapshot(self, sequence: Sequence) -> list[State]:
        return [list(cache.cache) for cache in self._own[sequence]]

    def fork(self, child: Sequence, parent: Sequence) -> None:
        self._own[child] = [_cache_of(state) for state in self.snapshot(parent)]

    def forget(self, sequence: Sequence) -> None:
        self._own.pop(sequence, None)

    def clear(self) -> None:
        """Nobody is in a row any more."""
        self.rows, self._in_rows = [], []

    def arrange(self, rows: Items[Sequence | None]) -> None:
        """Who is in which row; None is a row that nobody is in. Those that come in have a state of their own until now."""
        if not self.are_needed:
            return
        order = list(self._in_rows)
        for sequence in rows:
            own = None if sequence is None else self._own.pop(sequence, None)
            if own is None:
                continue
            if order:
                for mine, new in zip(self.rows, own, strict=True):
                    mine.extend(new)
            else:
                self.rows = own
            order.append(sequence)
        at = {s: i for i, s in enumerate(order) if s is not None}
        self._in_rows = list(rows)
        source = [0 if s is None else at[s] for s in rows]
        if source != list(range(len(order))):
            index = mx.array(source, dtype=mx.int32)
            for layer in self.rows:
                layer.filter(index)

    # ---- of blocks

    def save(self, block: int, states: list[State]) -> None:
        self.drop(block)
        self._of_block[block] = states
        self.block_bytes += _num_bytes(states)

    def drop(self, block: int) -> None:
        self.block_bytes -= _num_bytes(self._of_block.pop(block, []))

    def export(self, block: int) -> dict[str, np.ndarray]:
        """A state's name says its layer, its place there and its type; bfloat16 as its bits."""
        states = self._of_block.get(block, [])
        return {
            _state_name(n, i, array): host_view(array).copy()
            for n, state in enumerate(states)
            for i, array in enumerate(state)
            if array is not None
        }

    def load(self, block: int, arrays: Mapping[str, np.ndarray]) -> bool:
        """Puts back what was exported; whether it was all there, so that a sequence can go on from the block's end."""
        states: list[State] = []
        for n, zeros in enumerate(self._zeros):
            found = [None if zero is None else arrays.get(_state_name(n, i, zero)) for i, zero in enumerate(zeros)]
            if any(array is None and zero is not None for array, zero in zip(found, zeros, strict=True)):
                return False
            pairs = zip(found, zeros, strict=True)
            states.append([None if a is None or zero is None else device_array(a, zero.dtype) for a, zero in pairs])
        self.save(block, states)
        return True


def _num_bytes(states: list[State]) -> int:
    return sum(a.nbytes for state in states for a in state if a is not None)


def host_view(array: mx.array) -> np.ndarray:
    """The memory of an array that has been computed, not a copy; NumPy has no bfloat16, so its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def device_array(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(array)


def state_arrays(caches: Items[ArraysCache]) -> list[mx.array]:
    """What these caches hold by now."""
    return [a for cache in caches for a in cache.cache if a is not None]


def _state_name(layer: int, place: int, array: mx.array) -> str:
    return f"state.{layer}.{place}.{_DTYPE_NAMES[array.dtype]}"


def _cache_of(state: State) -> ArraysCache:
    """A cache that goes its own way from here; the arrays are shared, as nobody changes them."""
    cache = ArraysCache(len(state))
    cache.cache = list(state)
    return cache


class _Probe(WatchingCache):
    """Sees what one token of one layer is like."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.kept: list[KeysValues] = []
        self.offset = 0
        self.num_query_heads: int | None = None
        self.has_sinks = False

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        self.kept.append((keys, values))
        self.offset += keys.shape[2]
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any):
        return prefill_mask(N, 0, window_size or self.window, return_array)

    def watch(self, queries: mx.array, keys: mx.array, values: mx.array, sinks: mx.array | None) -> None:
        are_kept = keys is self.kept[-1][0] and values is self.kept[-1][1]
        is_plain = queries.dtype == keys.dtype == values.dtype and queries.shape[3] == keys.shape[3]
        self.num_query_heads = queries.shape[1] if are_kept and is_plain else None
        self.has_sinks = sinks is not None


def _probe(kind: Any) -> Any:
    match type(kind).__name__:  # mlx-vlm has classes of the same names for the same things
        case "KVCache":
            return _Probe(None)
        case "RotatingKVCache" if kind.keep == 0:
            return _Probe(kind.max_size)
        case _ if type(kind) is ArraysCache:
            return kind
        case name:
            raise UnsupportedCache(f"its layers keep a {name}")
