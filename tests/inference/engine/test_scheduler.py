"""Decisions only: no model, no arrays. What comes of many of them in a row is in `test_histories`."""

import itertools
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import pytest

from mlx_manager.core.requests import Priority
from mlx_manager.inference.engine import prefix
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, BlockPool, Content
from mlx_manager.inference.engine.prefix import PrefixKeys
from mlx_manager.inference.engine.scheduler import Chunk, Fork, PassCost, Plan, Policy, Scheduler
from mlx_manager.inference.engine.sequence import URGENCY, Sequence, SequenceSpec, TokenSampling
from mlx_manager.inference.picture import Picture, PlacedPicture

KEYS = PrefixKeys("model", "layout")
AGEING_S = 10.0
GENERATED = 7  # what the model says, always

_numbers = itertools.count(1)


def tokens(length: int) -> tuple[int, ...]:
    """Tokens that are like no others."""
    number = next(_numbers)
    return tuple(range(number * 10_000, number * 10_000 + length))


def sequence(
    prompt: int | Items[int],
    max_tokens: int = 3,
    *,
    at: float = 0.0,
    priority: Priority = "normal",
    client: str = "",
    tenant: str = "",
    deadline: float | None = None,
) -> Sequence:
    """With a prompt of that many tokens that nobody else has, or with this one; submitted at that time."""
    prompt = tokens(prompt) if isinstance(prompt, int) else tuple(prompt)
    spec = SequenceSpec(prompt, max_tokens, TokenSampling(seed=0), priority=priority, client=client, tenant=tenant, deadline=deadline)
    s = Sequence(spec, 0)
    s.submitted = s.waiting_since = at
    return s


def scheduler_with(sequences: Items[Sequence] = (), *, num_blocks: int = 100, **policy: Any) -> Scheduler:
    """`num_blocks` that can hold tokens."""
    scheduler = Scheduler(BlockPool(num_blocks + 1), KEYS, Policy(**{"max_sequences": 8, "ageing_s": AGEING_S} | policy))
    add(scheduler, *sequences)
    return scheduler


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for s in sequences:
        scheduler.add(s)


@dataclass(frozen=True)
class Queued:
    plan: Plan
    positions: dict[Sequence, int]


def queue(plan: Plan) -> Queued:
    """What a runner notes when it has queued a plan."""
    positions = {s: s.num_queued for s in plan.decode}
    for s in plan.decode:
        s.num_queued += 1
        s.num_sampled += 1
    for chunk in plan.prefill:
        assert chunk.start == chunk.sequence.num_queued
        chunk.sequence.num_queued = chunk.stop
        if chunk.samples:
            positions[chunk.sequence] = chunk.stop - 1
            chunk.sequence.num_sampled += 1
    return Queued(plan, positions)


def read(scheduler: Scheduler, queued: Queued) -> None:
    """What a runner and an engine note when they have read it."""
    for s, position in queued.positions.items():
        if s.table:
            s.num_computed = position + 1
    for chunk in queued.plan.prefill:
        if chunk.sequence.table:
            chunk.sequence.num_computed = chunk.stop
    for s in queued.positions:
        if not s.finished:
            s.tokens.append(GENERATED)
            if s.num_generated == s.spec.max_tokens:
                scheduler.publish(s)
                s.finished = True
                scheduler.remove(s)
    ends = {chunk.sequence: frozenset({chunk.stop}) for chunk in queued.plan.prefill}
    for s in (*ends, *queued.positions):
        scheduler.publish(s, ends.get(s, frozenset()))
    scheduler.check_integrity()


def step(scheduler: Scheduler, now: float = 0.0, budget: int = 10_000) -> Plan:
    plan = scheduler.plan(now, budget)
    scheduler.check_integrity()
    read(scheduler, queue(plan))
    return plan


def finish(scheduler: Scheduler, *sequences: Sequence, now: float = 0.0) -> None:
    for _ in range(1000):
        if all(s.finished for s in sequences):
            return
        step(scheduler, now)
    raise AssertionError("they do not end")


def chunks(plan: Plan) -> list[tuple[Sequence, int, int]]:
    return [(c.sequence, c.start, c.stop) for c in plan.prefill]


# ---- a step


def test_the_last_prompt_token_is_decoded_not_prefilled() -> None:
    s = sequence(5)
    scheduler = scheduler_with([s])
    plan = step(scheduler)
    assert (plan.admitted, chunks(plan), plan.decode) == ((s,), [(s, 0, 4)], ())
    assert step(scheduler) == Plan(decode=(s,))


def test_the_last_chunk_of_a_prompt_samples_where_it_can() -> None:
    s = sequence(10)
    scheduler = scheduler_with([s], samples_prompts=True)
    assert step(scheduler, budget=4).prefill == (Chunk(s, 0, 4),)
    assert step(scheduler, budget=5).prefill == (Chunk(s, 4, 10, samples=True),)
    assert s.num_generated == 1
    assert step(scheduler).decode == (s,)


def test_whose_prompt_ends_in_a_step_decodes_in_the_next_read_or_not() -> None:
    s = sequence(10)
    scheduler = scheduler_with([s], samples_prompts=True)
    ended = queue(scheduler.plan(0, 100))
    plan = scheduler.plan(0, 100)
    assert plan.decode == (s,)
    read(scheduler, ended)
    read(scheduler, queue(plan))
    assert s.num_generated == 2


