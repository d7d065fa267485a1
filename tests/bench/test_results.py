import pytest

from mlx_manager.bench.results import CeilingCell, Cell, Target, Workload
from mlx_manager.bench.samples import Range, Spread

from .values import OURS, PEER, cell, results, sample, work


def test_tokens_are_those_of_the_usage_not_the_events() -> None:
    one = Cell("ours", work(), 0, 2.0, (sample(0.1, 0.2, 0.3, tokens=30),))
    assert one.output_tok_s == 15.0
    assert results(one).figures(OURS, work()).counted_by == "usage"


def test_without_usage_events_are_counted_and_it_is_said() -> None:
    one = Cell("ours", work(), 0, 2.0, (sample(0.1, 0.2, 0.3), sample(0.1, tokens=7)))
    assert one.output_tok_s == 5.0
    assert results(one).figures(OURS, work()).counted_by == "events"


def test_a_failed_request_adds_its_time_but_no_tokens_and_no_latency() -> None:
    one = Cell("ours", work(requests=2), 0, 4.0, (sample(0.1, 0.2, tokens=20), sample(3.0, 3.9, tokens=99, error="cut off")))
    assert one.output_tok_s == 5.0
    assert one.requests_s == 0.25
    assert one.ttft_s == Spread(0.1, 0.1, 0.1)
    figures = results(one).figures(OURS, work(requests=2))
    assert (figures.num_completed, figures.num_failed, figures.num_unsent) == (1, 1, 0)


def test_nothing_completed_is_not_a_throughput_of_zero() -> None:
    one = Cell("ours", work(), 0, 1.0, (sample(error="refused"),))
    assert (one.output_tok_s, one.requests_s, one.ttft_s, one.gap_s) == (None, None, None, None)
    assert results(one, cell(PEER, work())).ratio(OURS, PEER, work(), "output_tok_s") is None


def test_gaps_are_between_events_of_one_stream() -> None:
    one = Cell("ours", work(requests=2), 0, 1.0, (sample(1.0, 1.5, 1.5), sample(9.0)))
    assert one.gap_s == Spread(0.25, 0.475, 0.5)


def test_percentiles_lie_between_the_nearest_samples() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0]) == Spread(2.5, pytest.approx(3.85), 4.0)
    assert Spread.of([]) is None


def test_a_ratio_is_the_median_of_pairs_of_the_same_repeat() -> None:
    pairs = [(10, 5), (30, 10), (400, 100)]
    cells = [cell(t, work(), n, tok_s=rate) for n, pair in enumerate(pairs) for t, rate in zip((OURS, PEER), pair, strict=True)]
    assert results(*cells).ratio(OURS, PEER, work(), "output_tok_s") == Range(3.0, 2.0, 4.0)
    assert results(*cells[:-1]).ratio(OURS, PEER, work(), "output_tok_s") == Range(2.5, 2.0, 3.0)


def test_a_ratio_of_durations_is_above_one_when_ours_is_shorter() -> None:
    seen = results(cell(OURS, work(), ttft_s=0.1), cell(PEER, work(), ttft_s=0.4))
    assert seen.ratio(OURS, PEER, work(), "ttft_p50") == Range(4.0, 4.0, 4.0)


def test_speed_up_is_over_one_at_a_time_of_the_same_target_and_shape() -> None:
    alone, eight, other = work(), work(8, 16), work(8, 16, prefix="shared")
    seen = results(cell(OURS, alone), cell(OURS, eight, tok_s=35.0), cell(OURS, other), cell(PEER, eight))
    assert seen.speed_up(OURS, eight) == Range(3.5, 3.5, 3.5)
    assert seen.speed_up(OURS, other) is None
    assert seen.speed_up(PEER, eight) is None


def test_the_share_of_the_ceiling_is_taken_within_a_repeat() -> None:
    cells = [cell(OURS, work(), n, tok_s=rate) for n, rate in enumerate((50, 90, 80))]
    seen = results(*cells, ceiling=tuple(CeilingCell(work(), n, rate) for n, rate in enumerate((100.0, 100.0))))
    assert seen.share_of_ceiling(OURS, work()) == Range(0.7, 0.5, 0.9)
    assert seen.share_of_ceiling(PEER, work()) is None
    assert seen.ceiling_tok_s(work()) == Range(100.0, 100.0, 100.0)


def test_cached_tokens_are_a_part_of_the_prompt_and_unknown_is_not_none() -> None:
    said = Cell("ours", work(), 0, 1.0, (sample(0.1, tokens=1, cached=0), sample(0.1, tokens=1, cached=50)))
    silent = Cell("peer", work(), 0, 1.0, (sample(0.1, tokens=1),))
    assert results(said, silent).figures(OURS, work()).cached_part == 0.25
    assert results(said, silent).figures(PEER, work()).cached_part is None


def test_a_base_url_may_have_the_version_or_not() -> None:
    assert OURS.url_of("chat/completions") == "http://127.0.0.1:1/v1/chat/completions"
    assert PEER.url_of("completions") == "http://127.0.0.1:2/v1/completions"
    assert Target("t", "https://host/openai/v1/", "m").url_of("chat/completions") == "https://host/openai/v1/chat/completions"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://user:word@host"])
def test_a_url_that_cannot_be_used_or_must_not_be_printed_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="target t"):
        Target("t", url, "m")


def test_a_target_does_not_show_its_key() -> None:
    assert "sk-secret" not in repr(OURS)


def test_a_workload_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Workload(128, 64, 0, 1)
