"""Names for stretches of tokens."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, Digest
from mlx_manager.inference.engine.prefix import PrefixKeys, block_tokens, extend

KEYS = PrefixKeys("model", "layout")
ROOT = KEYS.root("")
TOKENS = st.lists(st.integers(0, 2), max_size=4 * BLOCK_TOKENS)


def names(tokens: list[int], root: Digest = ROOT) -> list[Digest]:
    digests: list[Digest] = []
    extend(digests, tokens, root)
    return digests


@pytest.mark.parametrize(("num_tokens", "num_names"), [(0, 0), (1, 0), (31, 0), (32, 1), (33, 1), (63, 1), (64, 2)])
def test_only_full_blocks_have_a_name(num_tokens: int, num_names: int) -> None:
    assert len(names([5] * num_tokens)) == num_names


def test_blocks_with_the_same_tokens_after_others_have_another_name() -> None:
    assert len(set(names([5] * 4 * BLOCK_TOKENS))) == 4


@pytest.mark.parametrize("position", [0, 31, 32, 63])
def test_every_token_counts_for_its_block_and_all_after_it(position: int) -> None:
    tokens = list(range(3 * BLOCK_TOKENS))
    before = names(tokens)
    tokens[position] += 1
    changed = [a != b for a, b in zip(before, names(tokens), strict=True)]
    assert changed == [index >= position // BLOCK_TOKENS for index in range(3)]


def test_tokens_that_differ_in_any_byte_have_other_names() -> None:
    assert len({names([token] * BLOCK_TOKENS)[0] for token in (1, 1 << 8, 1 << 16, 1 << 24)}) == 4


@given(TOKENS, st.integers(0, 4 * BLOCK_TOKENS))
def test_names_are_the_same_whether_they_are_found_at_once_or_bit_by_bit(tokens: list[int], first: int) -> None:
    digests: list[Digest] = []
    extend(digests, tokens[:first], ROOT)
    extend(digests, tokens, ROOT)
    assert digests == names(tokens)
    extend(digests, tokens[:first], ROOT)
    assert digests == names(tokens)


@given(TOKENS, TOKENS)
def test_two_prefixes_have_one_name_only_if_they_are_the_same(one: list[int], other: list[int]) -> None:
    for block, (a, b) in enumerate(zip(names(one), names(other), strict=False)):
        end = (block + 1) * BLOCK_TOKENS
        assert (a == b) == (one[:end] == other[:end])


def test_a_block_is_a_stretch_of_tokens() -> None:
    tokens = list(range(70))
    assert [block_tokens(tokens, block) for block in range(3)] == [tuple(range(32)), tuple(range(32, 64)), tuple(range(64, 70))]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(PrefixKeys)])
def test_whatever_keys_and_values_depend_on_changes_every_name(field: str) -> None:
    other = dataclasses.replace(KEYS, **{field: "other"})
    assert other.root("") != KEYS.root("")
    assert other.fingerprint != KEYS.fingerprint
    assert not set(names([5] * 64, other.root(""))) & set(names([5] * 64))


def test_tenants_have_no_name_in_common() -> None:
    assert not set(names([5] * 64, KEYS.root("one"))) & set(names([5] * 64, KEYS.root("other")))


def test_what_stands_in_one_field_is_not_taken_for_another() -> None:
    assert PrefixKeys("ab", "c").root("") != PrefixKeys("a", "bc").root("")
    assert PrefixKeys("m", "l", "x").root("") != PrefixKeys("m", "l").root("x")


def test_a_fingerprint_is_the_same_in_every_process_and_can_name_a_folder() -> None:
    assert KEYS.fingerprint == PrefixKeys("model", "layout").fingerprint
    assert KEYS.fingerprint == KEYS.root("").hex()
    assert len(KEYS.fingerprint) == 32