def test_where_others_begin_with_the_same_prompt_it_is_not_sampled_before_they_are_there() -> None:
    first, second = (sequence(range(10)) for _ in range(2))
    scheduler = scheduler_with([first, second], samples_prompts=True)
    assert step(scheduler).prefill == (Chunk(first, 0, 9),)
    plan = step(scheduler)
    assert [fork.child for fork in plan.forks] == [second]
    assert plan.decode == (first, second)


def test_a_prompt_of_one_token_is_decoded() -> None:
    s = sequence(1)
    assert step(scheduler_with([s], samples_prompts=True)).decode == (s,)


def test_the_first_who_came_is_prefilled_first_and_the_rest_of_the_budget_goes_to_the_next() -> None:
    first, second, third = sequence(8, at=0), sequence(8, at=1), sequence(8, at=2)
    scheduler = scheduler_with([first, second, third])
    assert chunks(step(scheduler, budget=10)) == [(first, 0, 7), (second, 0, 3)]
    plan = step(scheduler, budget=10)
    assert chunks(plan) == [(second, 3, 7), (third, 0, 6)]
    assert plan.decode == (first,)


def test_the_more_urgent_is_prefilled_first() -> None:
    normal, low, high = sequence(8), sequence(8, priority="low"), sequence(8, priority="high")
    scheduler = scheduler_with([normal, low, high])
    assert chunks(step(scheduler, budget=15)) == [(high, 0, 7), (normal, 0, 7), (low, 0, 1)]


def test_a_long_prompt_does_not_hold_up_those_that_decode() -> None:
    talking, long = sequence(1, max_tokens=100), sequence(1000)
    scheduler = scheduler_with([talking, long])
    for _ in range(50):
        assert talking in step(scheduler, budget=10).decode


def test_nobody_is_decoded_more_often_than_tokens_are_wanted() -> None:
    s = sequence(1, max_tokens=2)
    scheduler = scheduler_with([s])
    first, second = queue(scheduler.plan(0.0, 10)), queue(scheduler.plan(0.0, 10))
    assert (first.plan.decode, second.plan.decode) == ((s,), (s,))
    assert scheduler.plan(0.0, 10).is_empty
    read(scheduler, first)
    read(scheduler, second)
    assert s.finished


def test_nobody_is_decoded_before_their_prefill_has_been_read() -> None:
    s = sequence(5)
    scheduler = scheduler_with([s])
    queued = queue(scheduler.plan(0.0, 2))
    last = queue(scheduler.plan(0.0, 2))
    assert chunks(last.plan) == [(s, 2, 4)]
    assert scheduler.plan(0.0, 2).is_empty
    read(scheduler, queued)
    assert scheduler.plan(0.0, 2).is_empty
    read(scheduler, last)
    assert scheduler.plan(0.0, 2).decode == (s,)


@pytest.mark.requirement("P.1")
def test_a_place_that_is_given_up_is_taken_in_the_next_plan() -> None:
    sequences = [sequence(1, at=float(i)) for i in range(3)]
    scheduler = scheduler_with(sequences, max_sequences=2)
    assert step(scheduler, now=3.0).decode == tuple(sequences[:2])
    scheduler.remove(sequences[0])
    assert step(scheduler, now=4.0).decode == (sequences[1], sequences[2])
    assert [s.admitted for s in sequences] == [3.0, 3.0, 4.0]


def test_removing_one_that_waits_or_is_unknown_moves_nobody() -> None:
    sequences = [sequence(1) for _ in range(4)]
    scheduler = scheduler_with(sequences, max_sequences=1)
    step(scheduler)
    scheduler.remove(sequences[2])
    scheduler.remove(sequences[2])
    scheduler.remove(sequence(1))
    assert (scheduler.running, scheduler.waiting) == ([sequences[0]], [sequences[1], sequences[3]])


def test_there_is_work_until_everybody_is_gone() -> None:
    waits, runs = sequence(1, at=1), sequence(1)
    scheduler = scheduler_with([waits, runs], max_sequences=1)
    step(scheduler)
    scheduler.remove(runs)
    assert scheduler.has_work
    scheduler.remove(waits)
    assert not scheduler.has_work


def test_those_whose_deadline_has_passed_are_named_wherever_they_are() -> None:
    runs, waits, later, never = sequence(1, deadline=5.0), sequence(1, deadline=4.0), sequence(1, deadline=6.0), sequence(1)
    scheduler = scheduler_with([runs, waits, later, never], max_sequences=1)
    step(scheduler)
    assert scheduler.expired(3.9) == []
    assert scheduler.expired(5.0) == [runs, waits]


# ---- who is admitted


@pytest.mark.parametrize(("num_blocks", "is_admitted"), [(5, False), (6, True)])
def test_a_place_takes_blocks_for_all_tokens_and_one_for_each_who_runs(num_blocks: int, is_admitted: bool) -> None:
    running, other = [sequence(32, at=0), sequence(20, at=0)], sequence(64, at=1)
    scheduler = scheduler_with(running, num_blocks=num_blocks)
    step(scheduler)
    scheduler.add(other)
    assert step(scheduler).admitted == ((other,) if is_admitted else ())
    assert (other in scheduler.running) == is_admitted


def test_a_lone_sequence_may_take_everything() -> None:
    s = sequence(96)
    scheduler = scheduler_with([s], num_blocks=3)
    assert step(scheduler).admitted == (s,)


def test_blocks_that_others_hold_already_are_not_counted() -> None:
    talking = sequence(97, max_tokens=100)
    scheduler = scheduler_with([talking], num_blocks=6)
    step(scheduler)
    other, same = sequence(97, at=1), sequence([*talking.spec.prompt[:96], 1], at=2)
    scheduler.add(other)
    assert step(scheduler).admitted == ()
    scheduler.remove(other)
    scheduler.add(same)
    assert step(scheduler).admitted == (same,), "a block for its last token, and one for who runs"


