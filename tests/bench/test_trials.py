from collections.abc import Callable
from itertools import takewhile
from time import perf_counter
from typing import Any

import pytest

from mlx_manager.bench.client import Client, Extra, Limits
from mlx_manager.bench.load import compare
from mlx_manager.bench.prompts import WordScale
from mlx_manager.bench.results import Target, Workload
from mlx_manager.bench.scenarios import BY_NAME, Join, Overhead, PrefixHit, Prioritised, Scenario, SharedPrefix, Stall, Trial
from mlx_manager.bench.trials import Priority, by_endpoint, run

from .scripted import DONE, Script, Scripted, answer, chunk, serving, usage
from .values import MACHINE


def steady(body: dict[str, Any], number: int) -> Script:
    """A token every 10 ms, as many as were asked for."""
    return answer(num_events=body["max_tokens"], tokens=body["max_tokens"], gap_s=0.01)


async def trial_of(
    scenario: Scenario, script: Callable[[dict[str, Any], int], Script] = steady, prioritise: Callable[[Priority], Extra] = by_endpoint
) -> tuple[Trial, Scripted]:
    async with serving(script) as served, Client(Target("t", served.url, "m"), Limits(), perf_counter() + 30) as client:
        return await run(client, scenario, 0, WordScale(), "salt", prioritise), served


def texts_of(served: Scripted) -> list[str]:
    return [body["messages"][0]["content"] for body in served.asked]


def common(texts: list[str]) -> list[str]:
    return [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*(text.split() for text in texts), strict=False))]


async def test_those_who_join_are_asked_one_by_one_while_all_streams_run() -> None:
    trial, served = await trial_of(Join(load=3, load_tokens=20, probes=4))
    assert served.most_open == 4
    assert len(trial.probes) == 4
    assert len(trial.load) >= 3
    assert trial.num_failed == 0
    started = max(stream.start_s + (stream.ttft_s or 0) for stream in trial.load[:3])
    assert all(probe.start_s >= started for probe in trial.probes)
    ends = [stream.start_s + stream.end_s for stream in trial.load]
    assert max(ends) > trial.probes[-1].start_s
    assert len(set(texts_of(served))) == len(served.asked)


async def test_load_goes_on_until_the_long_prompt_has_come_through_and_is_not_cut() -> None:
    def slow_prompt(body: dict[str, Any], number: int) -> Script:
        if len(body["messages"][0]["content"].split()) < 100:
            return steady(body, number)
        return Script(((0.5, b": still reading\n\n"), *answer().pieces))

    trial, _ = await trial_of(Stall(prompt_tokens=200, load=2, load_tokens=20), slow_prompt)
    (prompt,) = trial.probes
    assert prompt.ttft_s is not None
    assert prompt.ttft_s >= 0.5
    assert len(trial.load) > 4
    assert {stream.num_output_tokens for stream in trial.load} == {20}
    assert max(stream.start_s + stream.end_s for stream in trial.load) > prompt.start_s + prompt.ttft_s
    longest = trial.values()["gap_max"]
    assert longest is not None
    assert 0.01 <= longest < 0.3


async def test_those_who_share_a_prefix_ask_at_once_and_end_differently() -> None:
    trial, served = await trial_of(SharedPrefix(requests=5, prompt_tokens=300))
    assert served.most_open == 5
    assert len(set(texts_of(served))) == 5
    assert len(common(texts_of(served))) >= 300
    assert trial.values()["last_ttft"] is not None


async def test_overhead_is_one_token_at_a_time_after_one_that_is_not_counted() -> None:
    trial, served = await trial_of(Overhead(requests=5))
    assert served.most_open == 1
    assert (len(served.asked), len(trial.probes)) == (6, 5)
    assert {body["max_tokens"] for body in served.asked} == {1}


async def test_a_prompt_comes_again_with_another_end() -> None:
    trial, served = await trial_of(PrefixHit(prompt_tokens=300, hits=2))
    assert (len(trial.before), len(trial.probes)) == (1, 2)
    assert len(set(texts_of(served))) == 3
    assert len(common(texts_of(served))) >= 300


