"""Plan → forward passes. Keeps the batch (who is in it, their caches, their next inputs) between steps."""
# pyright: basic

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from mlx_manager.inference.engine.kv_cache import BatchCache, LayerCaches
from mlx_manager.inference.engine.sampling import Sampled, Sampler
from mlx_manager.inference.engine.scheduler import Chunk
from mlx_manager.inference.engine.sequence import Sequence, Token


@dataclass(frozen=True, slots=True)
class Pending:
    """A decode step that is queued on the device and not yet read."""

    rows: tuple[Sequence, ...]
    sampled: Sampled


class Runner:
    """One model's forward passes. Owned by the device thread."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model = model
        self._cache = BatchCache(model)
        self._sampler = Sampler(vocab_size)
        self._rows: list[Sequence] = []
        self._inputs: mx.array | None = None  # [B] the next token of every row, perhaps still being computed
        self._prefilled: dict[Sequence, LayerCaches] = {}  # caches of sequences that have not joined yet

    @property
    def can_batch(self) -> bool:
        return self._cache.can_batch

    def prefill(self, chunk: Chunk) -> None:
        """Queues the keys and values of a stretch of a prompt; no logits are computed."""
        row = self._prefilled.get(chunk.sequence)
        if row is None:
            row = self._prefilled[chunk.sequence] = self._cache.new_row()
        tokens = mx.array([chunk.sequence.spec.prompt[chunk.start : chunk.stop]], dtype=mx.int32)
        self._model(tokens, cache=row)
        mx.async_eval([layer.state for layer in row])
        chunk.sequence.num_computed = chunk.stop

    def decode(self, rows: Rows[Sequence]) -> Pending:
        """Queues one token for each of `rows`, in one forward pass over exactly these."""
        self._set_rows(set(rows), rows)
        assert self._inputs is not None
        logits = self._model(self._inputs[:, None], cache=self._cache.layers)[:, -1, :]
        sampled = self._sampler.sample(logits)
        mx.async_eval(*sampled.arrays())
        self._inputs = sampled.tokens
        for sequence in self._rows:
            sequence.num_computed += 1
            sequence.num_sampled += 1
        return Pending(tuple(self._rows), sampled)

    def read(self, pending: Pending) -> list[Token]:
        """Waits for a queued step. One token for each of its rows."""
        sampled = pending.sampled
        mx.eval(*sampled.arrays())
        tokens = cast(list[int], sampled.tokens.tolist())
        if sampled.logprobs is None:
            return [Token(s.index, t) for s, t in zip(pending.rows, tokens, strict=True)]
        logprobs = cast(list[float], sampled.logprobs.tolist())
        top = _pairs(sampled, len(tokens))
        return [
            Token(s.index, t)
            if s.spec.num_top_logprobs is None
            else Token(s.index, t, logprobs[i], tuple(top[i][: s.spec.num_top_logprobs]))
            for i, (s, t) in enumerate(zip(pending.rows, tokens, strict=True))
        ]

    def forget(self, sequence: Sequence) -> None:
        """Drops what a sequence holds before it joined the batch; a row leaves the batch at the next decode."""
        self._prefilled.pop(sequence, None)

    def clear(self) -> None:
        """Empties the batch: nobody decodes any more. A pass that failed half-way may have left a row's cache without its row."""
        if self._rows or self._cache.layers:
            self._rows = []
            self._inputs = None
            self._cache.keep([])
            self._sampler.set_rows([], [])

    def _set_rows(self, wanted: set[Sequence], arriving: Rows[Sequence]) -> None:
        """Those who stay keep their order; newcomers go last, so that nobody's cache moves because of them."""
        keep = [i for i, s in enumerate(self._rows) if s in wanted]
        before = {self._rows[i] for i in keep}
        joined = [s for s in arriving if s not in before]
        if len(keep) == len(self._rows) and not joined:
            return
        if len(keep) < len(self._rows):
            self._cache.keep(keep)
        for sequence in joined:
            self._cache.join(self._prefilled.pop(sequence, None) or self._cache.new_row())
        fresh = mx.array([s.last_token for s in joined], dtype=mx.int32)
        kept = None if self._inputs is None else self._inputs[mx.array(keep, dtype=mx.int32)]
        self._inputs = fresh if kept is None else mx.concatenate([kept, fresh])
        self._sampler.set_rows(keep, joined)
        self._rows = [self._rows[i] for i in keep] + joined


def _pairs(sampled: Sampled, num_rows: int) -> list[list[tuple[int, float]]]:
    if sampled.top_tokens is None or sampled.top_logprobs is None:
        return [[] for _ in range(num_rows)]
    rows = zip(cast(list[list[int]], sampled.top_tokens.tolist()), cast(list[list[float]], sampled.top_logprobs.tolist()), strict=True)
    return [sorted(zip(tokens, logprobs, strict=True), key=lambda pair: -pair[1]) for tokens, logprobs in rows]
