"""The next token of every row, in one graph, whatever each row asked for.

Randomness comes from the request's seed and the token's position alone (`key`), so a seeded request draws the same
numbers in any batch. Each token of the vocabulary has a number of its own in a race that the most probable wins most often: where the
sums of another batch round differently, only two that come in at the same time can change places. Top-k, top-p and min-p each cut the
distribution at a probability; the cuts are found by bisection, so nothing is sorted. Order: logit bias, penalties, temperature, min-p,
top-k, top-p (of what top-k left).
"""
# pyright: basic

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_manager.inference.engine import cpu_math
from mlx_manager.inference.engine.sequence import Sequence, TokenSampling

_MASK = 2**64 - 1
# Halvings of [0, 1]: the cut is found to 2^-32 of the likeliest token's probability, finer than float32 tells apart.
_BISECTIONS = 32
# Half of the smallest step of 32 bits: draws are in [0, 1), and 0 would come before all others, whatever its weight.
_SMALLEST_DRAW = 2.0**-33
# Below this a draw is the likeliest token to the last bit of float32, and dividing by less overflows.
_COLDEST = 1e-6
_NOBODY = TokenSampling(seed=0, temperature=0.0)


def key(seed: int, position: int) -> tuple[int, int]:
    """A key of MLX's generator, two times 32 bits, that depends on both arguments and on nothing else (SplitMix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z >> 32, z & 0xFFFFFFFF


@dataclass(slots=True)
class Sampled:
    """Queued results for B rows: `tokens` [B]; where any row asked, `logprobs` [B] of the chosen tokens and the
    `top_tokens` and `top_logprobs` [B, K], unordered."""

    tokens: mx.array
    logprobs: mx.array | None = None
    top_tokens: mx.array | None = None
    top_logprobs: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.tokens, self.logprobs, self.top_tokens, self.top_logprobs) if a is not None]


class Sampler:
    """The sampling parameters of the batch as arrays, one row a sequence. Owned by the device thread."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: list[Sequence | None] = []
        # Both [B, V], and both there only while a row has a penalty: whether a token is in the prompt, and how often it was
        # generated, unread steps included.
        self._in_prompt: mx.array | None = None
        self._counts: mx.array | None = None
        self._describe()

    def set_rows(self, rows: Rows[Sequence | None]) -> None:
        """Who is in which row from now on (None: nobody). Newcomers have generated nothing that is not read."""
        at = {s: i for i, s in enumerate(self._rows) if s is not None}
        self._rows = list(rows)
        if not any(s is not None and s.spec.sampling.penalises for s in rows):
            self._counts = self._in_prompt = None
        else:
            # Rows that were here before while nobody had a penalty have none: their counts are never looked at.
            counts, in_prompt = self._history([None if s in at else s for s in rows])
            if self._counts is not None and self._in_prompt is not None:
                index = mx.array([0 if s is None else at.get(s, 0) for s in rows], dtype=mx.int32)
                stays = mx.array([[s in at] for s in rows])
                counts = mx.where(stays, self._counts[index], counts)
                in_prompt = mx.where(stays, self._in_prompt[index], in_prompt)
            self._counts, self._in_prompt = counts, in_prompt
        self._describe()

    def _history(self, rows: Rows[Sequence | None]) -> tuple[mx.array, mx.array]:
        counts = np.zeros((len(rows), self._vocab_size), np.float32)
        in_prompt = np.zeros((len(rows), self._vocab_size), np.bool_)
        for i, s in enumerate(rows):
            if s is not None:
                in_prompt[i, [t for t in s.spec.prompt if t < self._vocab_size]] = True
                np.add.at(counts[i], s.generated, 1)
        return mx.array(counts), mx.array(in_prompt.view(np.uint8)).astype(mx.bool_)

    def _describe(self) -> None:
        params = [_NOBODY if s is None else s.spec.sampling for s in self._rows]

        def column(values: list[float]) -> mx.array:
            return mx.array(np.asarray(values, np.float32)[:, None])

        self._greedy = mx.array([p.temperature == 0 for p in params])
        self._all_greedy = all(p.temperature == 0 for p in params)
        self._filters = any(p.filters for p in params)
        self._temperature = column([max(p.temperature, _COLDEST) for p in params])
        self._min_p = column([p.min_p for p in params])
        self._top_k = column([p.top_k if p.top_k > 0 else self._vocab_size for p in params])
        self._top_p = column([p.top_p for p in params])
        self._repetition = column([p.repetition_penalty for p in params])
        self._presence = column([p.presence_penalty for p in params])
        self._frequency = column([p.frequency_penalty for p in params])
        self._bias: mx.array | None = None
        if any(p.logit_bias for p in params):
            bias = np.zeros((len(params), self._vocab_size), np.float32)
            for i, p in enumerate(params):
                bias[i, list(p.logit_bias)] = list(p.logit_bias.values())
            self._bias = mx.array(bias)
        wanted = [s.spec.num_top_logprobs for s in self._rows if s is not None and s.spec.num_top_logprobs is not None]
        self._num_top = max(wanted) if wanted else None

    def sample(self, logits: mx.array, masks: Rows[bytes | None] = ()) -> Sampled:
        """`logits` [B, V], one row a sequence in order; each sequence's `num_sampled` is the position to draw for. A row's mask has
        a bit for each token that may come (`Constraint.mask`)."""
        raw = logits.astype(mx.float32)
        logits = self._penalised(raw if self._bias is None else raw + self._bias)
        if any(mask is not None for mask in masks):
            logits = mx.where(self._allowed(masks), logits, -mx.inf)
        tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
        if not self._all_greedy:
            keys = [(0, 0) if s is None else key(s.spec.sampling.seed, s.num_sampled) for s in self._rows]
            tokens = mx.where(self._greedy, tokens, self._drawn(logits, mx.array(np.asarray(keys, np.uint32))))
        if self._counts is not None:
            self._counts = self._counts.at[mx.arange(len(self._rows)), tokens].add(1.0)
        return self._with_logprobs(raw, tokens)

    def _allowed(self, masks: Rows[bytes | None]) -> mx.array:
        allowed = np.ones((len(masks), self._vocab_size), np.uint8)
        for i, mask in enumerate(masks):
            if mask is not None:
                allowed[i] = np.unpackbits(np.frombuffer(mask, np.uint8), count=self._vocab_size, bitorder="little")
        return mx.array(allowed).astype(mx.bool_)

    def _penalised(self, logits: mx.array) -> mx.array:
        if self._counts is None or self._in_prompt is None:
            return logits
        generated = self._counts > 0
        rescaled = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
        logits = mx.where(generated | self._in_prompt, rescaled, logits)
        return logits - self._frequency * self._counts - self._presence * generated

    def _drawn(self, logits: mx.array, keys: mx.array) -> mx.array:
        """One token a row, by the weights. The time that a token takes to come is exponential, and its mean the inverse of its weight: the
        first to come is each of them as often as its share of the weights says."""
        weights = cpu_math.weights(logits / self._temperature)  # the likeliest token weighs 1
        if self._filters:
            weights = self._filtered(weights)
        draws = mx.vmap(lambda key: mx.random.uniform(shape=(logits.shape[1],), key=key))(keys) + _SMALLEST_DRAW
        return mx.argmax(weights / -mx.log1p(-draws), axis=-1).astype(mx.int32)

    def _filtered(self, weights: mx.array) -> mx.array:
        weights = mx.where(weights >= self._min_p, weights, 0.0)
        in_top_k = weights >= _cut(lambda cut: mx.sum(weights >= cut, axis=-1, keepdims=True) >= self._top_k, weights)
        weights = mx.where(in_top_k, weights, 0.0)
        wanted = self._top_p * mx.sum(weights, axis=-1, keepdims=True)
        in_top_p = weights >= _cut(lambda cut: mx.sum(mx.where(weights >= cut, weights, 0.0), axis=-1, keepdims=True) >= wanted, weights)
        # Rounding must not shave the tail off a row that asked for all of it.
        return mx.where(in_top_p | (self._top_p >= 1.0), weights, 0.0)

    def _with_logprobs(self, raw: mx.array, tokens: mx.array) -> Sampled:
        if self._num_top is None:
            return Sampled(tokens)
        logprobs = raw - mx.logsumexp(raw, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        if self._num_top == 0:
            return Sampled(tokens, chosen)
        k = min(self._num_top, raw.shape[-1])
        top = mx.argpartition(-logprobs, kth=k - 1, axis=-1)[:, :k]
        return Sampled(tokens, chosen, top, mx.take_along_axis(logprobs, top, axis=-1))


def _cut(keeps_enough, weights: mx.array) -> mx.array:
    """The largest cut [B, 1] in [0, 1] of which `keeps_enough(cut)` is true, to within 2^-32; it is true of 0."""
    low = mx.zeros((weights.shape[0], 1))
    high = mx.full((weights.shape[0], 1), 1.0 + 2**-20)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = keeps_enough(middle)
        low, high = mx.where(enough, middle, low), mx.where(enough, high, middle)
    return mx.minimum(low, 1.0)  # the likeliest token always stays, even with a top-p of 0
