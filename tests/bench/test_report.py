import json
from io import StringIO

import pytest
from rich.console import Console

from mlx_manager.bench.report import from_json, markdown, notes, table, to_json
from mlx_manager.bench.results import CeilingCell, Cell, Results, Target
from mlx_manager.bench.scenarios import Overhead, PrefixHit, Prioritised, Trial

from .values import OURS, PEER, cell, results, sample, work


def both(ours: float, theirs: float, *, alone: float = 10.0) -> Results:
    cells = [cell(t, w, n, tok_s=r) for n in (0, 1) for w, rs in ((work(), (alone, alone)), (work(8, 1), (ours, theirs)))
             for t, r in zip((OURS, PEER), rs, strict=True)]  # fmt: skip
    return results(*cells)


def test_json_brings_back_every_observation() -> None:
    seen = both(30, 20)
    seen = results(*seen.cells, Cell("ours", work(2, 2), 0, 1.5, (sample(0.1, error="cut off"),)), stopped="the time limit")
    assert from_json(to_json(seen)) == seen


def test_json_has_the_figures_the_machine_and_the_command_but_no_key() -> None:
    text = to_json(both(30, 20))
    document = json.loads(text)
    eight = next(f for f in document["figures"] if f["target"] == "ours" and f["workload"]["concurrency"] == 8)
    assert eight["speed_up"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert eight["ratio"]["peer"]["output_tok_s"]["median"] == 1.5
    assert document["results"]["machine"]["command"].startswith("mlx-manager bench")
    assert "sk-secret" not in text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": {"targets": 1}}'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of json or of the schema, each with its own words
        from_json(text)


def test_markdown_says_rates_ratios_and_how_they_were_taken() -> None:
    text = markdown(both(30, 20))
    assert "| 8 | ours | 30.0 | 3.00x | 100.0 / 100.0 | 200.0 / 200.0 / 200.0 | 300 | - | 0 of 2 | 1.50x | 1.00x |" in text
    assert "A CPU, 2 cores, 16 GiB; Linux 6 x86_64; Python 3.11.7; mlx 0.32.4, git abc123" in text
    assert "Command: mlx-manager bench --url http://x" in text
    assert "started as: peer --fast" in text
    assert "unique prompts of 128 tokens (100 counted), at most 64 tokens out, temperature 0" in text


def test_a_table_of_one_target_has_no_ratios() -> None:
    assert "ratio" not in markdown(results(cell(OURS, work()), targets=(OURS,)))


def test_the_table_shows_the_same_rows_and_takes_names_literally() -> None:
    named = Target("[red]ours[/red]", "http://x", "m")
    out = StringIO()
    Console(file=out, width=250).print(table(results(cell(named, work()), targets=(named,))))
    assert "[red]ours[/red]" in out.getvalue()
    assert "10.0" in out.getvalue()


def test_it_is_said_plainly_when_there_is_no_speed_up() -> None:
    said = notes(both(10.2, 30))
    assert "ours: no speed-up from concurrency: at best 1.02x of one at a time, at 8 at once." in said
    assert "peer: up to 3.00x the output tok/s of one at a time, at 8 at once." in said


def test_a_speed_up_that_one_repeat_does_not_show_is_none() -> None:
    seen = results(*(cell(OURS, w, n, tok_s=r) for w, rs in ((work(), (10, 10, 10)), (work(8, 1), (20, 20, 9))) for n, r in enumerate(rs)))
    assert notes(seen)[0].startswith("ours: no speed-up from concurrency: at best 2.00x (0.90-2.00)")


def test_failures_missing_usage_and_a_stop_are_said() -> None:
    failed = Cell("ours", work(requests=3), 0, 1.0, (sample(0.1, 0.2), sample(error="HTTP 503: busy")))
    said = " ".join(notes(results(failed, targets=(OURS,), stopped="the time limit of 9 s was reached")))
    assert "1 failed requests: 1 x HTTP 503: busy" in said
    assert "did not send usage" in said
    assert "1 requests were not sent" in said
    assert "Incomplete: the time limit of 9 s was reached." in said


def test_unequal_work_and_a_prompt_seen_before_are_said() -> None:
    ours = Cell("ours", work(), 0, 1.0, (sample(0.1, tokens=64, cached=60),))
    theirs = Cell("peer", work(), 0, 1.0, (sample(0.1, tokens=10),))
    said = " ".join(notes(results(ours, theirs)))
    assert "ours wrote 64 tokens a request and peer 10: their rates are not of the same work" in said
    assert "it has seen this seed before" in said


def test_a_target_without_an_answer_has_a_row_of_dashes() -> None:
    dead = Cell("ours", work(), 0, 1.0, (sample(error="refused"),))
    assert "| 1 | ours | - | - | - | - | - | - | 1 of 1 |" in markdown(results(dead, targets=(OURS,)))


def trials() -> Results:
    pairs = ((OURS, 0.1), (PEER, 0.3))
    overhead = [Trial(t.name, Overhead(), n, (sample(s), sample(s))) for n in (0, 1) for t, s in pairs]
    again = [Trial(t.name, PrefixHit(), 0, (sample(s),), before=(sample(1.0),)) for t, s in pairs]
    hurried = Trial("ours", Prioritised(), 0, (sample(0.2),), before=(sample(0.1),), load=(sample(error="busy"),))
    return results(cell(OURS, work()), cell(PEER, work()), *overhead, *again, hurried)


def test_a_scenario_has_a_table_with_its_measures_and_ratios() -> None:
    text = markdown(trials())
    assert "**overhead: one-token requests, one after the other**" in text
    assert "| Target | Request p50, ms | Request p95, ms | Failed | Request p50 ratio to peer |" in text
    assert "| ours | 100.0 | 100.0 | 0 of 4 | 3.00x |" in text
    assert "| peer | 300.0 | 300.0 | 0 of 4 |  |" in text
    assert "| ours | 0.10x | 100.0 | 1000.0 | 0 of 2 | 3.00x |" in text


def test_a_scenario_that_no_peer_has_is_shown_without_them() -> None:
    text = markdown(trials())
    assert "| Target | p95 / idle | TTFT p95, ms | TTFT idle, ms | Failed |" in text
    assert "| ours | 2.00x | 200.0 | 100.0 | 1 of 3 |" in text
    assert "1 failed requests: 1 x busy" in text


def test_json_has_scenarios_and_brings_them_back() -> None:
    seen = trials()
    assert from_json(to_json(seen)) == seen
    said = json.loads(to_json(seen))["scenarios"]
    assert [(one["target"], one["scenario"]["name"]) for one in said] == [
        ("ours", "overhead"),
        ("peer", "overhead"),
        ("ours", "prefix-hit"),
        ("peer", "prefix-hit"),
        ("ours", "priority"),
    ]
    assert said[0]["ratio"]["peer"]["request_p50"]["median"] == pytest.approx(3)
    assert said[4]["measures"]["times_idle"]["median"] == 2


def test_json_of_before_there_were_scenarios_can_be_read() -> None:
    document = json.loads(to_json(both(30, 20)))
    for name in ("scenarios", "trials", "ceiling"):
        del document["results"][name]
    assert from_json(json.dumps(document)) == both(30, 20)


def test_the_ceiling_has_a_row_and_every_target_its_share() -> None:
    seen = results(cell(OURS, work(), tok_s=90), cell(PEER, work(), tok_s=45), ceiling=(CeilingCell(work(), 0, 100.0),))
    text = markdown(seen)
    assert "| Failed | Of the ceiling | tok/s ratio to peer |" in text
    assert "| 0 of 1 | 90% | 2.00x | 1.00x |" in text
    assert "| 1 | the ceiling | 100.0 |" in text
    assert "batch generator" in text
    assert from_json(to_json(seen)) == seen
    assert json.loads(to_json(seen))["figures"][0]["share_of_ceiling"]["median"] == 0.9


def test_more_than_the_ceiling_is_called_a_wrong_measurement() -> None:
    seen = results(cell(OURS, work(), tok_s=131), cell(PEER, work(), tok_s=101), ceiling=(CeilingCell(work(), 0, 100.0),))
    (said,) = [line for line in notes(seen) if "Above the ceiling" in line]
    assert "Above the ceiling: ours 131% at 1 at once." in said
    assert "other work disturbed this run" in said