@pytest.mark.parametrize(("num_blocks", "is_admitted"), [(6, False), (7, True)])
def test_blocks_that_are_found_cannot_be_given_away_at_the_same_time(num_blocks: int, is_admitted: bool) -> None:
    before = sequence(65, max_tokens=1)
    scheduler = scheduler_with([before], num_blocks=num_blocks)
    finish(scheduler, before)
    talking, after = sequence(32, max_tokens=100), sequence([*before.spec.prompt[:64], *tokens(65)])
    scheduler.add(talking)
    step(scheduler)
    scheduler.add(after)
    step(scheduler)
    assert (after in scheduler.running) == is_admitted
    assert after.num_cached == (64 if is_admitted else 0)


def test_cached_blocks_are_taken_for_newcomers() -> None:
    before = sequence(97, max_tokens=1)
    scheduler = scheduler_with([before], num_blocks=4)
    finish(scheduler, before)
    other = sequence(97)
    scheduler.add(other)
    assert step(scheduler).admitted == (other,)
    assert scheduler.pool.num_evictions == 3


def test_the_most_urgent_who_does_not_fit_holds_up_who_comes_after() -> None:
    runs, large, small = sequence(32, at=0), sequence(96, at=1), sequence(1, at=2)
    scheduler = scheduler_with([runs], num_blocks=4)
    step(scheduler)
    add(scheduler, small, large)
    assert step(scheduler).admitted == ()
    scheduler.remove(large)
    assert step(scheduler).admitted == (small,)


def test_who_waited_long_comes_before_a_newcomer_of_a_higher_class() -> None:
    runs = sequence(1, max_tokens=1, at=0, priority="high")
    low = sequence(1, at=0, priority="low")
    scheduler = scheduler_with([runs, low], max_sequences=1)
    step(scheduler, now=0.0)
    waited = 2 * AGEING_S
    add(scheduler, sequence(1, at=waited - 1, priority="normal"), sequence(1, at=waited + 0.1, priority="high"))
    assert step(scheduler, now=waited + 0.1).admitted == (low,)


def test_who_has_not_waited_long_enough_comes_after_a_higher_class() -> None:
    low, normal, high = sequence(1, at=0, priority="low"), sequence(1, at=1), sequence(1, at=2, priority="high")
    scheduler = scheduler_with([low, normal, high], max_sequences=2)
    assert step(scheduler, now=3.0).admitted == (high, normal)


def test_ageing_counts_all_the_time_that_was_waited_but_none_that_was_run() -> None:
    s = sequence(1, max_tokens=100, at=0, priority="low")
    scheduler = scheduler_with([s], max_sequences=1)
    step(scheduler, now=4.0)
    scheduler.add(sequence(1, max_tokens=100, at=50, priority="high"))
    assert step(scheduler, now=50.0).preempted == (s,)
    assert (s.waited_s, s.waiting_since) == (4.0, 50.0)
    scheduler.remove(scheduler.running[0])
    step(scheduler, now=53.0)
    assert (s.waited_s, s.waiting_since) == (7.0, None)


def test_clients_take_turns_at_the_places() -> None:
    many = [sequence(1, at=0, client="many") for _ in range(4)]
    few = [sequence(1, at=1, client="few") for _ in range(2)]
    scheduler = scheduler_with([*many, *few], max_sequences=4)
    assert step(scheduler, now=1.0).admitted == (many[0], few[0], many[1], few[1])


def test_a_client_with_places_comes_after_one_without_until_it_has_waited() -> None:
    many = [sequence(1, max_tokens=100, at=0, client="many") for _ in range(2)]
    scheduler = scheduler_with(many, max_sequences=4)
    step(scheduler)
    third = sequence(1, at=0, client="many")
    scheduler.add(third)
    soon, late = sequence(1, at=1, client="few"), sequence(1, at=AGEING_S, client="other")
    add(scheduler, soon)
    assert scheduler.plan(1.0, 10).admitted == (soon, third), "two of four places are worth half a class, one second a tenth of it"
    scheduler.remove(soon)
    scheduler.remove(third)
    waited = sequence(1, at=0, client="many")
    add(scheduler, waited, late)
    assert scheduler.plan(AGEING_S, 10).admitted == (waited, late)


def test_a_client_that_is_alone_may_have_all_places() -> None:
    scheduler = scheduler_with([sequence(1, client="one") for _ in range(4)], max_sequences=4)
    assert len(step(scheduler).admitted) == 4


def test_fairness_does_not_set_classes_aside() -> None:
    high = [sequence(1, at=0, priority="high", client="many") for _ in range(3)]
    normal = sequence(1, at=0, client="few")
    scheduler = scheduler_with([normal, *high], max_sequences=4)
    assert step(scheduler).admitted == (*high, normal)


# ---- what is shared


def test_a_prefix_that_was_computed_before_is_not_computed_again() -> None:
    before = sequence(70, max_tokens=1)
    scheduler = scheduler_with([before])
    finish(scheduler, before)
    after = sequence([*before.spec.prompt, 1, 2, 3])
    scheduler.add(after)
    plan = step(scheduler)
    assert (plan.admitted, chunks(plan)) == ((after,), [(after, 64, 72)])
    assert after.num_cached == 64


def test_what_was_generated_is_shared_like_a_prompt() -> None:
    before = sequence(32, max_tokens=33)
    scheduler = scheduler_with([before])
    finish(scheduler, before)
    after = sequence([*before.tokens, 1])
    scheduler.add(after)
    step(scheduler)
    assert after.num_cached == 64


