"""Exponentials for MLX's CPU backend, where each of its own calls the C library: at 19 ns apiece they took more of a small model's pass
than its matrix products. Here they are sums and products that a compiler makes vectors of: a seventh of the time, and closer to exact
(8e-8 of the value; MLX's `exp` is off by up to 4e-6). float32 only. The polynomial is that of Cephes' `expf`.

And rotary positions, whose angles are the same in all layers of a pass: MLX computes them anew for the queries and the keys of each.
"""
# pyright: basic

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

import mlx.core as mx

# Below this many numbers describing more operations takes longer than their exponentials.
_FEWEST = 4096
_LOWEST, _HIGHEST = -87.0, 88.0  # beyond, float32 has no exponentials that are normal numbers


def pays(num_exponentials: int, *arrays: mx.array) -> bool:
    """Whether this is the place for it."""
    if num_exponentials < _FEWEST or mx.default_device().type != mx.DeviceType.cpu:
        return False
    return all(array.dtype == mx.float32 for array in arrays)


def softmax(scores: mx.array) -> mx.array:
    """Along the last axis; minus infinity weighs nothing."""
    if not pays(scores.size, scores):
        return mx.softmax(scores, axis=-1, precise=True)
    found = weights(scores)
    return _quotient(found, mx.sum(found, axis=-1, keepdims=True))


def weights(scores: mx.array) -> mx.array:
    """The same before it is divided by its sum: the greatest is 1."""
    greatest = mx.max(scores, axis=-1, keepdims=True)
    if not pays(scores.size, scores):
        return mx.exp(scores - greatest)
    fraction, bits = _below(scores, greatest)
    return _weights(fraction, bits.view(mx.float32))


