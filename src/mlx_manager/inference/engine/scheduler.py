"""Who computes what in the next step. No tensors: decisions only, so that they can be tested in microseconds.

There is no prefill phase and no decode phase: a sequence has tokens still to be computed, and the scheduler hands out a
budget of them until there are none.
"""

import time
from collections import deque
from dataclasses import dataclass

from mlx_manager.inference.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens [start, stop) of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass for all of `decode` together, and one for each chunk of `prefill`."""

    decode: tuple[Sequence, ...]
    prefill: tuple[Chunk, ...]


class Scheduler:
    """First come, first served, at most `max_sequences` at a time, at most `prefill_budget` prompt tokens a step."""

    def __init__(self, *, max_sequences: int, prefill_budget: int) -> None:
        self.max_sequences = max_sequences
        self.prefill_budget = prefill_budget
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence wherever it is; its place is free for the next plan."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def plan(self) -> Plan:
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting.popleft()
            sequence.admitted = time.monotonic()
            self.running.append(sequence)
        budget = self.prefill_budget
        chunks: list[Chunk] = []
        for sequence in self.running:
            count = min(budget, sequence.num_prefill_left)
            if count > 0:
                chunks.append(Chunk(sequence, sequence.num_computed, sequence.num_computed + count))
                budget -= count
            if budget == 0:
                break
        return Plan(decode=tuple(s for s in self.running if s.wants_decode), prefill=tuple(chunks))
