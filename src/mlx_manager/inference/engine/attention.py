"""How models of mlx-lm and mlx-vlm attend through caches of ours, without a line of them changed.

A model hands its cache to the `scaled_dot_product_attention` of its package's `models.base`. That name is rebound, there and in every
model module that has imported it: a cache that knows how to attend does so itself, all others get what the package does. So are the
activation that most models have and MLX's rotary positions, for what computes on the CPU (`cpu_math`) or on CUDA (`cuda_math`).
"""
# pyright: basic

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_manager.inference.engine import cpu_math, cuda_math


@dataclass(frozen=True, slots=True)
class Sight:
    """Stands for a mask: a token sees itself and those before it, with a `window` as many as that together. Of a chunk's own tokens some
    may see each other `both_ways` [L, L]."""

    window: int | None
    both_ways: mx.array | None = None


class AttendingCache:
    """Base of the caches that attend themselves; a plain `isinstance` is what each layer of each step can afford."""

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """Queries and result [B, Hq, L, D]. `mask` is what `make_mask` returned, or None if the model did not ask."""
        raise NotImplementedError


class GivingCache:
    """Base of caches of ours that give keys and values to who attends."""


class WatchingCache:
    """Base of caches that are told how a model attends, which is left to its package."""

    def watch(self, queries: mx.array, keys: mx.array, values: mx.array, sinks: mx.array | None) -> None:
        raise NotImplementedError


def _attending(original: Any) -> Any:
    def attention(queries, keys, values, cache, scale, mask, sinks=None) -> mx.array:
        if isinstance(cache, AttendingCache):
            return cache.attend(queries, scale, mask, sinks)
        if isinstance(cache, GivingCache):
            return cpu_math.attention(queries, keys, values, scale, mask, sinks)
        if isinstance(cache, WatchingCache):
            cache.watch(queries, keys, values, sinks)
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    return attention


_ours: dict[Any, Any] = {}  # by what a package, or MLX, itself does


def install() -> None:
    """Rebinds the names wherever they have been imported. Call it once a model's module is there; again for the next."""
    cpu_math.prepare()
    if mx.fast.rope not in _ours.values():
        theirs = cuda_math.rope(mx.fast.rope) if mx.cuda.is_available() else mx.fast.rope
        mx.fast.rope = _ours.setdefault(mx.fast.rope, cpu_math.rope(theirs))
    for package in ("mlx_lm.models", "mlx_vlm.models"):
        _rebind(package, "base", "scaled_dot_product_attention", _attending)
        _rebind(package, "activations", "swiglu", cpu_math.swiglu)


def _rebind(package: str, home: str, name: str, replacing: Callable[[Any], Any]) -> None:
    original = getattr(sys.modules.get(f"{package}.{home}"), name, None)
    if original is None:
        return
    if original in _ours.values():
        original = next(theirs for theirs, ours in _ours.items() if ours is original)
    ours = _ours.setdefault(original, replacing(original))
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(f"{package}.") and getattr(module, name, None) is original:
            setattr(module, name, ours)
