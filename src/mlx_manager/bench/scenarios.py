"""What else is measured of a server than how much it serves: each scenario asks one question, and says what its answer is made of.

Values and arithmetic; no I/O. `trials.py` does what is described here. All measures are durations or shares of one: less is better.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, assert_never

from mlx_manager.bench.samples import Sample, Spread, gaps_s, ttfts_s

Name = Literal["join", "stall", "shared-prefix", "overhead", "prefix-hit", "priority"]


@dataclass(frozen=True, slots=True)
class Measure:
    name: str
    title: str
    unit: Literal["s", "share"] = "s"


@dataclass(frozen=True, slots=True)
class Join:
    """How soon somebody is answered who comes while others are served: short requests, one after the other, beside `load` streams."""

    load: int = 8
    load_tokens: int = 256
    probes: int = 16
    name: Literal["join"] = "join"


@dataclass(frozen=True, slots=True)
class Stall:
    """How long running streams stand still for the prompt of another: `load` streams, and one long prompt beside them."""

    prompt_tokens: int = 4000
    load: int = 4
    load_tokens: int = 256
    name: Literal["stall"] = "stall"


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """How long until all of those are being answered who ask at once about one text that the server has not seen."""

    requests: int = 8
    prompt_tokens: int = 1000
    name: Literal["shared-prefix"] = "shared-prefix"


@dataclass(frozen=True, slots=True)
class Overhead:
    """What a request costs beside its tokens: the same question again and again, one token each."""

    requests: int = 40
    name: Literal["overhead"] = "overhead"


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What is left of the time to the first token when the prompt was there before, all but its last sentence."""

    prompt_tokens: int = 1000
    hits: int = 2
    name: Literal["prefix-hit"] = "prefix-hit"


@dataclass(frozen=True, slots=True)
class Prioritised:
    """What requests of high priority feel of `load` streams of low priority: more than the server decodes together."""

    load: int = 40
    load_tokens: int = 32
    probes: int = 20
    name: Literal["priority"] = "priority"


Scenario = Join | Stall | SharedPrefix | Overhead | PrefixHit | Prioritised