@pytest.mark.parametrize(("length", "num_hits"), [(32, 0), (33, 1), (64, 1), (65, 2)])
def test_the_last_token_is_always_left_to_compute(length: int, num_hits: int) -> None:
    before = sequence(100, max_tokens=1)
    scheduler = scheduler_with([before])
    finish(scheduler, before)
    again = sequence(before.spec.prompt[:length])
    scheduler.add(again)
    plan = step(scheduler)
    assert again.num_cached == num_hits * BLOCK_TOKENS < length
    assert plan.decode == ((again,) if again.num_cached == length - 1 else ())


def test_a_running_sequence_shares_what_it_has_computed() -> None:
    talking = sequence(64, max_tokens=100)
    scheduler = scheduler_with([talking])
    step(scheduler)
    other = sequence([*talking.spec.prompt, 1])
    scheduler.add(other)
    step(scheduler)
    assert other.num_cached == 32
    assert other.table[0] == talking.table[0]
    assert not set(other.table[1:]) & set(talking.table)


def test_a_digest_that_stands_for_other_tokens_is_no_hit() -> None:
    s = sequence(40)
    scheduler = scheduler_with([s])
    [digest] = digests(s)
    block = scheduler.pool.allocate()
    assert block is not None
    scheduler.pool.publish(block, Content(digest, KEYS.root(""), (1,) * BLOCK_TOKENS, resumable=True))
    scheduler.pool.release(block)
    step(scheduler)
    assert (s.num_cached, s.prefill_end) == (0, 39)
    assert block not in s.table


def digests(s: Sequence) -> list[bytes]:
    found: list[bytes] = []
    prefix.extend(found, s.tokens, KEYS.root(s.spec.tenant))
    return found


def test_tenants_share_nothing() -> None:
    one = sequence(40, max_tokens=100, tenant="one")
    scheduler = scheduler_with([one])
    step(scheduler)
    other = sequence(one.spec.prompt, tenant="other")
    scheduler.add(other)
    plan = step(scheduler)
    assert (plan.admitted, plan.forks, other.num_cached) == ((other,), (), 0)


def test_tenants_do_not_wait_for_each_other() -> None:
    prompt = tokens(200)
    one, other = sequence(prompt, tenant="one"), sequence(prompt, tenant="other")
    short, too = sequence(prompt[:5], tenant="one"), sequence(prompt[:5], tenant="other")
    scheduler = scheduler_with([one, other, short, too])
    assert step(scheduler, budget=10).admitted == (one, other, short, too)


def test_clients_of_one_tenant_share() -> None:
    before = sequence(70, max_tokens=1, client="one", tenant="both")
    scheduler = scheduler_with([before])
    finish(scheduler, before)
    after = sequence(before.spec.prompt, client="other", tenant="both")
    scheduler.add(after)
    step(scheduler)
    assert after.num_cached == 64


def test_of_a_prefix_that_nobody_holds_the_end_is_forgotten_first() -> None:
    before = sequence(97, max_tokens=1)
    scheduler = scheduler_with([before])
    finish(scheduler, before)
    scheduler.pool.evict(1)
    after = sequence(before.spec.prompt)
    scheduler.add(after)
    step(scheduler)
    assert after.num_cached == 64


def test_only_full_blocks_that_have_been_computed_can_be_found() -> None:
    s = sequence(100)
    scheduler = scheduler_with([s])
    queued = queue(scheduler.plan(0.0, 70))
    assert scheduler.publish(s) == []
    s.num_computed = queued.plan.prefill[0].stop
    assert scheduler.publish(s) == [(0, s.table[0]), (1, s.table[1])]
    assert scheduler.publish(s) == []
    assert [scheduler.pool.content(block) is not None for block in s.table] == [True, True, False, False]


def test_of_two_who_computed_the_same_one_is_known_and_the_other_is_free_at_the_end() -> None:
    prompt = tokens(28)
    one, two = sequence(prompt, max_tokens=10), sequence([*prompt, GENERATED], max_tokens=10)
    scheduler = scheduler_with([one, two])
    finish(scheduler, one, two)
    assert scheduler.pool.num_cached == 1


def test_what_nobody_holds_cannot_be_published() -> None:
    s = sequence(40)
    scheduler = scheduler_with([s])
    step(scheduler)
    scheduler.remove(s)
    assert scheduler.publish(s) == []


# ---- who waits for whom


def test_siblings_wait_for_the_one_who_computes_what_they_share() -> None:
    shared = tokens(64)
    leader, *siblings = [sequence([*shared, *tokens(10)], at=float(i)) for i in range(4)]
    scheduler = scheduler_with([leader, *siblings])
    for _ in range(2):
        plan = step(scheduler, budget=32)
        assert [c.sequence for c in plan.prefill] == [leader]
    plan = step(scheduler, budget=1000)
    assert plan.admitted == tuple(siblings)
    assert [s.num_cached for s in siblings] == [64, 64, 64]
    assert chunks(plan) == [(s, 64, 73) for s in (leader, *siblings)]


def test_who_shares_less_is_admitted_sooner() -> None:
    shared = tokens(64)
    leader, sibling = sequence([*shared, *tokens(10)], at=0), sequence([*shared[:32], *tokens(10)], at=1)
    scheduler = scheduler_with([leader, sibling])
    step(scheduler, budget=32)
    assert step(scheduler, budget=32).admitted == (sibling,)
    assert sibling.num_cached == 32


