"""What was asked, what was observed, and what may be said about it. Values and arithmetic; no I/O.

Every observation is kept; figures are computed from them when somebody looks. Times are seconds. Three rules hold throughout:

- Tokens are the server's own `usage`. A stream event may hold several tokens or half of one, so counting events counts nothing;
  only where a server sends no usage are events counted, and `Figures.counted_by` says so.
- A request that failed adds no tokens and no latencies. Its time stays in the wall clock: failing fast is not being fast.
- A ratio is taken between cells of the same repeat, which ran one after the other on the same machine in the same minute, and
  is the median of those pairs with their lowest and highest. Two medians from different minutes are never divided.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Literal, assert_never
from urllib.parse import urlsplit

from mlx_manager.bench.machine import Machine
from mlx_manager.bench.prompts import Prefix

Metric = Literal["output_tok_s", "ttft_p50", "gap_p95"]


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load. `url` is its root ("http://127.0.0.1:8000") or what OpenAI clients call the base URL (".../v1").

    The key is in no comparison, no repr and no report. `flags` is how the server was started, for the reader of the report.
    """

    name: str
    url: str
    model: str
    api_key: str | None = field(default=None, repr=False, compare=False)
    flags: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"target {self.name}: the URL must be http://host or https://host")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"target {self.name}: a URL with credentials would be printed in reports; give an api_key")

    @property
    def chat_url(self) -> str:
        path = urlsplit(self.url).path.rstrip("/")
        return self.url.rstrip("/") + ("/chat/completions" if path else "/v1/chat/completions")


@dataclass(frozen=True, slots=True)
class Workload:
    """What one cell sends: `requests` requests by `concurrency` workers, each sending its next when its last has ended.

    `prompt_tokens` is what is aimed at; what was hit is in the figures. `prompts`, if given, are sent as they are, in turn, in
    place of generated ones (`prompt_tokens` and `prefix` then describe nothing). `primed` sends one request ahead, unmeasured,
    so that a "shared" prefix is already cached; without it the cell opens with a burst that nobody has seen before.
    """

    prompt_tokens: int
    max_tokens: int
    concurrency: int
    requests: int
    prefix: Prefix = "unique"
    temperature: float = 0.0
    prompts: tuple[str, ...] = ()
    primed: bool = False

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.max_tokens, self.concurrency, self.requests) < 1:
            raise ValueError("prompt_tokens, max_tokens, concurrency and requests are 1 or more")

    @property
    def shape(self) -> "Workload":
        """The same work one at a time: workloads that differ only in how much of it is in flight have the same shape."""
        return replace(self, concurrency=1, requests=1)


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


@dataclass(frozen=True, slots=True)
class Cell:
    """One target under one workload, once."""

    target: str
    workload: Workload
    repeat: int
    wall_s: float
    """From the first request sent to the last one ended."""
    samples: tuple[Sample, ...]

    @property
    def completed(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.error is None]

    @property
    def output_tok_s(self) -> float | None:
        """None if no request completed: no throughput was measured, which is not a throughput of zero."""
        num_tokens = sum(sample.num_output_tokens for sample in self.completed)
        return num_tokens / self.wall_s if num_tokens and self.wall_s > 0 else None

    @property
    def requests_s(self) -> float | None:
        return len(self.completed) / self.wall_s if self.completed and self.wall_s > 0 else None

    @property
    def ttft_s(self) -> Spread | None:
        return Spread.of(_ttfts_s(self.completed))

    @property
    def gap_s(self) -> Spread | None:
        """Between content events of one stream as they arrive here. Not "per token": how many tokens an event holds cannot be
        known from outside, so a server that sends two tokens at a time has gaps twice as long at the same speed. Events that
        arrive in one read have no gap between them."""
        return Spread.of(_gaps_s(self.completed))

    def value(self, metric: Metric) -> float | None:
        match metric:
            case "output_tok_s":
                return self.output_tok_s
            case "ttft_p50":
                return None if self.ttft_s is None else self.ttft_s.p50
            case "gap_p95":
                return None if self.gap_s is None else self.gap_s.p95
            case _:
                assert_never(metric)


