import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mlx_manager.bench.client import Limits
from mlx_manager.bench.load import compare, measure
from mlx_manager.bench.results import CeilingCell, Cell, Target, Workload
from mlx_manager.bench.samples import Sample, Usage
from mlx_manager.bench.scenarios import Trial

from .scripted import DONE, Script, answer, chunk, delta, serving, usage
from .values import MACHINE

PROMPTS = ("prime", "one", "two", "three")


async def one_sample(script: Script, **limits: float) -> Sample:
    async with serving(lambda body, number: script) as served:
        cell = await measure(Target("t", served.url, "m"), Workload(8, 16, 1, 1), PROMPTS, limits=Limits(**limits))
    assert len(cell.samples) == 1
    return cell.samples[0]


async def test_a_request_asks_for_a_stream_with_usage_and_carries_the_key() -> None:
    async with serving(lambda body, number: answer()) as served:
        target = Target("t", served.url + "/v1", "the-model", api_key="sk-1")
        await measure(target, Workload(8, 16, 1, 2, temperature=0.5), PROMPTS)
    assert served.asked[0] == {
        "path": "/v1/chat/completions",
        "model": "the-model",
        "messages": [{"role": "user", "content": "one"}],
        "max_tokens": 16,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert served.asked[1]["messages"][0]["content"] == "two"
    assert served.headers[0]["authorization"] == "Bearer sk-1"


async def test_times_are_of_content_events_and_tokens_of_the_usage() -> None:
    sample = await one_sample(answer(num_events=4, tokens=9, gap_s=0.05, cached=3))
    assert sample.error is None
    assert sample.finish_reason == "length"
    assert sample.usage == Usage(10, 9, 3)
    assert len(sample.events_s) == 4
    assert sample.ttft_s is not None
    assert 0.05 <= sample.ttft_s < 0.15
    assert all(0.03 <= gap < 0.15 for gap in sample.gaps_s)
    assert sample.end_s >= sample.events_s[-1]


async def test_reasoning_and_tool_calls_are_content_and_comments_are_not() -> None:
    pieces = (b": keep-alive\n\n", delta(reasoning="hm"), delta(tool_calls=[{"index": 0}]), delta(tool_calls=[]), delta("stop"), DONE)
    sample = await one_sample(Script(tuple((0.0, piece) for piece in pieces)))
    assert sample.error is None
    assert len(sample.events_s) == 2
    assert sample.usage is None
    assert sample.num_output_tokens == 2


async def test_any_framing_is_understood() -> None:
    framed = b"".join(piece for _, piece in answer().pieces).replace(b"\n", b"\r\n")
    sample = await one_sample(Script(tuple((0.0, framed[at : at + 1]) for at in range(len(framed)))))
    assert (sample.error, len(sample.events_s), sample.usage) == (None, 3, Usage(10, 6))


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(((0.0, b'{"error": {"message": "queue is full"}}'),), 429, "application/json"), "HTTP 429: queue is full"),
        (Script(((0.0, b'{"error": "no model"}'),), 404, "application/json"), "HTTP 404: no model"),
        (Script(((0.0, b"<h1>Bad\nGateway</h1>"),), 502, "text/html"), "HTTP 502: <h1>Bad Gateway</h1>"),
        (Script(((0.0, b"{}"),), 200, "application/json"), "not an event stream but application/json"),
        (Script(((0.0, delta(content="a")), (0.0, chunk(error={"message": "out of memory"})))), "error event: out of memory"),
        (Script(((0.0, b'event: error\ndata: {"message": "gone"}\n\n'),)), "error event: gone"),
        (Script(((0.0, b"data: nonsense\n\n"),)), "an event that is no JSON object: 'nonsense'"),
        (Script(((0.0, delta(content="a")), (0.0, delta("stop")))), "cut off: the stream ended before [DONE]"),
        (Script(((0.0, delta(content="a")), (0.0, DONE))), "[DONE] without a finish_reason"),
    ],
)
async def test_a_reply_that_is_not_a_whole_stream_is_a_failure_that_says_why(script: Script, error: str) -> None:
    assert (await one_sample(script)).error == error


async def test_a_connection_dropped_inside_a_stream_is_a_failure_that_keeps_what_came() -> None:
    sample = await one_sample(Script(((0.0, delta(content="a")), (0.01, delta(content="b"))), cut=True))
    assert sample.error is not None
    assert sample.error.startswith("RemoteProtocolError")
    assert len(sample.events_s) == 2


async def test_nobody_there_is_a_failure_of_every_request_and_not_of_the_run() -> None:
    async with serving(lambda body, number: answer()) as served:
        pass
    cell = await measure(Target("t", served.url, "m"), Workload(8, 16, 2, 5), PROMPTS)
    assert [sample.error is not None and sample.error.startswith("ConnectError") for sample in cell.samples] == [True] * 5


async def test_a_silent_server_is_left_after_the_time_limit_of_the_request() -> None:
    sample = await one_sample(Script(linger_s=5.0), request_s=0.1)
    assert sample.error == "time limit of the request"
    assert sample.end_s < 1.0


async def test_the_time_limit_of_the_run_ends_it_and_counts_what_was_not_sent() -> None:
    async with serving(lambda body, number: Script(linger_s=5.0)) as served:
        target, workload = Target("t", served.url, "m"), Workload(8, 16, 2, 10, prompts=("hello",))
        results = await compare([target], [workload, Workload(8, 16, 1, 1)], 2, limits=Limits(total_s=0.3), machine=MACHINE)
    assert results.stopped == "the time limit of 0 s was reached"
    assert len(results.cells) < 4
    for cell in results.cells:
        assert {sample.error for sample in cell.samples} == {"time limit of the run"}
        assert results.figures(target, workload).num_unsent >= 8