def test_who_waits_for_a_sibling_holds_up_nobody_else() -> None:
    shared = tokens(64)
    leader, sibling, other = sequence([*shared, 1], at=0), sequence([*shared, 2], at=1), sequence(5, at=2)
    scheduler = scheduler_with([leader, sibling, other])
    assert step(scheduler, budget=10).admitted == (leader, other)


def test_when_the_leader_leaves_a_sibling_computes_what_is_missing() -> None:
    shared = tokens(96)
    leader, sibling = sequence([*shared, 1], at=0), sequence([*shared, 2], at=1)
    scheduler = scheduler_with([leader, sibling])
    step(scheduler, budget=32)
    scheduler.remove(leader)
    plan = step(scheduler)
    assert chunks(plan) == [(sibling, 32, 96)]


def test_the_leader_is_as_urgent_as_the_most_urgent_who_waits_for_it() -> None:
    shared = tokens(64)
    leader, normal = sequence([*shared, 1], priority="low"), sequence(200)
    scheduler = scheduler_with([leader, normal])
    plan = step(scheduler, budget=32)
    assert [c.sequence for c in plan.prefill] == [normal]
    scheduler.add(sequence([*shared, 2], priority="high"))
    plan = step(scheduler, budget=32)
    assert [c.sequence for c in plan.prefill] == [leader]


# ---- first tokens in the midst of a step


HIGH = URGENCY["high"]


def test_what_comes_in_between_is_for_first_tokens_of_the_more_urgent_alone() -> None:
    low, waiting = sequence(50, priority="low"), sequence(9, priority="low")
    high, talking = sequence(40, priority="high"), sequence(1, 9, priority="high")
    scheduler = scheduler_with([low, talking])
    step(scheduler, budget=10)
    add(scheduler, waiting, high)
    plan = scheduler.plan_first_tokens(0.0, 100, HIGH)
    assert (plan.admitted, plan.decode, chunks(plan)) == ((high,), (), [(high, 0, 39)])
    read(scheduler, queue(plan))
    assert scheduler.plan_first_tokens(0.0, 100, HIGH).is_empty, "its last token decodes with the others"


def test_in_between_a_last_token_alone_samples_where_it_can() -> None:
    one, short = sequence(1, priority="high"), sequence(30, priority="high")
    scheduler = scheduler_with([one, short], samples_prompts=True)
    plan = scheduler.plan_first_tokens(0.0, 1, HIGH)
    assert plan.prefill == (Chunk(one, 0, 1, samples=True), Chunk(short, 0, 1))
    read(scheduler, queue(plan))
    assert one.num_generated == 1
    assert scheduler_with([sequence(1, priority="high")]).plan_first_tokens(0.0, 1, HIGH).prefill == ()


def test_who_is_in_a_step_that_is_not_read_yet_is_not_taken_on_whoever_waits_for_it() -> None:
    """It is more urgent from then on, and its prompt would be computed twice as far."""
    shared = tokens(64)
    leader, high = sequence([*shared, 1], priority="low"), sequence([*shared, 2], priority="high")
    scheduler = scheduler_with([leader])
    under_way = queue(scheduler.plan(0.0, 20))
    scheduler.add(high)
    assert scheduler.plan_first_tokens(0.0, 100, HIGH).is_empty
    read(scheduler, under_way)
    assert chunks(scheduler.plan_first_tokens(0.0, 100, HIGH)) == [(leader, 20, 64)]


def test_in_between_nobody_overtakes_whose_turn_it_is_after_a_long_wait() -> None:
    low, high = sequence(1, at=0, priority="low"), sequence(1, at=2 * AGEING_S, priority="high")
    scheduler = scheduler_with([low, high], max_sequences=1, samples_prompts=True)
    assert scheduler.plan_first_tokens(2 * AGEING_S + 1, 10, HIGH).is_empty
    scheduler.remove(low)
    assert scheduler.plan_first_tokens(2 * AGEING_S + 1, 10, HIGH).admitted == (high,)


def test_who_was_waited_for_is_as_urgent_as_before_once_its_prompt_is_there() -> None:
    shared = tokens(64)
    leader, high = sequence([*shared, 1], priority="low"), sequence([*shared, 2], priority="high")
    scheduler = scheduler_with([leader])
    step(scheduler, budget=20)
    scheduler.add(high)
    step(scheduler, budget=20)
    assert leader.urgency == HIGH
    step(scheduler)
    assert leader.urgency == URGENCY["low"]


# ---- copies of a prompt


@pytest.mark.parametrize("length", [5, 32, 40, 64])
def test_copies_of_a_prompt_are_made_when_its_prefill_has_been_read(length: int) -> None:
    parent, one, two = (sequence(prompt, at=float(i)) for i, prompt in enumerate([tokens(length)] * 3))
    scheduler = scheduler_with([parent, one, two])
    queued = queue(scheduler.plan(2.0, 1000))
    assert (queued.plan.admitted, queued.plan.forks) == ((parent,), ())
    assert scheduler.plan(2.0, 1000).is_empty
    read(scheduler, queued)
    plan = scheduler.plan(2.0, 1000)
    tail = (length - 1) // BLOCK_TOKENS
    assert plan == Plan(
        forks=(
            Fork(one, parent, parent.table[tail], one.table[tail]),
            Fork(two, parent, parent.table[tail], two.table[tail]),
        ),
        decode=(parent, one, two),
    )
    assert parent.table[:tail] == one.table[:tail] == two.table[:tail]
    assert len({parent.table[tail], one.table[tail], two.table[tail]}) == 3
    assert one.num_cached == two.num_cached == length - 1
    scheduler.check_integrity()