def swiglu(original: Any) -> Any:
    """silu(gate) * x, in place of the `original`."""

    def activation(gate: mx.array, x: mx.array) -> mx.array:
        if not pays(gate.size, gate, x):
            return original(gate, x)
        fraction, bits = _negative(gate)
        return _gated(gate, x, fraction, bits.view(mx.float32))

    return activation


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`: queries [B, Hq, L, D], keys and values [B, H, S, D]."""
    (num_rows, num_queries, length, _), (num_heads, num_keys) = queries.shape, keys.shape[1:3]
    shared_by = num_queries // num_heads
    if sinks is not None or not pays(num_rows * num_queries * length * num_keys, queries, keys, values):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    queries = (queries * scale).reshape(num_rows, num_heads, shared_by, length, -1)
    scores = queries @ keys[:, :, None].swapaxes(-1, -2)
    if isinstance(mask, str):
        at = mx.arange(num_keys)
        mask = at <= at[num_keys - length :, None]
    if mask is not None:
        if mask.ndim > 2 and mask.shape[-3] != 1:
            mask = mask.reshape(*mask.shape[:-3], num_heads, shared_by, *mask.shape[-2:])
        elif mask.ndim > 2:
            mask = mask[..., None, :, :]
        scores = scores + (mx.where(mask, 0.0, -mx.inf) if mask.dtype == mx.bool_ else mask)
    return (softmax(scores) @ values[:, :, None]).reshape(num_rows, num_queries, length, -1)


# Of the pass that is being described, by what they depend on; those arrays are kept, so that no other takes their identity.
_angles: dict[tuple[Any, ...], tuple[Any, ...]] | None = None


@contextmanager
def one_pass() -> Generator[None]:
    """Nobody changes an array of offsets within it."""
    global _angles  # noqa: PLW0603 - between the pass and the innermost of the model's modules there is only the model
    _angles = {}
    try:
        yield
    finally:
        _angles = None


def rope(original: Any) -> Any:
    """The same numbers as `mx.fast.rope`, to the bit, in place of the `original`: x [B, H, L, D], half of the operations."""

    def rotated(x: mx.array, dims: int, *, traditional: bool, base: float | None, scale: float, offset: Any, **others: Any) -> mx.array:
        is_whole = x.ndim == 4 and dims == x.shape[-1] and not traditional
        if _angles is None or not is_whole or x.dtype != mx.float32 or mx.default_device().type != mx.DeviceType.cpu:
            return original(x, dims, traditional=traditional, base=base, scale=scale, offset=offset, **others)
        freqs = others.get("freqs")
        key = x.shape[2], dims, base, scale, id(freqs), id(offset) if isinstance(offset, mx.array) else offset
        if key not in _angles:
            _angles[key] = *_rotation(x.shape[2], dims, base, scale, offset, freqs), offset, freqs
        cosines, sines, *_ = _angles[key]
        return x * cosines + mx.concatenate([x[..., dims // 2 :], x[..., : dims // 2]], axis=-1) * sines

    return rotated


def _rotation(
    length: int, dims: int, base: float | None, scale: float, offset: mx.array | int, freqs: mx.array | None
) -> tuple[mx.array, mx.array]:
    """What tokens are multiplied with, and what their halves are when they have changed places: both [..., L, D]."""
    first = mx.array(offset)
    positions = (mx.arange(length).astype(mx.float32) + (first[:, None, None] if first.size > 1 else first)) * scale
    if freqs is not None:
        turns = 1 / freqs
    else:
        assert base is not None, "one of them says how fast"
        turns = mx.exp(mx.arange(0, -(dims // 2), -1).astype(mx.float32) * (math.log(base) / (dims // 2)))
    angles = positions[..., None] * turns
    cosines, sines = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([cosines, cosines], axis=-1), mx.concatenate([-sines, sines], axis=-1)


def _exponential(x: mx.array) -> tuple[mx.array, mx.array]:
    """exp(x) as a product: a number near 1, and the bits of a power of two. It is the caller's to look at them as float32: no graph
    that is compiled for all shapes may."""
    x = mx.maximum(mx.minimum(x, _HIGHEST), _LOWEST)
    power = (x * 1.4426950408889634 + 127.5).astype(mx.int32)  # rounds, as nothing is negative
    n = power.astype(mx.float32) - 127.0
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts, of which the first has few digits
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    return p * r * r + r + 1.0, power << 23


class _Fused:
    """A function of arrays as one loop, once that has been compiled; until then operation by operation, which takes twice as long."""

    are_ready = False
    preparing: subprocess.Popen[bytes] | None = None

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.compiled = mx.compile(function, shapeless=True)

    def __call__(self, *arrays: mx.array) -> Any:
        if _Fused.preparing is not None and _Fused.preparing.poll() is not None:
            _Fused.are_ready = _Fused.preparing.returncode == 0
            _Fused.preparing = None
        return self.compiled(*arrays) if _Fused.are_ready else self._function(*arrays)


_negative = _Fused(lambda x: _exponential(-x))
_below = _Fused(lambda x, greatest: _exponential(x - greatest))
# What is next to nothing weighs nothing: numbers that small, times others, are so slow that they would take most of the time.
_weights = _Fused(lambda fraction, power: mx.maximum(fraction * power - 1e-30, 0.0))
_quotient = _Fused(lambda x, y: x / y)
_gated = _Fused(lambda gate, x, fraction, power: gate / (1.0 + fraction * power) * x)


def prepare() -> None:
    """Sees to it that the loops are compiled. MLX does that when they are first computed, with the C++ compiler of the machine, if it
    has one; it takes seconds, and leaves them in a temporary folder. So another process does it, at most once as long as that is there."""
    if _Fused.are_ready or _Fused.preparing is not None or mx.default_device().type != mx.DeviceType.cpu:
        return
    if _mark().exists():
        _Fused.are_ready = True
        return
    try:
        _Fused.preparing = subprocess.Popen(
            [sys.executable, "-m", __spec__.name], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except OSError:  # then not
        return


def _mark() -> Path:
    """Says, where MLX leaves what it compiles, that what stands here is among that."""
    return Path(tempfile.gettempdir(), "mlx", version("mlx"), "cpu", f"mlx-manager-{crc32(Path(__file__).read_bytes()):08x}")


def _compile() -> None:
    _Fused.are_ready = True
    numbers = mx.zeros((_FEWEST, 2))
    mx.eval(swiglu(None)(numbers, numbers), softmax(numbers), softmax(numbers[None, None, None]))
    with suppress(OSError):  # another MLX, which leaves things elsewhere
        _mark().touch()


if __name__ == "__main__":
    _compile()
