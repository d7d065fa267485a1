"""What was asked, what was observed, and what may be said about it. Values and arithmetic; no I/O.

Every observation is kept; figures are computed from them when somebody looks. Times are seconds. Three rules hold throughout:

- Tokens are the server's own `usage`. A stream event may hold several tokens or half of one, so counting events counts nothing;
  only where a server sends no usage are events counted, and `Figures.counted_by` says so.
- A request that failed adds no tokens and no latencies. Its time stays in the wall clock: failing fast is not being fast.
- A ratio is taken between cells of the same repeat, which ran one after the other on the same machine in the same minute, and
  is the median of those pairs with their lowest and highest. Two medians from different minutes are never divided.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal, assert_never
from urllib.parse import urlsplit

from mlx_manager.bench.machine import Machine
from mlx_manager.bench.prompts import Prefix
from mlx_manager.bench.samples import Range, Sample, Spread, gaps_s, ttfts_s
from mlx_manager.bench.scenarios import Scenario, Trial

Endpoint = Literal["chat/completions", "completions"]
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

    def url_of(self, endpoint: Endpoint) -> str:
        path = urlsplit(self.url).path.rstrip("/")
        return self.url.rstrip("/") + (f"/{endpoint}" if path else f"/v1/{endpoint}")


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
        return Spread.of(ttfts_s(self.completed))

    @property
    def gap_s(self) -> Spread | None:
        """Between content events of one stream as they arrive here. Not "per token": how many tokens an event holds cannot be
        known from outside, so a server that sends two tokens at a time has gaps twice as long at the same speed. Events that
        arrive in one read have no gap between them."""
        return Spread.of(gaps_s(self.completed))

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
class CeilingCell:
    """A workload without a server, once."""

    workload: Workload
    repeat: int
    output_tok_s: float


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
    scenarios: tuple[Scenario, ...] = ()
    trials: tuple[Trial, ...] = ()
    """In the order in which they ran."""
    ceiling: tuple[CeilingCell, ...] = ()

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
            ttft_s=Spread.of(ttfts_s(samples)),
            gap_s=Spread.of(gaps_s(samples)),
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

    def ceiling_tok_s(self, workload: Workload) -> Range | None:
        return Range.of([cell.output_tok_s for cell in self.ceiling if cell.workload == workload])

    def share_of_ceiling(self, target: Target, workload: Workload) -> Range | None:
        """Of what the machine gives without a server; None if that was not measured."""
        cells = self.cells_of(target, workload)
        pairs = (
            (cells[top.repeat].output_tok_s, top.output_tok_s) for top in self.ceiling if top.workload == workload and top.repeat in cells
        )
        return Range.of([ours / theirs for ours, theirs in pairs if ours and theirs])

    def trials_of(self, target: Target, scenario: Scenario) -> dict[int, Trial]:
        """By repeat."""
        return {trial.repeat: trial for trial in self.trials if trial.target == target.name and trial.scenario == scenario}

    def measured(self, target: Target, scenario: Scenario, measure: str) -> Range | None:
        """One value a repeat."""
        values = (trial.values()[measure] for trial in self.trials_of(target, scenario).values())
        return Range.of([value for value in values if value is not None])

    def scenario_ratio(self, subject: Target, peer: Target, scenario: Scenario, measure: str) -> Range | None:
        """The peer's value by the subject's: above 1 the subject is better. None if no repeat has both."""
        ours, theirs = self.trials_of(subject, scenario), self.trials_of(peer, scenario)
        pairs = ((ours[repeat].values()[measure], theirs[repeat].values()[measure]) for repeat in ours if repeat in theirs)
        return Range.of([high / low for low, high in pairs if low and high])

    def errors(self, target: Target) -> Counter[str]:
        return Counter(
            s.error for seen in (*self.cells, *self.trials) if seen.target == target.name for s in seen.samples if s.error is not None
        )


def _ratio(subject: dict[int, Cell], peer: dict[int, Cell], metric: Metric) -> Range | None:
    pairs = ((subject[repeat].value(metric), peer[repeat].value(metric)) for repeat in subject if repeat in peer)
    more_is_better = metric == "output_tok_s"
    return Range.of([(ours / theirs if more_is_better else theirs / ours) for ours, theirs in pairs if ours and theirs])