async def test_priority_can_be_said_in_another_way() -> None:
    def by_field(priority: Priority) -> Extra:
        return Extra(fields={"priority": {"high": 0, "normal": 1, "low": 2}[priority]})

    _, served = await trial_of(Prioritised(load=1, load_tokens=4, probes=1), prioritise=by_field)
    assert {body["priority"] for body in served.asked} == {0, 2}


async def test_priority_is_a_matter_of_the_endpoint_high_alone_and_then_beside_low() -> None:
    def completing(body: dict[str, Any], number: int) -> Script:
        if "messages" in body:
            return steady(body, number)
        text = chunk(choices=[{"index": 0, "text": "word", "finish_reason": None}])
        end = chunk(choices=[{"index": 0, "text": "", "finish_reason": "length"}])
        return Script(((0.01, text), (0.01, text), (0.0, end), (0.0, usage(3, 2)), (0.0, DONE)))

    trial, served = await trial_of(Prioritised(load=2, load_tokens=4, probes=2), completing)
    assert (len(trial.before), len(trial.probes)) == (2, 2)
    asked = [(body["path"], "prompt" in body, "messages" in body) for body in served.asked]
    assert set(asked) == {("/v1/chat/completions", False, True), ("/v1/completions", True, False)}
    assert {(len(stream.events_s), stream.num_output_tokens, stream.error) for stream in trial.load} == {(2, 2, None)}


async def test_load_that_is_refused_is_written_down_and_nobody_waits_for_it() -> None:
    def refusing(body: dict[str, Any], number: int) -> Script:
        return steady(body, number) if body["max_tokens"] == 8 else Script(((0.0, b'{"error": "busy"}'),), 503, "application/json")

    trial, _ = await trial_of(Join(load=2, load_tokens=20, probes=2), refusing)
    assert [probe.error for probe in trial.probes] == [None, None]
    assert {stream.error for stream in trial.load} == {"HTTP 503: busy"}
    assert len(trial.load) < 10


async def test_scenarios_take_turns_with_new_prompts_and_priority_is_for_the_subject() -> None:
    async with serving(steady) as a, serving(steady) as b:
        targets = [Target("a", a.url, "m"), Target("b", b.url, "m")]
        scenarios = (PrefixHit(20, hits=1), Prioritised(load=1, load_tokens=4, probes=1))
        seen = await compare(targets, [Workload(8, 4, 1, 1)], 2, scenarios=scenarios, machine=MACHINE)
    assert [(trial.target, trial.scenario.name, trial.repeat) for trial in seen.trials] == [
        *((name, "prefix-hit", repeat) for repeat, names in enumerate(("ab", "ba")) for name in names),
        *(("a", "priority", repeat) for repeat in range(2)),
    ]
    assert len(seen.cells) == 4
    asked = [text for text in texts_of(b) if "story that uses" in text]
    assert len(set(asked)) == len(asked)


async def test_the_time_limit_of_the_run_ends_scenarios_too() -> None:
    async with serving(lambda body, number: Script(linger_s=5.0)) as served:
        every = tuple(scenario for scenarios in BY_NAME.values() for scenario in scenarios)
        seen = await compare([Target("t", served.url, "m")], scenarios=every, limits=Limits(total_s=0.5), machine=MACHINE)
    assert seen.stopped is not None
    assert all(sample.error is not None for trial in seen.trials for sample in trial.samples)


async def test_a_target_whose_warm_up_took_the_rest_of_the_time_has_not_failed() -> None:
    def slow(body: dict[str, Any], number: int) -> Script:
        return answer() if number < 2 else Script(linger_s=5.0)  # the first two are asked for the scale of words

    async with serving(slow) as served:
        seen = await compare([Target("t", served.url, "m")], scenarios=(Overhead(),), limits=Limits(total_s=0.5), machine=MACHINE)
    assert seen.trials == ()
    assert seen.stopped is not None


async def test_the_same_scenario_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="must differ"):
        await compare([Target("t", "http://127.0.0.1:9", "m")], scenarios=(Join(), Join()))