@pytest.mark.parametrize("length", [1, 33, 65])
def test_where_a_block_ends_before_the_last_token_nothing_is_copied(length: int) -> None:
    prompt = tokens(length)
    parent, child = sequence(prompt), sequence(prompt)
    scheduler = scheduler_with([parent, child])
    plan = step(scheduler) if length == 1 else [step(scheduler), step(scheduler)][1]
    assert plan.forks == (Fork(child, parent, None, None),)
    assert plan.decode == (parent, child)
    assert parent.table[:-1] == child.table[:-1]
    assert parent.table[-1] != child.table[-1]


def test_a_copy_takes_what_was_found_not_computed_as_well() -> None:
    before = sequence(65, max_tokens=1)
    scheduler = scheduler_with([before])
    finish(scheduler, before)
    parent, child = sequence(before.spec.prompt), sequence(before.spec.prompt)
    add(scheduler, parent, child)
    plan = step(scheduler)
    assert (plan.admitted, plan.forks, plan.decode) == ((parent,), (Fork(child, parent, None, None),), (parent, child))


def test_who_comes_after_the_parent_has_sampled_shares_its_blocks_only() -> None:
    parent = sequence(40, max_tokens=100)
    scheduler = scheduler_with([parent])
    step(scheduler)
    queued = queue(scheduler.plan(0.0, 100))
    late = sequence(parent.spec.prompt)
    scheduler.add(late)
    plan = scheduler.plan(0.0, 100)
    assert (plan.admitted, plan.forks) == ((late,), ())
    assert chunks(plan) == [(late, 32, 39)]
    read(scheduler, queued)


def test_a_copy_that_finds_no_place_goes_on_from_the_blocks_that_are_shared() -> None:
    prompt = tokens(40)
    parent, child = sequence(prompt, max_tokens=2), sequence(prompt)
    scheduler = scheduler_with([parent, child], max_sequences=1)
    finish(scheduler, parent)
    plan = step(scheduler)
    assert (plan.admitted, plan.forks, chunks(plan)) == ((child,), (), [(child, 32, 39)])


def test_a_copy_needs_blocks_only_for_what_is_not_shared() -> None:
    prompt = tokens(100)
    parent, child = sequence(prompt), sequence(prompt)
    scheduler = scheduler_with([parent, child], num_blocks=6)
    step(scheduler)
    assert step(scheduler).forks == (Fork(child, parent, parent.table[3], child.table[3]),)
    assert scheduler.pool.num_held == 5


def test_a_copy_that_gave_way_and_comes_back_as_a_copy_was_cached_as_much_as_at_first() -> None:
    prompt = tokens(30)
    one, two = sequence(prompt, max_tokens=60), sequence(prompt, max_tokens=60)
    scheduler = scheduler_with([one, two], max_sequences=2)
    while one.num_generated < 20:
        step(scheduler)
    assert (one.num_cached, two.num_cached) == (0, 29)
    add(scheduler, *(sequence(1, max_tokens=1, priority="high") for _ in range(2)))
    assert set(step(scheduler).preempted) == {one, two}
    while len(scheduler.running) < 2:
        step(scheduler)
    assert {one.num_cached, two.num_cached} == {0, 29}


# ---- who gives way


def test_a_row_gets_a_block_when_its_next_token_needs_one() -> None:
    s = sequence(31, max_tokens=100)
    scheduler = scheduler_with([s])
    step(scheduler)
    sizes = [(step(scheduler), len(s.table))[1] for _ in range(34)]
    assert sizes == [1] * 2 + [2] * 32


def test_when_there_is_no_block_the_newest_gives_way_and_comes_back_with_what_it_had_generated() -> None:
    old, new = sequence(32, max_tokens=40, at=0), sequence(30, max_tokens=40, at=1)
    scheduler = scheduler_with([old, new], num_blocks=3)
    plans = [step(scheduler, now=1.0)]
    while not plans[-1].preempted:
        plans.append(step(scheduler, now=1.0))
    assert plans[-1].preempted == (new,)
    assert old in plans[-1].decode
    assert new not in plans[-1].decode
    assert (new.table, new.num_queued, new.num_computed, new.num_published) == ([], 0, 0, 0)
    kept = list(new.generated)
    assert kept
    assert scheduler.num_preemptions == 1
    finish(scheduler, old, now=1.0)
    assert new.generated == kept, "it waits until there is room"
    finish(scheduler, new, now=1.0)
    assert new.generated == [GENERATED] * 40


def test_what_one_who_gave_way_had_computed_is_found_again_if_nobody_needed_the_room() -> None:
    s = sequence(70, max_tokens=10, priority="low")
    scheduler = scheduler_with([s], max_sequences=1)
    step(scheduler)
    urgent = sequence(1, max_tokens=1, priority="high")
    scheduler.add(urgent)
    assert step(scheduler).preempted == (s,)
    plan = step(scheduler)
    assert (plan.admitted, chunks(plan)) == ((s,), [(s, 64, 69)])
    assert s.num_cached == 0, "nothing was there when it came"


def test_who_gives_way_comes_back_in_a_later_plan_when_all_its_tokens_are_known() -> None:
    s = sequence(1, max_tokens=10, priority="low")
    urgent = sequence(1, max_tokens=10, priority="high")
    scheduler = scheduler_with([s], max_sequences=1)
    queued = queue(scheduler.plan(0.0, 10))
    scheduler.add(urgent)
    plan = scheduler.plan(0.0, 10)
    assert (plan.preempted, plan.admitted) == ((s,), (urgent,))
    scheduler.remove(urgent)
    read(scheduler, queued)
    assert s.generated == [GENERATED]
    assert (s.num_computed, s.num_sampled) == (0, 1)
    plan = scheduler.plan(0.0, 10)
    assert (plan.admitted, s.prefill_end) == ((s,), 1)


