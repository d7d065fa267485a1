"""How many prompt tokens a step may compute."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.inference.engine.pace import Pace


def experienced(*, target_s: float = 0.05, max_budget: int = 2048, decode_s: float = 0.01, prefill_s: float = 0.0001) -> Pace:
    pace = Pace(max_budget, target_s)
    pace.observe(decode_s, num_rows=1, num_prefilled=0)
    pace.observe(decode_s + 2000 * prefill_s, num_rows=1, num_prefilled=2000)
    return pace


def test_where_nobody_decodes_everything_is_allowed() -> None:
    assert Pace(2048, 0.05).budget(num_decoding=0, num_prefilling=1) == 2048
    assert experienced(prefill_s=1.0).budget(num_decoding=0, num_prefilling=1) == 2048


def test_before_anything_is_known_a_step_beside_others_is_small() -> None:
    assert Pace(2048, 0.05).budget(num_decoding=10**6, num_prefilling=1) == 128
    assert Pace(50, 0.05).budget(num_decoding=10**6, num_prefilling=1) == 50


def test_a_step_takes_as_many_as_fit_beside_the_decode() -> None:
    assert experienced(target_s=0.05, decode_s=0.01, prefill_s=0.0001).budget(num_decoding=10**6, num_prefilling=1) == pytest.approx(
        400, abs=1
    )
    assert experienced(target_s=0.05, decode_s=0.01, prefill_s=0.0002).budget(num_decoding=10**6, num_prefilling=1) == pytest.approx(
        200, abs=1
    )


def test_prompts_come_on_even_where_there_is_no_time_for_them() -> None:
    assert experienced(target_s=0.05, decode_s=0.05, prefill_s=0.1).budget(num_decoding=10**6, num_prefilling=1) == 32
    assert experienced(target_s=0.05, prefill_s=1.0).budget(num_decoding=10**6, num_prefilling=1) == 32


def test_a_limit_below_a_block_is_kept() -> None:
    assert experienced(max_budget=10, prefill_s=1.0).budget(num_decoding=10**6, num_prefilling=1) == 10


def test_it_learns_from_a_prompt_that_nobody_decoded_beside() -> None:
    pace = Pace(2048, 0.05)
    pace.observe(0.1, num_rows=0, num_prefilled=1000)
    assert pace.budget(num_decoding=10**6, num_prefilling=1) == pytest.approx(500, abs=1)


def test_a_last_token_alone_says_nothing_of_what_prompts_take() -> None:
    """A pass over one token takes nearly as long as one over thirty."""
    pace = Pace(2048, 0.05, decode_s=0.01, prefill_s=0.0001)
    pace.observe(0.01, num_rows=0, num_prefilled=1)
    assert pace.prefill_s == 0.0001


def test_what_the_rows_took_is_not_blamed_on_the_prompt() -> None:
    pace = Pace(2048, 0.05)
    pace.observe(0.01, num_rows=8, num_prefilled=0)
    pace.observe(0.06, num_rows=8, num_prefilled=500)
    assert pace.budget(num_decoding=10**6, num_prefilling=1) == pytest.approx(400, abs=1)


def test_where_decoding_alone_takes_longer_than_a_step_may_prompts_get_twice_its_time() -> None:
    slow = experienced(target_s=0.05, decode_s=0.2, prefill_s=0.001)
    assert slow.budget(num_decoding=10**6, num_prefilling=1) == pytest.approx(400, abs=1)


@pytest.mark.parametrize(("num_prefilling", "step_s"), [(1, 0.05), (5, 0.1), (9, 0.15), (100, 0.2)])
def test_the_more_wait_for_their_first_token_the_longer_a_step_may_take(num_prefilling: int, step_s: float) -> None:
    pace = experienced(target_s=0.05, decode_s=0.01, prefill_s=0.0001)
    assert pace.budget(num_decoding=4, num_prefilling=num_prefilling) == pytest.approx((step_s - 0.01) / 0.0001, abs=2)


def test_prompts_that_nobody_waits_for_leave_a_step_short_however_many_they_are() -> None:
    pace = experienced(target_s=0.05, decode_s=0.01, prefill_s=0.0001)
    assert pace.budget(num_decoding=4, num_prefilling=100, in_background=True) == pytest.approx((0.05 / 3 - 0.01) / 0.0001, abs=2)
    assert pace.budget(num_decoding=0, num_prefilling=100, in_background=True) == pytest.approx(0.05 / 3 / 0.0001, abs=2)
    slow = experienced(target_s=0.05, decode_s=0.2, prefill_s=0.001)
    assert slow.budget(num_decoding=4, num_prefilling=1, in_background=True) == 32


def test_a_device_that_becomes_slower_is_noticed_within_a_second_of_steps() -> None:
    pace = experienced(prefill_s=0.0001)
    for _ in range(20):
        pace.observe(0.01 + 100 * 0.001, num_rows=1, num_prefilled=100)
    assert pace.budget(num_decoding=10**6, num_prefilling=1) == pytest.approx(40, abs=2)


@pytest.mark.parametrize("seconds", [0.01, 0.005])
def test_a_prompt_that_seems_to_take_no_time_teaches_nothing(seconds: float) -> None:
    pace = Pace(2048, 0.05)
    pace.observe(0.01, num_rows=1, num_prefilled=0)
    pace.observe(seconds, num_rows=1, num_prefilled=100)
    assert pace.budget(num_decoding=10**6, num_prefilling=1) == 128


def test_a_budget_grows_step_by_step_whatever_the_estimate() -> None:
    pace = Pace(2048, 0.05)
    pace.observe(1e-6, num_rows=0, num_prefilled=10)
    budgets = [128]
    while budgets[-1] < 2048:
        budgets.append(pace.budget(num_decoding=10**6, num_prefilling=1))
        assert budgets[-1] <= 2 * budgets[-2]
        pace.observe(1e-6, num_rows=1, num_prefilled=budgets[-1])
    assert len(budgets) > 4


def test_one_odd_step_changes_little() -> None:
    pace = experienced(prefill_s=0.0001)
    before = pace.budget(num_decoding=10**6, num_prefilling=1)
    pace.observe(0.01, num_rows=1, num_prefilled=2000)
    assert before <= pace.budget(num_decoding=10**6, num_prefilling=1) <= before * 1.3


OBSERVATIONS = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 64), st.integers(0, 4096)), max_size=20)


@given(st.integers(1, 8192), st.floats(0, 1), OBSERVATIONS, st.integers(0, 64), st.integers(0, 64))
def test_whatever_was_measured_there_is_a_budget_within_the_limit(
    max_budget: int, target_s: float, observations: list[tuple[float, int, int]], num_decoding: int, num_prefilling: int
) -> None:
    pace = Pace(max_budget, target_s)
    for seconds, num_rows, num_prefilled in observations:
        pace.observe(seconds, num_rows=num_rows, num_prefilled=num_prefilled)
    assert min(32, max_budget) <= pace.budget(num_decoding=num_decoding, num_prefilling=num_prefilling) <= max_budget
