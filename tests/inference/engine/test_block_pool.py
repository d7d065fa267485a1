"""Who holds which block; no arrays."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, NULL_BLOCK, BlockPool, Content


def content(number: int, *, resumable: bool = True) -> Content:
    """Different tokens and digests for different numbers."""
    return Content(bytes([number]), b"parent", (number,) * BLOCK_TOKENS, resumable)


def find(pool: BlockPool, number: int) -> int | None:
    return pool.find(bytes([number]), (number,) * BLOCK_TOKENS)


def allocate(pool: BlockPool) -> int:
    block = pool.allocate()
    assert block is not None
    return block


def cached(pool: BlockPool, *numbers: int) -> list[int]:
    """Blocks that can be found and are held by nobody, the first of them the least recently used."""
    blocks = [allocate(pool) for _ in numbers]
    for block, number in zip(blocks, numbers, strict=True):
        assert pool.publish(block, content(number))
        pool.release(block)
    return blocks


def test_the_null_block_is_never_given_out() -> None:
    pool = BlockPool(4)
    assert sorted(allocate(pool) for _ in range(3)) == [1, 2, 3]
    assert pool.allocate() is None
    assert NULL_BLOCK == 0


def test_blocks_are_free_held_or_cached() -> None:
    pool = BlockPool(5)
    assert (pool.num_usable, pool.num_available, pool.num_held, pool.num_cached) == (4, 4, 0, 0)
    cached(pool, 1)
    allocate(pool)
    assert (pool.num_usable, pool.num_available, pool.num_held, pool.num_cached) == (4, 3, 1, 1)


def test_a_released_block_can_be_given_out_again() -> None:
    pool = BlockPool(2)
    block = allocate(pool)
    assert pool.allocate() is None
    pool.release(block)
    assert pool.allocate() == block


def test_a_released_block_can_still_be_found_and_shared() -> None:
    pool = BlockPool(3)
    [block] = cached(pool, 1)
    assert pool.is_cached(block)
    assert find(pool, 1) == block
    pool.share(block)
    assert not pool.is_cached(block)
    pool.check_integrity([[block]])


def test_a_block_is_held_until_the_last_one_lets_go() -> None:
    pool = BlockPool(2)
    block = allocate(pool)
    pool.share(block)
    pool.release(block)
    assert pool.allocate() is None
    pool.release(block)
    assert pool.allocate() == block


def test_free_blocks_are_given_out_before_anything_is_forgotten() -> None:
    pool = BlockPool(4)
    cached(pool, 1)
    allocate(pool)
    allocate(pool)
    assert (find(pool, 1) is not None, pool.num_evictions) == (True, 0)
    allocate(pool)
    assert (find(pool, 1) is not None, pool.num_evictions) == (False, 1)


def test_the_least_recently_used_is_forgotten_first() -> None:
    pool = BlockPool(4)
    first, _, _ = cached(pool, 1, 2, 3)
    pool.share(first)
    pool.release(first)
    allocate(pool)
    assert [find(pool, n) is not None for n in (1, 2, 3)] == [True, False, True]
    allocate(pool)
    assert [find(pool, n) is not None for n in (1, 2, 3)] == [True, False, False]


def test_a_held_block_is_never_forgotten() -> None:
    pool = BlockPool(3)
    block = allocate(pool)
    pool.publish(block, content(1))
    allocate(pool)
    assert pool.allocate() is None
    assert pool.evict(5) == 0
    assert find(pool, 1) == block


def test_a_block_is_told_of_before_it_is_given_to_somebody_else() -> None:
    told: list[tuple[int, Content, int | None]] = []
    pool = BlockPool(3)
    pool.on_forget = lambda block, known: told.append((block, known, pool.find(known.digest, known.tokens)))
    blocks = cached(pool, 1, 2)
    assert told == []
    assert allocate(pool) == blocks[0]
    assert pool.evict(1) == 1
    assert told == [(blocks[0], content(1), blocks[0]), (blocks[1], content(2), blocks[1])]


def test_a_digest_with_other_tokens_finds_nothing() -> None:
    pool = BlockPool(3)
    cached(pool, 1)
    assert pool.find(content(1).digest, content(2).tokens) is None
    assert pool.find(content(1).digest, list(content(1).tokens)) is not None


def test_of_two_blocks_with_one_content_the_first_is_known_and_the_second_becomes_free() -> None:
    pool = BlockPool(3)
    first, second = allocate(pool), allocate(pool)
    assert pool.publish(first, content(1))
    assert not pool.publish(second, content(1))
    assert find(pool, 1) == first
    assert pool.content(second) is None
    pool.release(second)
    assert (pool.num_cached, pool.allocate()) == (0, second)


def test_a_block_keeps_the_content_that_it_was_first_published_with() -> None:
    pool = BlockPool(2)
    block = allocate(pool)
    assert pool.publish(block, content(1))
    assert not pool.publish(block, content(2))
    assert (pool.content(block), find(pool, 2)) == (content(1), None)


def test_a_block_that_somebody_else_reads_or_may_find_is_not_for_writing() -> None:
    pool = BlockPool(3)
    alone, found = allocate(pool), allocate(pool)
    assert not pool.is_shared(alone)
    pool.share(alone)
    assert pool.is_shared(alone)
    pool.release(alone)
    assert not pool.is_shared(alone)
    pool.publish(found, content(1))
    assert pool.is_shared(found)


def test_evicting_frees_as_many_as_are_cached_and_the_oldest_first() -> None:
    pool = BlockPool(6)
    cached(pool, 1, 2, 3)
    assert pool.evict(2) == 2
    assert [find(pool, n) is not None for n in (1, 2, 3)] == [False, False, True]
    assert pool.evict(2) == 1
    assert (pool.num_evictions, pool.num_cached, pool.num_available) == (3, 0, 5)


def test_what_can_be_found_is_listed_with_what_is_held_last() -> None:
    pool = BlockPool(5)
    held = allocate(pool)
    pool.publish(held, content(3))
    one, two = cached(pool, 1, 2)
    allocate(pool)
    assert pool.cached_contents() == [(one, content(1)), (two, content(2)), (held, content(3))]


def test_mistakes_with_blocks_are_noticed() -> None:
    pool = BlockPool(3)
    block = allocate(pool)
    with pytest.raises(AssertionError, match="full"):
        pool.publish(block, Content(b"1", b"", (1,) * (BLOCK_TOKENS - 1), True))
    pool.release(block)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(block)
    with pytest.raises(AssertionError, match="holds"):
        pool.publish(block, content(1))


def test_the_check_notices_what_does_not_match_the_tables() -> None:
    pool = BlockPool(4)
    block = allocate(pool)
    pool.check_integrity([[block]])
    for tables in ([], [[block, block]], [[block], [block]], [[block, NULL_BLOCK]], [[block % 3 + 1]]):
        with pytest.raises(AssertionError):
            pool.check_integrity(tables)


ACTIONS = st.tuples(st.sampled_from(["allocate", "share", "release", "publish", "find", "evict"]), st.integers(0, 9))


@settings(deadline=None)
@given(st.integers(2, 8), st.lists(ACTIONS, max_size=60))
def test_whatever_is_done_no_block_is_lost_and_nothing_is_found_that_was_forgotten(num_blocks: int, actions: list[tuple[str, int]]) -> None:
    forgotten: list[int] = []
    pool = BlockPool(num_blocks, lambda block, known: forgotten.append(known.digest[0]))
    held: list[int] = []
    findable: dict[int, int] = {}
    for action, number in actions:
        chosen = held[number % len(held)] if held else None
        if action == "allocate":
            available = pool.num_available
            block = pool.allocate()
            assert (block is None) == (available == 0)
            if block is not None:
                assert block not in held
                held.append(block)
        elif action == "share" and chosen is not None:
            pool.share(chosen)
            held.append(chosen)
        elif action == "release" and chosen is not None:
            held.remove(chosen)
            pool.release(chosen)
        elif action == "publish" and chosen is not None:
            is_new = number not in findable and chosen not in findable.values()
            assert pool.publish(chosen, content(number)) == is_new
            if is_new:
                findable[number] = chosen
        elif action == "find":
            block = find(pool, number)
            if block is not None:
                pool.share(block)
                held.append(block)
        elif action == "evict":
            assert pool.evict(number) <= number
        for digest in forgotten:
            assert findable.pop(digest) not in held[:-1]  # the last may have been given out just now
        forgotten.clear()
        assert {n: b for n in range(10) if (b := find(pool, n)) is not None} == findable
        assert all(pool.is_shared(b) == (held.count(b) > 1 or b in findable.values()) for b in held)
        assert pool.num_held == len(set(held))
        pool.check_integrity([held])


def test_a_content_that_can_be_resumed_from_takes_the_place_of_one_that_cannot_unless_somebody_holds_that() -> None:
    forgotten: list[int] = []
    pool = BlockPool(6, on_forget=lambda block, _: forgotten.append(block))
    first, second = allocate(pool), allocate(pool)
    assert pool.publish(first, content(1, resumable=False))
    assert not pool.publish(second, content(1)), "the first is held"
    pool.release(first)
    assert pool.publish(second, content(1))
    assert find(pool, 1) == second
    assert forgotten == [first]
    pool.check_integrity([[second]])


def test_what_can_be_resumed_from_gives_way_first_where_states_take_too_much() -> None:
    pool = BlockPool(6)
    plain = allocate(pool)
    assert pool.publish(plain, content(1, resumable=False))
    pool.release(plain)
    older, newer = cached(pool, 2, 3)
    assert pool.evict_resumable()
    assert [find(pool, n) for n in (1, 2, 3)] == [plain, None, newer]
    assert pool.evict_resumable()
    assert not pool.evict_resumable()
    assert older != newer
    assert pool.num_evictions == 2
    pool.check_integrity([])
