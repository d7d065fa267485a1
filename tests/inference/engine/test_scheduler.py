"""Decisions only: no model, no arrays."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.inference.engine.scheduler import Plan, Scheduler
from mlx_manager.inference.engine.sequence import Sequence, SequenceSpec, TokenSampling


def sequence(prompt_length: int, max_tokens: int = 3) -> Sequence:
    return Sequence(SequenceSpec((1,) * prompt_length, max_tokens, TokenSampling(seed=0)), 0)


def carry_out(plan: Plan) -> None:
    """What a runner notes down."""
    for row in plan.decode:
        row.num_computed += 1
        row.num_sampled += 1
    for chunk in plan.prefill:
        assert chunk.start == chunk.sequence.num_computed
        chunk.sequence.num_computed = chunk.stop


def scheduler_with(sequences: list[Sequence], *, max_sequences: int = 4, prefill_budget: int = 10) -> Scheduler:
    scheduler = Scheduler(max_sequences=max_sequences, prefill_budget=prefill_budget)
    for s in sequences:
        scheduler.add(s)
    return scheduler


def test_the_last_prompt_token_is_decoded_not_prefilled() -> None:
    s = sequence(5)
    scheduler = scheduler_with([s])
    plan = scheduler.plan()
    assert [(c.start, c.stop) for c in plan.prefill] == [(0, 4)]
    assert plan.decode == ()
    carry_out(plan)
    assert scheduler.plan() == Plan(decode=(s,), prefill=())


def test_the_first_who_came_is_prefilled_first_and_the_rest_of_the_budget_goes_to_the_next() -> None:
    first, second, third = sequence(8), sequence(8), sequence(8)
    scheduler = scheduler_with([first, second, third])
    plan = scheduler.plan()
    assert [(c.sequence, c.start, c.stop) for c in plan.prefill] == [(first, 0, 7), (second, 0, 3)]
    carry_out(plan)
    plan = scheduler.plan()
    assert [(c.sequence, c.start, c.stop) for c in plan.prefill] == [(second, 3, 7), (third, 0, 6)]
    assert plan.decode == (first,)


def test_a_long_prompt_does_not_hold_up_those_that_decode() -> None:
    talking, long = sequence(1, max_tokens=100), sequence(1000)
    scheduler = scheduler_with([talking, long])
    for _ in range(50):
        plan = scheduler.plan()
        assert talking in plan.decode
        carry_out(plan)


@pytest.mark.requirement("P.1")
def test_a_place_that_is_given_up_is_taken_in_the_next_plan() -> None:
    sequences = [sequence(1) for _ in range(3)]
    scheduler = scheduler_with(sequences, max_sequences=2)
    assert scheduler.plan().decode == tuple(sequences[:2])
    scheduler.remove(sequences[0])
    assert scheduler.plan().decode == (sequences[1], sequences[2])
    assert sequences[2].admitted is not None


def test_removing_one_that_waits_or_is_unknown_moves_nobody() -> None:
    sequences = [sequence(1) for _ in range(4)]
    scheduler = scheduler_with(sequences, max_sequences=1)
    scheduler.plan()
    scheduler.remove(sequences[2])
    scheduler.remove(sequences[2])
    scheduler.remove(sequence(1))
    assert (scheduler.running, list(scheduler.waiting)) == ([sequences[0]], [sequences[1], sequences[3]])


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt_length: int
    max_tokens: int
    given_up_after: int | None


ARRIVALS = st.lists(
    st.builds(Arrival, st.integers(0, 20), st.integers(1, 40), st.integers(1, 6), st.none() | st.integers(0, 10)),
    min_size=1,
    max_size=15,
)


@given(ARRIVALS, st.integers(1, 5), st.integers(1, 30))
def test_whatever_comes_and_goes_everybody_is_served_in_turn_and_within_the_limits(
    arrivals: list[Arrival], max_sequences: int, prefill_budget: int
) -> None:
    scheduler = Scheduler(max_sequences=max_sequences, prefill_budget=prefill_budget)
    coming = sorted(((a, sequence(a.prompt_length, a.max_tokens)) for a in arrivals), key=lambda pair: pair[0].step)
    added: list[Sequence] = []
    admitted: list[Sequence] = []
    given_up: set[Sequence] = set()
    most_steps = 21 + sum(-(-a.prompt_length // prefill_budget) + a.prompt_length + a.max_tokens + 2 for a in arrivals)
    for step in range(most_steps):
        for arrival, s in coming:
            if arrival.step == step:
                scheduler.add(s)
                added.append(s)
            if arrival.given_up_after is not None and arrival.step + arrival.given_up_after == step:
                scheduler.remove(s)
                given_up.add(s)
        plan = scheduler.plan()
        admitted += [s for s in scheduler.running if s not in admitted]

        assert len(scheduler.running) <= max_sequences
        assert not set(scheduler.running) & set(scheduler.waiting)
        assert len(set(scheduler.running)) == len(scheduler.running)
        assert sum(c.stop - c.start for c in plan.prefill) <= prefill_budget
        assert all(c.stop > c.start and c.stop < len(c.sequence.spec.prompt) for c in plan.prefill)
        assert not set(plan.decode) & {c.sequence for c in plan.prefill}
        assert set(plan.decode) | {c.sequence for c in plan.prefill} <= set(scheduler.running)
        assert not scheduler.waiting or len(scheduler.running) == max_sequences
        assert scheduler.has_work == bool(scheduler.running or scheduler.waiting)
        assert plan.decode or plan.prefill or not scheduler.running

        carry_out(plan)
        for s in list(scheduler.running):
            if s.num_sampled == s.spec.max_tokens:
                scheduler.remove(s)
    assert not scheduler.has_work
    assert all(s.num_sampled == s.spec.max_tokens for s in added if s not in given_up)
    assert admitted == [s for s in added if s in admitted], "first come, first served"
