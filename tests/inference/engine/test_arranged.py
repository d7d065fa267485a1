"""Who is in which row of a batch."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.inference.engine.sequence import Sequence, SequenceSpec, TokenSampling
from mlx_manager.inference.engine.slot_cache import arranged

A, B, C, D, E = (Sequence(SequenceSpec((1,), 1, TokenSampling(0)), i) for i in range(5))


def test_who_stays_stays_where_they_are() -> None:
    assert arranged([A, B, C], [C, B, A], set()) == [A, B, C]


def test_newcomers_fill_holes_and_then_come_last() -> None:
    assert arranged([A, B, C], [A, C, D, E], set()) == [A, D, C, E]


def test_the_last_moves_into_a_hole_that_nobody_fills() -> None:
    assert arranged([A, B, C, D], [A, C, D], set()) == [A, D, C]
    assert arranged([A, B, C, D], [C, D], set()) == [D, C]


def test_into_a_blocked_row_nobody_moves() -> None:
    assert arranged([A, B, C], [A, C], {1}) == [A, None, C]
    assert arranged([A, B, C], [A, C, D], {1}) == [A, None, C, D]


def test_a_blocked_one_at_the_end_leaves_no_row_behind() -> None:
    assert arranged([A, B], [A], {1}) == [A]


def test_a_row_can_be_found_empty() -> None:
    assert arranged([A, None, C], [A, C, D], set()) == [A, D, C]
    assert arranged([], [A, B], set()) == [A, B]
    assert arranged([A], [], set()) == []


@dataclass(frozen=True)
class Case:
    old: list[Sequence | None]
    wanted: list[Sequence]
    blocked: set[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    everybody = [Sequence(SequenceSpec((1,), 1, TokenSampling(0)), i) for i in range(12)]
    old: list[Sequence | None] = list(everybody[: draw(st.integers(0, 8))])
    for hole in draw(st.sets(st.integers(0, 7))):
        if hole < len(old):
            old[hole] = None
    wanted = draw(st.permutations(draw(st.lists(st.sampled_from(everybody), unique=True))))
    blocked = {row for row in draw(st.sets(st.integers(0, 7))) if row < len(old)}
    return Case(old, list(wanted), blocked)


@given(cases())
def test_everybody_who_is_wanted_has_one_row_and_nobody_moves_where_somebody_still_reads(case: Case) -> None:
    rows = arranged(case.old, case.wanted, case.blocked)
    at = {s: row for row, s in enumerate(rows) if s is not None}
    was = {s: row for row, s in enumerate(case.old) if s is not None}
    assert sorted(s.index for s in rows if s is not None) == sorted(s.index for s in case.wanted)
    assert not rows or rows[-1] is not None
    for s, row in at.items():
        if was.get(s) != row:
            assert row not in case.blocked, "somebody still reads this row"
    moved = {s for s in at if s in was and was[s] != at[s]}
    for s in moved:
        assert at[s] < was[s] >= len(rows), "only the last move, into holes"
        assert case.old[at[s]] not in case.wanted
    assert not {was[s] for s in moved} & set(at.values()), "who moves in would overwrite what is being copied"
    assert all(row in case.blocked for row, s in enumerate(rows) if s is None), "a hole that could have been filled"


@given(cases())
def test_what_it_is_given_stays_as_it_was(case: Case) -> None:
    before = (list(case.old), list(case.wanted), set(case.blocked))
    arranged(case.old, case.wanted, case.blocked)
    assert (case.old, case.wanted, case.blocked) == before
