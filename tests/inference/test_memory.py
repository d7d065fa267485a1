"""What fits, and who must leave: figures in, a decision out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.hub.checkpoint import read
from mlx_manager.inference.memory import (
    LEAST_KV_BYTES,
    EvictionPolicy,
    Fit,
    MustLeave,
    Need,
    NoRoom,
    Reading,
    Resident,
    fit,
    least_kv,
    need,
    need_of,
    relief,
    taken,
    who_must_leave,
)
from tests.inference.fixture_models import folder

GB = 10**9


def a_need(weights: int, *, key: str = "", own: int = 0) -> Need:
    return Need(key or str(weights), weights, 0, own, 0)


def resident(id: str, size: int, *, last_used: float = 0.0, num_uses: int = 1, stays: bool = False, key: str = "") -> Resident:
    return Resident(id, a_need(size, key=key or id), stays, last_used, num_uses)


def test_the_least_recently_used_leaves_and_only_as_many_as_it_takes() -> None:
    there = [resident("a", 4, last_used=3), resident("b", 4, last_used=1), resident("c", 4, last_used=2)]
    assert who_must_leave(there, a_need(2), limit=14, policy="lru") == MustLeave(())
    assert who_must_leave(there, a_need(4), limit=14, policy="lru") == MustLeave(("b",))
    assert who_must_leave(there, a_need(8), limit=14, policy="lru") == MustLeave(("b", "c"))


def test_the_least_often_used_leaves_where_that_is_the_policy() -> None:
    there = [resident("old", 4, last_used=1, num_uses=9), resident("new", 4, last_used=2, num_uses=1)]
    assert who_must_leave(there, a_need(4), limit=10, policy="lru") == MustLeave(("old",))
    assert who_must_leave(there, a_need(4), limit=10, policy="lfu") == MustLeave(("new",))


def test_who_need_not_leave_after_all_stays() -> None:
    there = [resident("small", 1, last_used=1), resident("large", 9, last_used=2)]
    assert who_must_leave(there, a_need(9), limit=10, policy="lru") == MustLeave(("large",))


def test_who_is_busy_pinned_or_loading_never_leaves_and_the_refusal_has_the_numbers() -> None:
    there = [resident("busy", 6, stays=True), resident("idle", 3)]
    assert who_must_leave(there, a_need(4), limit=10, policy="lru") == MustLeave(("idle",))
    assert who_must_leave(there, a_need(5), limit=10, policy="lru") == NoRoom(needed=5, available=4)


def test_weights_that_several_share_count_once() -> None:
    base, adapted = Need("folder", 10, 0, 2, 1), Need("folder", 10, 1, 2, 1)
    assert taken([base, adapted]) == 10 + 3 + 4
    there = [Resident("base", base, True, 0, 1)]
    assert who_must_leave(there, adapted, limit=17, policy="lru") == MustLeave(())
    assert who_must_leave(there, adapted, limit=16, policy="lru") == NoRoom(needed=4, available=3)
    other = [Resident("base", base, False, 0, 1), Resident("adapted", adapted, True, 1, 1)]
    assert who_must_leave(other, a_need(4), limit=17, policy="lru") == NoRoom(needed=4, available=3), "its weights stay for the other"
    assert who_must_leave(other, a_need(2), limit=17, policy="lru") == MustLeave(("base",))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 4), st.booleans(), st.sampled_from("xyz")), max_size=7),
    wanted=st.integers(1, 12),
    limit=st.integers(5, 30),
    policy=st.sampled_from(["lru", "lfu"]),
)
def test_whoever_leaves_there_is_room_then_and_nobody_leaves_for_nothing(
    sizes: list[tuple[int, int, int, bool, str]], wanted: int, limit: int, policy: EvictionPolicy
) -> None:
    there = [Resident(str(i), Need(key, 4, 0, own, 0), stays, used, uses) for i, (own, used, uses, stays, key) in enumerate(sizes)]
    verdict = who_must_leave(there, a_need(wanted), limit=limit, policy=policy)
    if isinstance(verdict, NoRoom):
        assert verdict.needed > verdict.available
        return
    left = [r for r in there if r.id not in verdict.ids]
    assert not any(r.stays for r in there if r.id in verdict.ids)
    assert taken([*(r.need for r in left), a_need(wanted)]) <= limit
    for spared in verdict.ids:
        with_one_more = [r.need for r in there if r.id == spared or r.id not in verdict.ids]
        assert taken([*with_one_more, a_need(wanted)]) > limit


def test_a_model_gets_a_sixth_of_what_its_weights_leave_and_in_any_case_room_for_a_prompt() -> None:
    def kv(available: int) -> int:
        return need_of(
            weights_key="",
            weight_bytes=4 * GB,
            kv_bytes_per_token=100_000,
            context_length=32_768,
            prefill=0,
            available=available,
            kv_bytes=None,
        ).kv

    assert kv(28 * GB) == 4 * GB
    assert kv(5 * GB) == least_kv(100_000, 32_768) == 819_200_000


def test_what_is_said_of_keys_and_values_is_taken() -> None:
    said = need_of(weights_key="", weight_bytes=1, kv_bytes_per_token=8, context_length=64, prefill=0, available=GB, kv_bytes=7)
    assert said.kv == 7


def test_who_measures_texts_keeps_no_keys_and_who_keeps_states_instead_has_room_for_them() -> None:
    checkpoint = read(folder("qwen3"), "qwen3")
    for kind in ("embedding", "reranker"):
        assert need(replace(checkpoint, kind=kind), available=GB, kv_bytes=7, prefill_tokens=128).kv == 0
    recurrent = replace(checkpoint, kv_bytes_per_token=0)
    assert need(recurrent, available=0, kv_bytes=None, prefill_tokens=128).kv == LEAST_KV_BYTES


def verdict(weights: int, limit: int, *, context_length: int = 8192, kv_bytes_per_token: int | None = 100_000) -> Fit:
    wanted = need_of(
        weights_key="",
        weight_bytes=weights,
        kv_bytes_per_token=kv_bytes_per_token,
        context_length=context_length,
        prefill=GB // 10,
        available=limit,
        kv_bytes=None,
    )
    return fit(wanted, kv_bytes_per_token=kv_bytes_per_token, context_length=context_length, limit=limit)


def test_a_verdict_comes_with_its_arithmetic() -> None:
    fits = verdict(4 * GB, 16 * GB)
    assert (fits.verdict, fits.limit, fits.kv_for_context) == ("fits", 16 * GB, 819_200_000)
    assert fits.need.total == fits.need.weights + fits.need.kv + fits.need.prefill == 4 * GB + (16 * GB - 4 * GB - GB // 10) // 6 + GB // 10
    assert verdict(4 * GB, 16 * GB, context_length=131_072).verdict == "tight", "a prompt of the whole context has no room"
    assert verdict(9 * GB, 10 * GB).verdict == "tight"
    assert verdict(16 * GB, 16 * GB).verdict == "too large"
    assert verdict(4 * GB, 16 * GB, kv_bytes_per_token=None).kv_for_context is None


def test_a_checkpoints_own_need_is_read_from_its_folder() -> None:
    checkpoint = read(folder("qwen3"), "qwen3")
    wanted = need(checkpoint, available=GB, kv_bytes=None, prefill_tokens=128)
    assert wanted.weights == checkpoint.size_bytes
    assert wanted.kv == (GB - wanted.weights - wanted.prefill) // 6
    shorter = need(replace(checkpoint, context_length=64), available=GB, kv_bytes=None, prefill_tokens=128)
    assert shorter.prefill < wanted.prefill


def test_the_steps_come_one_after_the_other_and_end_only_when_it_is_clearly_better() -> None:
    def reading(active: int) -> Reading:
        return Reading(active=active, cached=1, limit=100, available=50, total=100)

    assert relief(reading(80), ()) == ()
    assert relief(reading(84), ()) == ("smaller prefill",)
    assert relief(reading(80), ("smaller prefill",)) == ("smaller prefill",)
    assert relief(reading(78), ("smaller prefill",)) == ()
    assert relief(reading(89), ()) == ("smaller prefill", "prefixes")
    assert relief(reading(94), ()) == ("smaller prefill", "prefixes", "idle models")
    assert relief(reading(97), ()) == ("smaller prefill", "prefixes", "idle models", "loads wait")
    assert relief(reading(99), ())[-1] == "loads wait", "a full pool is no emergency"
    assert relief(reading(100), ())[-1] == "refuse"


@pytest.mark.parametrize(("available", "steps"), [(20, 0), (15, 1), (10, 2), (5, 3), (0, 4)])
def test_a_machine_that_others_have_filled_asks_for_the_same(available: int, steps: int) -> None:
    assert len(relief(Reading(active=0, cached=0, limit=100, available=available, total=100), ())) == steps
