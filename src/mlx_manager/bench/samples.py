"""What was observed of one request, and where many such observations lie. Values and arithmetic; no I/O. Times are seconds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    """Of the prompt, answered from a cache; None if the server does not say."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. `start_s` counts from the cell's start, `events_s` (arrivals of content events) and `end_s` from `start_s`."""

    start_s: float
    events_s: tuple[float, ...]
    end_s: float
    usage: Usage | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.events_s[0] if self.events_s else None

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.events_s)]

    @property
    def num_output_tokens(self) -> int:
        return len(self.events_s) if self.usage is None else self.usage.completion_tokens


@dataclass(frozen=True, slots=True)
class Spread:
    """Where samples lie. Percentiles are interpolated between the two nearest samples."""

    p50: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        ordered = sorted(values)
        return cls(_percentile(ordered, 0.5), _percentile(ordered, 0.95), ordered[-1]) if ordered else None


@dataclass(frozen=True, slots=True)
class Range:
    """One value a repeat: their median, lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Range | None":
        return cls(median(values), min(values), max(values)) if values else None


def ttfts_s(samples: Iterable[Sample]) -> list[float]:
    return [sample.ttft_s for sample in samples if sample.ttft_s is not None]


def gaps_s(samples: Iterable[Sample]) -> list[float]:
    return [gap for sample in samples for gap in sample.gaps_s]


def _percentile(ordered: Sequence[float], part: float) -> float:
    position = part * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
