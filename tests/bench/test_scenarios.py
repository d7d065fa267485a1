import pytest

from mlx_manager.bench.samples import Range, Sample
from mlx_manager.bench.scenarios import (
    BY_NAME,
    Join,
    Overhead,
    PrefixHit,
    Prioritised,
    Scenario,
    SharedPrefix,
    Stall,
    Trial,
    measures,
    parsed,
    warm_up,
)

from .values import OURS, PEER, results, sample

EVERY = [scenario for scenarios in BY_NAME.values() for scenario in scenarios]


def at(start_s: float, *events_s: float, error: str | None = None) -> Sample:
    return Sample(start_s, events_s, max(events_s, default=0.0) + 0.5, None, None if error else "length", error)


def values(scenario: Scenario, *probes: Sample, before: tuple[Sample, ...] = (), load: tuple[Sample, ...] = ()) -> dict[str, float | None]:
    return Trial("ours", scenario, 0, probes, before, load).values()


def test_who_joins_is_answered_after_the_median_and_at_worst() -> None:
    assert values(Join(), at(0, 0.1), at(1, 0.2), at(2, 0.9), at(3, 9.0, error="cut off")) == {"ttft_p50": 0.2, "ttft_max": 0.9}


def test_a_stall_is_the_longest_gap_of_a_running_stream_while_the_prompt_waits() -> None:
    prompt = at(10.0, 2.0)
    over = at(0.0, 1.0, 8.0, 9.0)  # its gap of 7 ends before the prompt is sent
    beside = at(5.0, 1.0, 4.9, 6.5, 7.5)  # its gap of 3.9 does too, the one of 1.6 does not
    later = at(11.0, 2.0, 9.0)  # begins after the prompt's first token
    seen = values(Stall(), prompt, load=(over, beside, later))
    assert seen["gap_max"] == pytest.approx(1.6)
    assert seen["ttft"] == 2.0
    assert values(Stall(), at(10.0, error="too long"), load=(over, beside))["gap_max"] is None


def test_a_shared_prefix_is_as_slow_as_the_last_and_says_nothing_if_one_failed() -> None:
    asked = SharedPrefix(requests=3)
    assert values(asked, at(1.0, 0.5), at(1.1, 0.8), at(1.2, 0.6))["last_ttft"] == pytest.approx(0.9)
    assert values(asked, at(1.0, 0.5), at(1.1, 0.8), at(1.2, error="HTTP 503"))["last_ttft"] is None


def test_overhead_is_the_time_of_whole_requests() -> None:
    assert values(Overhead(), at(0, 0.1), at(1, 0.2), at(2, 0.3))["request_p50"] == pytest.approx(0.7)


def test_what_comes_again_and_what_has_priority_are_shares_of_what_was_before() -> None:
    assert values(PrefixHit(), at(5, 0.3), at(6, 0.1), before=(at(0, 2.0),)) == {
        "share_of_cold": pytest.approx(0.1),
        "ttft_again": pytest.approx(0.2),
        "ttft_cold": 2.0,
    }
    hurried = values(Prioritised(), at(5, 0.3), at(6, 0.3), before=(at(0, 0.1), at(1, 0.2), at(2, 0.2)), load=(at(4, 9.0),))
    assert hurried == {"times_idle": pytest.approx(1.5), "ttft_p95": pytest.approx(0.3), "ttft_idle": 0.2}
    assert values(PrefixHit(), at(5, 0.3), before=(at(0, error="too long"),))["share_of_cold"] is None


@pytest.mark.parametrize("scenario", EVERY, ids=str)
def test_every_measure_has_a_value_and_a_title_and_nothing_seen_is_no_value(scenario: Scenario) -> None:
    seen = values(scenario)
    assert list(seen) == [measure.name for measure in measures(scenario)]
    assert set(seen.values()) == {None}


@pytest.mark.parametrize("scenario", EVERY, ids=str)
def test_a_warm_up_is_of_the_same_kind_and_no_more_work(scenario: Scenario) -> None:
    assert type(warm_up(scenario)) is type(scenario)
    assert warm_up(warm_up(scenario)) == warm_up(scenario)


def test_ratios_are_of_pairs_of_a_repeat_and_above_one_when_ours_is_shorter() -> None:
    ours = [Trial("ours", Overhead(), n, (sample(t),)) for n, t in enumerate((0.1, 0.2, 0.4))]
    theirs = [Trial("peer", Overhead(), n, (sample(t),)) for n, t in enumerate((0.2, 0.8))]
    seen = results(*ours, *theirs)
    assert seen.scenario_ratio(OURS, PEER, Overhead(), "request_p50") == Range(3.0, 2.0, 4.0)
    assert seen.measured(OURS, Overhead(), "request_p50") == Range(0.2, 0.1, 0.4)
    assert seen.measured(PEER, Join(), "ttft_p50") is None


def test_a_scenario_is_named_and_may_be_changed() -> None:
    assert parsed("join") == (Join(),)
    assert parsed("stall:prompt_tokens=2000,load=2") == (Stall(prompt_tokens=2000, load=2),)
    assert parsed("prefix-hit") == (PrefixHit(1000), PrefixHit(8000))
    assert parsed("prefix-hit:prompt_tokens=500") == (PrefixHit(500),)


@pytest.mark.parametrize("text", ["", "served:load=1", "joining", "join:load", "join:load=0", "join:load=-1", "join:load=x", "join:name=1"])
def test_a_scenario_that_does_not_exist_is_refused_with_those_that_do(text: str) -> None:
    with pytest.raises(ValueError, match=r"--scenario .*(stall|load_tokens=N)"):
        parsed(text)