async def test_a_body_that_stays_open_after_done_is_waited_for_but_not_counted() -> None:
    finished = answer()
    sample = await one_sample(Script(finished.pieces, linger_s=0.3))
    assert sample.error is None
    assert sample.end_s < 0.25


async def test_as_many_requests_are_in_flight_as_the_workload_says() -> None:
    async with serving(lambda body, number: answer(gap_s=0.02)) as served:
        cell = await measure(Target("t", served.url, "m"), Workload(8, 16, 4, 12), PROMPTS)
    assert served.most_open == 4
    assert len(served.asked) == 12
    assert cell.output_tok_s == pytest.approx(12 * 6 / cell.wall_s)
    assert cell.requests_s == pytest.approx(12 / cell.wall_s)
    assert 3 * 0.06 <= cell.wall_s < 1.0


async def test_concurrency_shows_as_speed_up_when_the_server_really_serves_at_once() -> None:
    async with serving(lambda body, number: answer(gap_s=0.03)) as served:
        target, workloads = Target("t", served.url, "m"), [Workload(8, 16, n, 8) for n in (1, 4)]
        results = await compare([target], workloads, 1, machine=MACHINE)
    up = results.speed_up(target, workloads[1])
    assert up is not None
    assert up.median > 2


async def test_a_primed_workload_sends_one_request_ahead_that_is_not_measured() -> None:
    async with serving(lambda body, number: answer()) as served:
        cell = await measure(Target("t", served.url, "m"), Workload(8, 16, 1, 2, "shared", primed=True), PROMPTS)
    assert [(body["messages"][0]["content"], body["max_tokens"]) for body in served.asked] == [("prime", 1), ("one", 16), ("two", 16)]
    assert len(cell.samples) == 2


async def test_targets_take_turns_and_the_order_alternates() -> None:
    seen: list[Cell | Trial | CeilingCell] = []
    async with serving(lambda body, number: answer()) as a, serving(lambda body, number: answer()) as b:
        targets = [Target("a", a.url, "m"), Target("b", b.url, "m")]
        results = await compare(targets, [Workload(8, 16, 1, 2), Workload(8, 16, 2, 2)], 3, machine=MACHINE, on_done=seen.append)
    order = [(cell.target, cell.workload.concurrency, cell.repeat) for cell in results.cells]
    assert order == [(name, c, r) for c in (1, 2) for r, names in enumerate(("ab", "ba", "ab")) for name in names]
    assert seen == list(results.cells)
    assert results.stopped is None


async def test_all_targets_get_the_same_prompts_and_no_prompt_twice() -> None:
    async with serving(lambda body, number: answer()) as a, serving(lambda body, number: answer()) as b:
        targets = [Target("a", a.url, "m"), Target("b", b.url, "m")]
        await compare(targets, [Workload(64, 16, c, 4) for c in (1, 2)], 2, machine=MACHINE)
    sent = {served.url: [body["messages"][0]["content"] for body in served.asked] for served in (a, b)}
    assert sorted(sent[a.url][2:]) == sorted(sent[b.url])  # a was also asked for its word scale
    assert len(set(sent[a.url])) == len(sent[a.url])


async def test_prompts_are_as_long_as_asked_by_the_servers_own_count() -> None:
    def counting(body: dict[str, Any], number: int) -> Script:
        num_words = len(body["messages"][0]["content"].split())
        return Script(((0.0, delta(content="x")), (0.0, delta("stop")), (0.0, usage(30 + 3 * num_words, 1)), (0.0, DONE)))

    async with serving(counting) as served:
        target, workload = Target("t", served.url, "m"), Workload(600, 1, 1, 3)
        results = await compare([target], [workload], 1, machine=MACHINE)
    assert results.figures(target, workload).prompt_tokens == pytest.approx(600, abs=2)


async def test_one_target_that_fails_does_not_disturb_the_other() -> None:
    def flaky(body: dict[str, Any], number: int) -> Script:
        return answer() if number % 2 else Script(((0.0, b"{}"),), 503, "application/json")

    async with serving(flaky) as a, serving(lambda body, number: answer()) as b:
        targets, workload = [Target("a", a.url, "m"), Target("b", b.url, "m")], Workload(8, 16, 2, 10, prompts=("hello",))
        results = await compare(targets, [workload], 2, machine=MACHINE)
    assert results.figures(targets[0], workload).num_failed == 10
    assert results.errors(targets[0]) == {"HTTP 503: {}": 10}
    assert results.figures(targets[1], workload).num_failed == 0
    assert results.ratio(targets[0], targets[1], workload, "output_tok_s") is not None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t, w: compare([t, t], [w]),
        lambda t, w: compare([t], [w, w]),
        lambda t, w: compare([], [w]),
        lambda t, w: compare([t], []),
        lambda t, w: compare([t], [w], 0),
    ],
)
async def test_a_comparison_that_says_nothing_is_refused(wrong: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="target"):
        await wrong(Target("t", "http://127.0.0.1:9", "m"), Workload(8, 16, 1, 1))


async def test_a_cancelled_run_leaves_no_request_behind() -> None:
    async with serving(lambda body, number: answer(num_events=200, gap_s=0.02)) as served:
        task = asyncio.create_task(measure(Target("t", served.url, "m"), Workload(8, 16, 3, 3), PROMPTS))
        await served.until_open(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await served.until_open(0)
