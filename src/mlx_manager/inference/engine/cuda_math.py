"""Rotary positions for MLX's CUDA backend, which gives a group of its kernel up to 1,024 threads, but the last side of a group may have
64 at most: where few dimensions of a head are turned, and every token is a row, 128 rows and more fail ("invalid argument")."""
# pyright: basic

from typing import Any

import mlx.core as mx

_MOST_THREADS_LOG2 = 10
_MOST_LAST_LOG2 = 6
_HEADS_A_THREAD = 4


def rope(original: Any) -> Any:
    """`mx.fast.rope` in parts, where CUDA's would fail at once, in place of the `original`: x [B, H, L, D]."""

    def rotated(x: mx.array, dims: int, *, offset: Any, **others: Any) -> mx.array:
        rows = most_rows(x.shape, dims)
        if rows is None or x.shape[0] <= rows:
            return original(x, dims, offset=offset, **others)
        starts = range(0, x.shape[0], rows)
        offsets = [
            offset[i : i + rows] if isinstance(offset, mx.array) and offset.ndim == 1 and offset.size > 1 else offset for i in starts
        ]
        return mx.concatenate([original(x[i : i + rows], dims, offset=own, **others) for i, own in zip(starts, offsets, strict=True)])

    return rotated


def most_rows(shape: tuple[int, ...], dims: int) -> int | None:
    """So many rows of x [B, H, L, D] at once; None: any number."""
    if len(shape) != 4:
        return None
    _, heads, length, _ = shape
    others = (dims // 2).bit_length() - 1 + length.bit_length() - 1
    if _MOST_THREADS_LOG2 - others <= _MOST_LAST_LOG2:
        return None
    return max(1, (2 ** (_MOST_LAST_LOG2 + 1) - 1) // -(-heads // _HEADS_A_THREAD))
