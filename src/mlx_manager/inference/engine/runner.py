"""Plan → forward passes. Keeps the batch (who is in which row, and their next inputs) between steps."""
# pyright: basic

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.sampling import Sampled, Sampler
from mlx_manager.inference.engine.scheduler import Chunk, Plan
from mlx_manager.inference.engine.sequence import Sequence, Token


class Queued(Protocol):
    """A pass that a cache has queued."""

    def arrays(self) -> list[mx.array]:
        """What has to be computed for it."""
        ...

    def layers(self) -> list[list[mx.array]]:
        """What each layer makes on the way, if passes of others may come between two layers; else nothing."""
        ...


class QueuedPrompt(Queued, Protocol):
    """The same for a stretch of a prompt, with the `logits` [1, V] of its last token if it samples."""

    @property
    def logits(self) -> mx.array | None: ...


class Pictures(Protocol):
    """What knows where pictures stand: `PictureModel`."""

    def place(self, sequence: Sequence) -> None: ...
    def forget(self, sequence: Sequence) -> None: ...


class KVCache(Protocol):
    """Where keys and values are kept: `PagedCache`, `SlotCache`, `SingleCache`. All of it happens on the device thread.

    `max_rows` decode together at most (None: as many as there are places); `pads_rows`: rows cost as much as the longest of them;
    `takes_unread`: a row may come in while its prompt is still being computed; `keeps_tails`: what `save` is given may be less than a
    block, and a sequence may go on from it.
    """

    @property
    def name(self) -> str: ...
    @property
    def max_rows(self) -> int | None: ...
    @property
    def pads_rows(self) -> bool: ...
    @property
    def takes_unread(self) -> bool: ...
    @property
    def keeps_tails(self) -> bool: ...
    @property
    def needs_states(self) -> bool: ...
    @property
    def token_bytes(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def state_bytes(self) -> int: ...

    def admit(self, sequence: Sequence) -> None: ...
    def fork(self, child: Sequence, parent: Sequence, source: int | None, target: int | None) -> None: ...
    def forget(self, sequence: Sequence) -> None: ...
    def clear(self) -> None: ...
    def prefill(self, chunks: Rows[Chunk]) -> Rows[QueuedPrompt]: ...
    def arrange(self, wanted: Rows[Sequence], awaited: set[Sequence]) -> list[Sequence | None]: ...
    def forward(self, inputs: mx.array, chunks: Rows[Chunk] = ()) -> tuple[mx.array, Queued, Rows[QueuedPrompt]]: ...
    def settle(self, step: Any) -> None: ...
    def save(self, sequence: Sequence, index: int, block: int, chunk: Any) -> None: ...
    def drop(self, block: int) -> None: ...
    def export(self, block: int) -> Mapping[str, np.ndarray] | None: ...
    def load(self, block: int, arrays: Mapping[str, np.ndarray]) -> bool: ...


@dataclass(slots=True)
class Pending:
    """A step that is queued on the device and not yet read. `rows` (None: nobody wants what comes of it) and the positions whose keys
    and values it computes, with their `logits` [B, V], of which tokens are `sampled` at once or in `finish`; `chunks` with what they make,
    and the tokens that those of them sample which do: the `first` of their sequences.
    """

    rows: tuple[Sequence | None, ...] = ()
    positions: tuple[int, ...] = ()
    logits: mx.array | None = None
    step: Queued | None = None
    sampled: Sampled | None = None
    chunks: tuple[tuple[Chunk, QueuedPrompt], ...] = ()
    first: Sampled | None = None

    @property
    def sampling(self) -> tuple[Sequence | None, ...]:
        """Who gets a token: the rows, then those whose prompts end here."""
        return (*self.rows, *(chunk.sequence for chunk, _ in self.chunks if chunk.samples))

    def tokens(self) -> mx.array | None:
        """Theirs, in the same order."""
        made = [sampled.tokens for sampled in (self.sampled, self.first) if sampled is not None]
        return mx.concatenate(made) if len(made) > 1 else made[0] if made else None

    def layers(self) -> list[list[mx.array]]:
        """What is computed on the way to the parts, as far as it may be interrupted."""
        passes = [queued for _, queued in self.chunks] if self.step is None else [self.step, *(queued for _, queued in self.chunks)]
        return [arrays for queued in passes for arrays in queued.layers()]

    def parts(self) -> list[list[mx.array]]:
        """What has to be computed, in this order."""
        parts = [queued.arrays() for _, queued in self.chunks]
        if self.first is not None:
            parts.append(self.first.arrays())
        if self.logits is None or self.step is None:
            return parts
        made = [self.logits] if self.sampled is None else self.sampled.arrays()
        return [made + self.step.arrays(), *parts]


class Runner:
    """One model's forward passes. Owned by the device thread."""

    def __init__(self, cache: KVCache, vocab_size: int, pictures: "Pictures | None" = None) -> None:
        """`pictures` is there for a model that can be shown some."""
        self.cache = cache
        self._pictures = pictures
        self.takes_pictures = pictures is not None
        self.cache_name = cache.name
        self.block_bytes = cache.token_bytes * BLOCK_TOKENS
        self._sampler = Sampler(vocab_size)
        self._first_sampler = Sampler(vocab_size)  # of prompts that end
        self._rows: list[Sequence | None] = []
        self._inputs: mx.array | None = None  # [B] the next token of every row

    @property
    def allocated_bytes(self) -> int:
        return self.cache.allocated_bytes

    @property
    def host_bytes(self) -> int:
        """Of these, what MLX does not know of."""
        return self.cache.host_bytes

    @property
    def state_bytes(self) -> int:
        """Of what is kept for blocks beside keys and values."""
        return self.cache.state_bytes

    def queue(self, plan: Plan, unread: Pending | None = None) -> Pending:
        """Describes all passes of a plan; `start` has them computed. `unread`: the step before, if its tokens are not known yet."""
        for sequence in plan.preempted:
            self.cache.forget(sequence)
        for sequence in plan.admitted:
            self._place_pictures(sequence)
            self.cache.admit(sequence)
        for fork in plan.forks:
            self._place_pictures(fork.child)
            self.cache.fork(fork.child, fork.parent, fork.source, fork.target)
        if plan.decode:
            pending = self._decode(plan.decode, plan.prefill, unread)
        else:
            pending = Pending(chunks=tuple(zip(plan.prefill, self.cache.prefill(plan.prefill), strict=True)))
        for chunk in plan.prefill:
            chunk.sequence.num_queued = chunk.stop
        self._sample_first(pending)
        return pending

    def start(self, pending: Pending) -> None:
        """Queues what was described on the device. On the CPU this takes as long as computing it, without the
        interpreter's lock."""
        for arrays in pending.parts():
            mx.async_eval(arrays)

    def compute(self, pending: Pending) -> Iterator[None]:
        """The same on the CPU, with a stop after each layer in which another plan can be carried out, and read."""
        for arrays in pending.layers():
            mx.async_eval(arrays)
            yield
        self.start(pending)

    def finish(self, pending: Pending) -> None:
        """Samples what could not be until the step before had been read: where a row's last token decides which may come next, the
        forward pass does not wait for it, but the choice must."""
        if pending.logits is not None and pending.sampled is None:
            self._sample(pending)
            mx.async_eval(pending.parts()[0])

    def read(self, pending: Pending) -> list[Token | None]:
        """Waits for a queued step. One token for each of its rows that anybody waits for."""
        mx.eval(pending.parts())
        if pending.step is not None:
            self.cache.settle(pending.step)
        for sequence, position in zip(pending.rows, pending.positions, strict=True):
            if sequence is not None and sequence.table:  # not if it has been preempted since
                sequence.num_computed = position + 1
        for chunk, _ in pending.chunks:
            if chunk.sequence.table:
                chunk.sequence.num_computed = chunk.stop
        of_rows = [] if pending.sampled is None else _tokens(pending.rows, pending.sampled)
        return of_rows if pending.first is None else of_rows + _tokens(pending.sampling[len(pending.rows) :], pending.first)

    def save(self, sequence: Sequence, index: int, block: int, pending: Pending | None) -> None:
        """Block `index` of a sequence, computed by now, was published: others will come for it."""
        stop = (index + 1) * BLOCK_TOKENS
        chunks = () if pending is None else pending.chunks
        self.cache.save(sequence, index, block, next((q for c, q in chunks if c.sequence is sequence and c.stop == stop), None))

    def drop(self, block: int) -> None:
        """Nobody can find this block any more."""
        self.cache.drop(block)

    def export(self, block: int) -> Mapping[str, np.ndarray] | None:
        """A block's content for a file; None if it is nothing that a file could hold."""
        return self.cache.export(block)

    def load(self, block: int, arrays: Mapping[str, np.ndarray]) -> bool:
        """Puts back what was exported; whether a sequence can go on from its end. Raises `KeyError` and `ValueError` if it is not of
        this model."""
        return self.cache.load(block, arrays)

    def forget(self, sequence: Sequence) -> None:
        """Drops what a sequence holds; its row leaves the batch at the next decode."""
        self.cache.forget(sequence)
        if self._pictures is not None:
            self._pictures.forget(sequence)

    def clear(self) -> None:
        """Empties the batch: nobody decodes any more. A pass that failed half-way may have left a row's cache without its row."""
        self._rows = []
        self._inputs = None
        self.cache.clear()
        self._sampler.set_rows([])

    def _place_pictures(self, sequence: Sequence) -> None:
        if sequence.spec.pictures:
            assert self._pictures is not None, "the model was asked before"
            self._pictures.place(sequence)

    def _decode(self, wanted: Rows[Sequence], chunks: Rows[Chunk], before: Pending | None) -> Pending:
        """One token for each of `wanted`, in one forward pass, and beside them `chunks`."""
        self._set_rows(wanted, before)
        assert self._inputs is not None
        positions = tuple(0 if s is None else s.num_queued for s in self._rows)
        logits, step, made = self.cache.forward(self._inputs, chunks)
        pending = Pending(tuple(self._rows), positions, logits, step, chunks=tuple(zip(chunks, made, strict=True)))
        for sequence in wanted:
            sequence.num_queued += 1
        if not any(s.spec.constraint is not None and s.num_sampled > s.num_generated for s in wanted):
            self._sample(pending)
        return pending

    def _sample(self, pending: Pending) -> None:
        assert pending.logits is not None
        masks = [None if s is None or s.finished or s.spec.constraint is None else s.spec.constraint.mask() for s in pending.rows]
        pending.sampled = self._sampler.sample(pending.logits, masks)
        for sequence in pending.rows:
            if sequence is not None:
                sequence.num_sampled += 1

    def _sample_first(self, pending: Pending) -> None:
        logits = [queued.logits for chunk, queued in pending.chunks if chunk.samples and queued.logits is not None]
        if not logits:
            return
        sequences = [chunk.sequence for chunk, _ in pending.chunks if chunk.samples]
        self._first_sampler.set_rows(sequences)
        masks = [None if s.spec.constraint is None else s.spec.constraint.mask() for s in sequences]
        pending.first = self._first_sampler.sample(mx.concatenate(logits), masks)
        for sequence in sequences:
            sequence.num_sampled += 1

    def _set_rows(self, wanted: Rows[Sequence], before: Pending | None) -> None:
        under_way = () if before is None else before.sampling
        made = None if before is None else before.tokens()
        unread = {s: i for i, s in enumerate(under_way) if s is not None and not s.finished}
        rows = self.cache.arrange(wanted, set(unread))
        if rows != self._rows:
            self._sampler.set_rows(rows)
            self._rows = rows
        if made is not None and rows == list(under_way):
            self._inputs = made
            return
        # The token of a row under way is not known yet and stays on the device; everybody else's is.
        self._inputs = mx.array([0 if s is None or s in unread else s.last_token for s in rows], dtype=mx.int32)
        if made is not None and any(s in unread for s in rows):
            source = mx.array([0 if s is None else unread.get(s, 0) for s in rows], dtype=mx.int32)
            self._inputs = mx.where(mx.array([s in unread for s in rows]), made[source], self._inputs)


def _tokens(rows: Rows[Sequence | None], sampled: Sampled) -> list[Token | None]:
    tokens = cast(list[int], sampled.tokens.tolist())
    if sampled.logprobs is None:
        return [None if s is None else Token(s.index, t) for s, t in zip(rows, tokens, strict=True)]
    logprobs = cast(list[float], sampled.logprobs.tolist())
    top = _pairs(sampled, len(tokens))
    result: list[Token | None] = []
    for i, (s, token) in enumerate(zip(rows, tokens, strict=True)):
        if s is None or s.spec.num_top_logprobs is None:
            result.append(None if s is None else Token(s.index, token))
        else:
            result.append(Token(s.index, token, logprobs[i], tuple(top[i][: s.spec.num_top_logprobs])))
    return result


def _pairs(sampled: Sampled, num_rows: int) -> list[list[tuple[int, float]]]:
    if sampled.top_tokens is None or sampled.top_logprobs is None:
        return [[] for _ in range(num_rows)]
    rows = zip(cast(list[list[int]], sampled.top_tokens.tolist()), cast(list[list[float]], sampled.top_logprobs.tolist()), strict=True)
    return [sorted(zip(tokens, logprobs, strict=True), key=lambda pair: -pair[1]) for tokens, logprobs in rows]
