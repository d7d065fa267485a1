"""How models of mlx-lm attend through caches of ours, without a line of them changed.

A model hands its cache to `scaled_dot_product_attention` of `mlx_lm.models.base`. That one name is rebound, there and in every model
module that has imported it: a cache that knows how to attend does so itself, all others get what mlx-lm does.
"""
# pyright: basic

import sys
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

_NAME = "scaled_dot_product_attention"
_mlx_lm_attention = base.scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Sight:
    """Stands for a mask: a token sees itself and those before it, with a `window` as many as that together."""

    window: int | None


class AttendingCache:
    """Base of the caches that attend themselves; a plain `isinstance` is what each layer of each step can afford."""

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """Queries and result [B, Hq, L, D]. `mask` is what `make_mask` returned, or None if the model did not ask."""
        raise NotImplementedError


class WatchingCache:
    """Base of caches that are told how a model attends, which is left to mlx-lm."""

    def watch(self, queries: mx.array, keys: mx.array, values: mx.array, sinks: mx.array | None) -> None:
        raise NotImplementedError


def _attention(queries, keys, values, cache, scale, mask, sinks=None) -> mx.array:
    if isinstance(cache, AttendingCache):
        return cache.attend(queries, scale, mask, sinks)
    if isinstance(cache, WatchingCache):
        cache.watch(queries, keys, values, sinks)
    return _mlx_lm_attention(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


def install() -> None:
    """Rebinds the name wherever it has been imported. Call it once a model's module is there; again for the next."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, _NAME, None) is _mlx_lm_attention:
            setattr(module, _NAME, _attention)