def test_the_least_urgent_gives_way_whoever_came_first() -> None:
    low, normal = sequence(30, max_tokens=80, at=0, priority="low"), sequence(32, max_tokens=60, at=1)
    scheduler = scheduler_with([low, normal], num_blocks=3)
    plan = step(scheduler, now=1.0)
    while not plan.preempted:
        plan = step(scheduler, now=1.0)
    assert plan.preempted == (low,)


def test_who_needs_the_block_gives_way_itself_if_it_is_the_least_urgent() -> None:
    old, new = sequence(1, max_tokens=60, at=0), sequence(31, max_tokens=60, at=1)
    scheduler = scheduler_with([old, new], num_blocks=3)
    plan = step(scheduler, now=1.0)
    while not plan.preempted:
        plan = step(scheduler, now=1.0)
    assert plan.preempted == (new,)
    assert (len(old.table), old.num_queued) == (2, 33)


def test_a_higher_class_gets_the_place_of_a_lower_one() -> None:
    low, normal = sequence(1, max_tokens=9, priority="low"), sequence(1, max_tokens=9)
    scheduler = scheduler_with([low, normal], max_sequences=2)
    step(scheduler)
    high = sequence(1, priority="high")
    scheduler.add(high)
    plan = step(scheduler)
    assert (plan.preempted, plan.admitted, plan.decode) == ((low,), (high,), (normal, high))


def test_a_higher_class_gets_the_blocks_of_lower_ones() -> None:
    lows = [sequence(32, max_tokens=9, at=float(i), priority="low") for i in range(3)]
    scheduler = scheduler_with(lows, num_blocks=6)
    step(scheduler, now=2.0)
    high = sequence(100, at=3.0, priority="high")
    scheduler.add(high)
    plan = step(scheduler, now=3.0)
    assert (plan.preempted, plan.admitted) == ((lows[2], lows[1]), (high,)), "four blocks, and one for who is left"


def test_within_a_class_nobody_gives_way_however_long_somebody_waits() -> None:
    first, second = sequence(1, max_tokens=50, at=0), sequence(1, at=0)
    scheduler = scheduler_with([first, second], max_sequences=1)
    for i in range(20):
        assert step(scheduler, now=i * AGEING_S).preempted == ()
    assert scheduler.running == [first]


def test_who_was_admitted_in_a_plan_does_not_give_way_in_it() -> None:
    first, second = sequence(1, priority="high", at=0), sequence(1, priority="high", at=1)
    low = sequence(1, priority="low", at=0)
    scheduler = scheduler_with([low], max_sequences=1)
    step(scheduler)
    add(scheduler, first, second)
    plan = step(scheduler, now=1.0)
    assert (plan.preempted, plan.admitted) == ((low,), (first,))


def test_nobody_is_a_copy_of_one_who_gives_way_to_it() -> None:
    low = sequence(40, priority="low")
    scheduler = scheduler_with([low], max_sequences=1)
    step(scheduler)
    high = sequence(low.spec.prompt, priority="high")
    scheduler.add(high)
    plan = step(scheduler)
    assert (plan.preempted, plan.admitted, plan.forks) == ((low,), (high,), ())
    assert chunks(plan) == [(high, 32, 39)]


def test_one_who_was_copied_in_a_plan_does_not_give_way_in_it() -> None:
    low = sequence(40, priority="low")
    scheduler = scheduler_with([low], max_sequences=2)
    step(scheduler)
    copy, other = sequence(low.spec.prompt, priority="high", at=0), sequence(1, priority="high", at=1)
    add(scheduler, copy, other)
    plan = step(scheduler, now=1.0)
    assert (plan.preempted, [fork.child for fork in plan.forks], plan.decode) == ((), [copy], (low, copy))
    plan = step(scheduler, now=1.0)
    assert (plan.preempted, plan.admitted) == ((low,), (other,))


def test_two_of_one_class_that_do_not_fit_together_both_end_however_slow_the_device() -> None:
    one, two = (sequence(100, max_tokens=3, at=0) for _ in range(2))
    scheduler = scheduler_with([one, two], num_blocks=4)
    for i in range(100):
        step(scheduler, now=6.0 * i, budget=20)
    assert (one.num_generated, two.num_generated) == (3, 3)


def test_a_low_one_is_sent_away_only_so_often_however_many_high_ones_come() -> None:
    low = sequence(1, max_tokens=20, at=0, priority="low")
    scheduler = scheduler_with([low], max_sequences=1)
    for i in range(300):
        if i % 3 == 0:
            scheduler.add(sequence(1, max_tokens=2, at=float(i), priority="high"))
        step(scheduler, now=float(i))
    assert low.finished


@pytest.mark.parametrize("prompt_length", [1, 31, 32, 33, 64, 127])
@pytest.mark.parametrize(
    "policy", [{}, {"max_row_tokens": 128}, {"needs_states": True}, {"max_scores": 1}, {"cost": PassCost(10, 1), "max_pass_bytes": 138}]
)
def test_a_lone_sequence_runs_to_the_end_of_all_there_is(prompt_length: int, policy: dict[str, Any]) -> None:
    scheduler = scheduler_with(num_blocks=4, **policy)
    assert scheduler.max_tokens == 128
    s = sequence(prompt_length, max_tokens=128 - prompt_length)
    scheduler.add(s)
    finish(scheduler, s)
    assert scheduler.num_preemptions == 0
    assert scheduler.pool.num_held == 0