@dataclass(frozen=True, slots=True)
class Figures:
    """One target under one workload over all repeats: rates a repeat, latencies of all samples together."""

    output_tok_s: Range | None
    requests_s: Range | None
    ttft_s: Spread | None
    gap_s: Spread | None
    speed_up: Range | None
    """Output tok/s over that of the same target and shape at concurrency 1; None if that was not measured."""
    num_completed: int
    num_failed: int
    num_unsent: int
    """Requests that the time limit left no time to send."""
    prompt_tokens: float | None
    """Mean as the server counted them; None if it sends no usage. So are the next two."""
    output_tokens: float | None
    cached_part: float | None
    """Of the prompt tokens, 0 to 1."""
    counted_by: Literal["usage", "events"]


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one comparison saw. The first target is the subject, the others are what it is compared with."""

    targets: tuple[Target, ...]
    workloads: tuple[Workload, ...]
    repeats: int
    seed: int
    cells: tuple[Cell, ...]
    """In the order in which they ran."""
    machine: Machine
    started_at: str
    """ISO 8601, UTC."""
    stopped: str | None = None
    """Why cells are missing; None if all ran."""

    @property
    def shapes(self) -> list[Workload]:
        return list(dict.fromkeys(workload.shape for workload in self.workloads))

    def of_shape(self, shape: Workload) -> list[Workload]:
        return sorted((w for w in self.workloads if w.shape == shape), key=lambda workload: workload.concurrency)

    def cells_of(self, target: Target, workload: Workload) -> dict[int, Cell]:
        """By repeat."""
        return {cell.repeat: cell for cell in self.cells if cell.target == target.name and cell.workload == workload}

    def figures(self, target: Target, workload: Workload) -> Figures:
        cells = list(self.cells_of(target, workload).values())
        samples = [sample for cell in cells for sample in cell.completed]
        usages = [sample.usage for sample in samples if sample.usage is not None]
        num_sent = sum(len(cell.samples) for cell in cells)
        num_prompt = sum(usage.prompt_tokens for usage in usages)
        cached = [usage.cached_tokens for usage in usages if usage.cached_tokens is not None]
        return Figures(
            output_tok_s=Range.of([rate for cell in cells if (rate := cell.output_tok_s) is not None]),
            requests_s=Range.of([rate for cell in cells if (rate := cell.requests_s) is not None]),
            ttft_s=Spread.of(_ttfts_s(samples)),
            gap_s=Spread.of(_gaps_s(samples)),
            speed_up=self.speed_up(target, workload),
            num_completed=len(samples),
            num_failed=num_sent - len(samples),
            num_unsent=len(cells) * workload.requests - num_sent,
            prompt_tokens=fmean(usage.prompt_tokens for usage in usages) if usages else None,
            output_tokens=fmean(usage.completion_tokens for usage in usages) if usages else None,
            cached_part=sum(cached) / num_prompt if cached and num_prompt else None,
            counted_by="usage" if len(usages) == len(samples) else "events",
        )

    def speed_up(self, target: Target, workload: Workload) -> Range | None:
        alone = next((w for w in self.of_shape(workload.shape) if w.concurrency == 1), None)
        if alone is None:
            return None
        return _ratio(self.cells_of(target, workload), self.cells_of(target, alone), "output_tok_s")

    def ratio(self, subject: Target, peer: Target, workload: Workload, metric: Metric) -> Range | None:
        """How many times better the subject is, above 1 meaning better for every metric: rates are divided by the peer's,
        the peer's durations by the subject's. None if no repeat has both."""
        return _ratio(self.cells_of(subject, workload), self.cells_of(peer, workload), metric)

    def errors(self, target: Target) -> Counter[str]:
        return Counter(s.error for cell in self.cells if cell.target == target.name for s in cell.samples if s.error is not None)


def _ratio(subject: dict[int, Cell], peer: dict[int, Cell], metric: Metric) -> Range | None:
    pairs = ((subject[repeat].value(metric), peer[repeat].value(metric)) for repeat in subject if repeat in peer)
    more_is_better = metric == "output_tok_s"
    return Range.of([(ours / theirs if more_is_better else theirs / ours) for ours, theirs in pairs if ours and theirs])


def _ttfts_s(samples: Iterable[Sample]) -> list[float]:
    return [sample.ttft_s for sample in samples if sample.ttft_s is not None]


def _gaps_s(samples: Iterable[Sample]) -> list[float]:
    return [gap for sample in samples for gap in sample.gaps_s]


def _percentile(ordered: Sequence[float], part: float) -> float:
    position = part * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