BY_NAME: dict[Name, tuple[Scenario, ...]] = {
    "join": (Join(),),
    "stall": (Stall(),),
    "shared-prefix": (SharedPrefix(),),
    "overhead": (Overhead(),),
    "prefix-hit": (PrefixHit(1000), PrefixHit(8000)),
    "priority": (Prioritised(),),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One target in one scenario, once. The times of all its samples count from one moment."""

    target: str
    scenario: Scenario
    repeat: int
    probes: tuple[Sample, ...]
    """What was measured."""
    before: tuple[Sample, ...] = ()
    """The same before: on an idle server, or of a prompt that it had not seen."""
    load: tuple[Sample, ...] = ()
    """What the server was busy with meanwhile."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.before + self.load + self.probes

    @property
    def num_failed(self) -> int:
        return sum(sample.error is not None for sample in self.samples)

    def values(self) -> dict[str, float | None]:
        """By the name of the measure; None where too little came back to say."""
        probes, before = _completed(self.probes), _completed(self.before)
        ttft, ttft_before = Spread.of(ttfts_s(probes)), Spread.of(ttfts_s(before))
        match self.scenario:
            case Join():
                return {"ttft_p50": ttft and ttft.p50, "ttft_max": ttft and ttft.max}
            case Stall():
                usual = Spread.of(gaps_s(_completed(self.load)))
                return {"gap_max": _longest_gap_beside(self.probes, self.load), "gap_p50": usual and usual.p50, "ttft": ttft and ttft.p50}
            case SharedPrefix():
                firsts = [sample.start_s + sample.ttft_s for sample in probes if sample.ttft_s is not None]
                all_came = len(firsts) == self.scenario.requests
                sent = min((sample.start_s for sample in probes), default=0.0)
                return {"last_ttft": max(firsts) - sent if all_came else None, "ttft_p50": ttft and ttft.p50}
            case Overhead():
                whole = Spread.of(sample.end_s for sample in probes)
                return {"request_p50": whole and whole.p50, "request_p95": whole and whole.p95}
            case PrefixHit():
                share = ttft.p50 / ttft_before.p50 if ttft and ttft_before else None
                return {"share_of_cold": share, "ttft_again": ttft and ttft.p50, "ttft_cold": ttft_before and ttft_before.p50}
            case Prioritised():
                share = ttft.p95 / ttft_before.p50 if ttft and ttft_before else None
                return {"times_idle": share, "ttft_p95": ttft and ttft.p95, "ttft_idle": ttft_before and ttft_before.p50}
            case _:
                assert_never(self.scenario)


def measures(scenario: Scenario) -> tuple[Measure, ...]:
    """The first is what the scenario is about, and what targets are compared by."""
    match scenario:
        case Join():
            return Measure("ttft_p50", "TTFT p50"), Measure("ttft_max", "TTFT max")
        case Stall():
            return Measure("gap_max", "Worst gap"), Measure("gap_p50", "Gap p50"), Measure("ttft", "TTFT of the prompt")
        case SharedPrefix():
            return Measure("last_ttft", "Last first token"), Measure("ttft_p50", "TTFT p50")
        case Overhead():
            return Measure("request_p50", "Request p50"), Measure("request_p95", "Request p95")
        case PrefixHit():
            return Measure("share_of_cold", "Again / cold", "share"), Measure("ttft_again", "TTFT again"), Measure("ttft_cold", "TTFT cold")
        case Prioritised():
            return Measure("times_idle", "p95 / idle", "share"), Measure("ttft_p95", "TTFT p95"), Measure("ttft_idle", "TTFT idle")
        case _:
            assert_never(scenario)


def title(scenario: Scenario) -> str:
    match scenario:
        case Join():
            return f"join: short requests, one after the other, beside {scenario.load} streams"
        case Stall():
            return f"stall: {scenario.load} streams beside the prefill of a prompt of {scenario.prompt_tokens} tokens"
        case SharedPrefix():
            return f"shared-prefix: {scenario.requests} at once with a new prefix of {scenario.prompt_tokens} tokens"
        case Overhead():
            return "overhead: one-token requests, one after the other"
        case PrefixHit():
            return f"prefix-hit: a prompt of {scenario.prompt_tokens} tokens again, with another last sentence"
        case Prioritised():
            return f"priority: requests of high priority beside {scenario.load} streams of low priority"
        case _:
            assert_never(scenario)


def warm_up(scenario: Scenario) -> Scenario:
    """As little of it as brings a server to do all of what it does in it."""
    match scenario:
        case Join():
            return replace(scenario, load_tokens=min(scenario.load_tokens, 32), probes=1)
        case Stall():
            return replace(scenario, load=1, load_tokens=min(scenario.load_tokens, 32), prompt_tokens=min(scenario.prompt_tokens, 1000))
        case SharedPrefix():
            return replace(scenario, requests=min(scenario.requests, 2))
        case Overhead():
            return replace(scenario, requests=min(scenario.requests, 4))
        case PrefixHit():
            return replace(scenario, hits=1, prompt_tokens=min(scenario.prompt_tokens, 1000))
        case Prioritised():
            return replace(scenario, load_tokens=min(scenario.load_tokens, 8), probes=1)
        case _:
            assert_never(scenario)


def is_for(scenario: Scenario, *, subject: bool) -> bool:
    """No peer has priorities of this kind: their requests would be what they are without."""
    return subject or not isinstance(scenario, Prioritised)


def parsed(text: str) -> tuple[Scenario, ...]:
    """`NAME` or `NAME:FIELD=NUMBER,…`. Raises ValueError."""
    name, _, rest = text.partition(":")
    found = next((scenarios for known, scenarios in BY_NAME.items() if known == name), None)
    if found is None:
        raise ValueError(f"--scenario {text}: the scenarios are served, {', '.join(BY_NAME)}")
    known = [field.name for field in fields(found[0]) if field.name != "name"]
    changes: dict[str, int] = {}
    for change in filter(None, rest.split(",")):
        field, _, number = change.partition("=")
        if field not in known or not number.isascii() or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--scenario {text}: {name} takes {', '.join(f'{one}=N' for one in known)}, each 1 or more")
        changes[field] = int(number)
    return tuple(dict.fromkeys(replace(scenario, **changes) for scenario in found))


def _completed(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.error is None]


def _longest_gap_beside(probes: Sequence[Sample], load: Sequence[Sample]) -> float | None:
    """Of the load, between two tokens, while a probe waited for its first. A stream that has yet to begin does not stand still."""
    waits = [(probe.start_s, probe.start_s + probe.ttft_s) for probe in _completed(probes) if probe.ttft_s is not None]
    gaps = (
        later - earlier
        for stream in _completed(load)
        for earlier, later in zip(stream.events_s, stream.events_s[1:], strict=False)
        if any(stream.start_s + earlier < until and stream.start_s + later > since for since, until in waits)
    )
    return max(gaps, default=None)
