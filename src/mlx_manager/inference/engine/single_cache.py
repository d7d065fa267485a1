"""The caches that mlx-lm itself keeps for a model, for one sequence at a time: where a model keeps something that cannot be shared.

Never wrong and never refused, only slower: nobody decodes beside another. A prefix is reused by a copy of the caches as they were at
the end of a chunk; the arrays of a copy are shared until one of the two changes them.
"""
# pyright: basic

import copy
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.cache_layout import prompt_inputs
from mlx_manager.inference.engine.scheduler import Chunk
from mlx_manager.inference.engine.sequence import Sequence

_ROOM = 256  # tokens for which mlx-lm makes room at once


@dataclass(slots=True)
class QueuedPass:
    """What has to be computed, and the caches as they will be then, where a block ends there."""

    made: list[mx.array]
    caches: list[Any] | None = None
    logits = None  # no chunk of these samples

    def arrays(self) -> list[mx.array]:
        return self.made

    def layers(self) -> list[list[mx.array]]:
        return []


class SingleCache:
    """Owned by the device thread."""

    name = "single"
    max_rows: int | None = 1
    pads_rows = False
    takes_unread = keeps_tails = False
    needs_states = True
    host_bytes = 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: dict[Sequence, list[Any]] = {}
        self._rows: list[Sequence] = []
        self._blocks: dict[int, list[Any]] = {}
        self.state_bytes = 0
        probe = make_prompt_cache(model)
        mx.eval(model(mx.array([[0]], dtype=mx.int32), cache=probe))
        self.token_bytes = max(1, _num_bytes(probe) // _ROOM)

    @property
    def allocated_bytes(self) -> int:
        return sum(map(_num_bytes, self._caches.values())) + self.state_bytes

    def admit(self, sequence: Sequence) -> None:
        num_blocks = sequence.num_computed // BLOCK_TOKENS
        kept = self._blocks[sequence.table[num_blocks - 1]] if num_blocks else None
        self._caches[sequence] = make_prompt_cache(self._model) if kept is None else copy.deepcopy(kept)

    def fork(self, child: Sequence, parent: Sequence, source: int | None, target: int | None) -> None:
        self._caches[child] = copy.deepcopy(self._caches[parent])

    def forget(self, sequence: Sequence) -> None:
        self._caches.pop(sequence, None)

    def clear(self) -> None:
        self._rows = []

    def prefill(self, chunks: Items[Chunk]) -> list[QueuedPass]:
        """Queues stretches of prompts, one after the other; no logits are computed."""
        return [self._prefill(chunk.sequence, chunk.start, chunk.stop) for chunk in chunks]

    def _prefill(self, sequence: Sequence, start: int, stop: int) -> QueuedPass:
        caches = self._caches[sequence]
        self._model(prompt_inputs(self._model, sequence, start, stop), cache=caches)
        made = [a for cache in caches for a in _arrays(cache)]
        return QueuedPass(made, copy.deepcopy(caches) if stop % BLOCK_TOKENS == 0 else None)

    def arrange(self, wanted: Items[Sequence], awaited: set[Sequence]) -> list[Sequence | None]:
        assert len(wanted) <= 1, "this cache holds one row"
        self._rows = list(wanted)
        return list(wanted)

    def forward(self, inputs: mx.array, chunks: Items[Chunk] = ()) -> tuple[mx.array, QueuedPass, list[QueuedPass]]:
        sequence = self._rows[0]
        caches = self._caches[sequence]
        given = self._model.after_pictures(sequence, inputs[:, None]) if sequence.spec.pictures else inputs[:, None]
        logits = self._model(given, cache=caches)[:, -1, :]
        return logits, QueuedPass([a for cache in caches for a in _arrays(cache)]), self.prefill(chunks)

    def settle(self, step: QueuedPass) -> None:
        """The caches hold it already."""

    def save(self, sequence: Sequence, index: int, block: int, chunk: QueuedPass | None) -> None:
        if chunk is not None and chunk.caches is not None:
            self.drop(block)
            self._blocks[block] = chunk.caches
            self.state_bytes += _num_bytes(chunk.caches)

    def drop(self, block: int) -> None:
        self.state_bytes -= _num_bytes(self._blocks.pop(block, []))

    def export(self, block: int) -> None:
        """What these caches are made of is theirs to know."""

    def load(self, block: int, arrays: Mapping[str, np.ndarray]) -> bool:
        raise ValueError("nothing is exported")


def _arrays(cache: Any) -> list[mx.array]:
    return [a for _, a in tree_flatten(cache.state) if isinstance(a, mx.array)]


def _num_bytes(caches: list[Any]) -> int:
    return sum(a.nbytes for cache in caches for a in _arrays(cache))