# ---- what a cache can bear


def test_where_rows_are_padded_their_number_times_the_longest_is_bounded() -> None:
    long, short, other = sequence(60, at=0), sequence(1, at=1), sequence(1, at=2)
    scheduler = scheduler_with([long, short, other], max_row_tokens=128)
    assert step(scheduler).admitted == (long, short)


def test_who_grows_beyond_what_padded_rows_may_have_sends_the_newest_away() -> None:
    old, new = sequence(32, max_tokens=40, at=0), sequence(1, max_tokens=40, at=1)
    scheduler = scheduler_with([old, new], max_row_tokens=96)
    assert set(step(scheduler).admitted) == {old, new}
    plan = step(scheduler)
    while not plan.preempted:
        plan = step(scheduler)
    assert plan.preempted == (new,)
    assert len(old.table) == 2
    finish(scheduler, old, new)


@pytest.mark.parametrize("max_row_tokens", [96, 100, 127])
def test_the_longest_that_is_let_in_fits_whatever_the_bound(max_row_tokens: int) -> None:
    scheduler = scheduler_with(max_row_tokens=max_row_tokens)
    s = sequence(scheduler.max_tokens - 1, max_tokens=1)
    scheduler.add(s)
    finish(scheduler, s)


def test_a_chunk_attends_to_no_more_at_once_than_there_may_be_scores() -> None:
    s = sequence(300)
    scheduler = scheduler_with([s], max_scores=5_000)
    sizes: list[int] = []
    while not s.finished:
        for chunk in step(scheduler).prefill:
            sizes.append(chunk.stop - chunk.start)
            assert sizes[-1] * chunk.stop <= 5_000
    assert sum(sizes) == 299
    assert sizes[0] > sizes[-1]


def test_the_pieces_of_a_step_take_no_more_than_a_pass_may() -> None:
    several = [sequence(300), sequence(200), sequence(40)]
    cost = PassCost(token_bytes=50, pair_bytes=1)
    scheduler = scheduler_with(several, cost=cost, max_pass_bytes=20_000)
    num_together = 0
    while not all(s.finished for s in several):
        plan = step(scheduler)
        assert sum(cost.of(chunk.stop - chunk.start, chunk.start) for chunk in plan.prefill) <= 20_000
        num_together = max(num_together, len(plan.prefill))
    assert num_together > 1


def test_a_sequence_is_no_longer_than_its_last_piece_can_be_computed() -> None:
    scheduler = scheduler_with(cost=PassCost(token_bytes=50, pair_bytes=2), max_pass_bytes=450)
    assert scheduler.max_tokens == 200
    s = sequence(199, max_tokens=1)
    scheduler.add(s)
    while not s.finished:
        for chunk in step(scheduler).prefill:
            assert (chunk.stop - chunk.start) * (50 + 2 * chunk.stop) <= 450
    assert scheduler_with(cost=PassCost(50, 2), max_pass_bytes=10).max_tokens == 0


def test_where_layers_keep_states_chunks_end_where_blocks_end() -> None:
    s = sequence(120)
    scheduler = scheduler_with([s], needs_states=True)
    assert [chunks(step(scheduler, budget=50))[0][1:] for _ in range(4)] == [(0, 32), (32, 64), (64, 96), (96, 119)]


def test_where_layers_keep_states_a_budget_below_a_block_still_gets_on() -> None:
    s = sequence(40)
    scheduler = scheduler_with([s], needs_states=True)
    assert [chunks(step(scheduler, budget=20))[0][1:] for _ in range(3)] == [(0, 20), (20, 32), (32, 39)]


def test_where_layers_keep_states_only_ends_of_chunks_can_be_gone_on_from() -> None:
    before = sequence(110, max_tokens=1)
    scheduler = scheduler_with([before], needs_states=True)
    step(scheduler, budget=64)  # to 64
    finish(scheduler, before)  # to 96, then the tail
    found: list[int] = []
    for length in (110, 90, 60):
        after = sequence([*before.spec.prompt[:length], *tokens(1)])
        scheduler.add(after)
        step(scheduler)
        found.append(after.num_cached)
    assert found == [96, 64, 0]


def test_where_layers_keep_states_a_prompt_is_copied_with_its_tail() -> None:
    prompt = tokens(40)
    parent, child = sequence(prompt), sequence(prompt)
    scheduler = scheduler_with([parent, child], needs_states=True)
    plans = [step(scheduler) for _ in range(3)]
    assert [len(plan.forks) for plan in plans] == [0, 0, 1]
    assert child.num_cached == 39


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (100, [(0, 79)]),
        (50, [(0, 40), (40, 79)]),
        (7, [(0, 7), (7, 10), (10, 30), (30, 37), (37, 40), (40, 70), (70, 77), (77, 79)]),
    ],
)
def test_no_chunk_ends_in_a_picture_that_looks_at_all_of_itself(budget: int, expected: list[tuple[int, int]]) -> None:
    pictures = tuple(
        PlacedPicture(start, Picture(b"", tuple(range(length)), tuple(range(length)), {})) for start, length in ((10, 20), (40, 30))
    )
    s = Sequence(SequenceSpec(tokens(80), 3, TokenSampling(seed=0), pictures=pictures), 0)
    scheduler = scheduler_with([s], whole_pictures=True)
    chunks: list[tuple[int, int]] = []
    while not chunks or s.num_prefill_left:
        chunks += [(chunk.start, chunk.stop) for chunk in step(scheduler, budget=budget).prefill]
    assert chunks == expected
