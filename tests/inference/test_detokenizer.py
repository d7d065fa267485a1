"""With the fixtures' own tokenizers: byte-level ones, and Gemma's pieces with single bytes for what they lack."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_manager.inference.detokenizer import Decode, Detokenizer
from tests.inference.fixture_models import FAMILIES, dialect

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufffd▁"), max_size=60)
EMOJI = "Grüße 👩‍👩‍👧 aus 東京 🦑!"


def decode_of(family: str) -> Decode:
    tokenizer = dialect(family).tokenizer
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode(family: str, text: str) -> list[int]:
    return dialect(family).tokenizer.encode(text, add_special_tokens=False)


def pieces_of(family: str, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode_of(family))
    return [*(detokenizer.add(token) for token in tokens), detokenizer.finish()]


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_pieces_join_to_what_the_tokenizer_makes_of_all_tokens(family: str, text: str) -> None:
    tokens = encode(family, text)
    assert "".join(pieces_of(family, tokens)) == decode_of(family)(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_characters_that_are_spread_over_tokens_appear_once_and_whole(family: str) -> None:
    tokens = encode(family, EMOJI)
    pieces = pieces_of(family, tokens)
    assert "" in pieces, "some token ends inside a character"
    assert "".join(pieces) == EMOJI
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_is_cut_inside_a_character_ends_before_it(family: str) -> None:
    tokens = encode(family, EMOJI)
    for length in range(len(tokens) + 1):
        text = "".join(pieces_of(family, tokens[:length]))
        assert EMOJI.startswith(text)
        assert text.startswith(decode_of(family)(tokens[:length]).rstrip("\ufffd")), "no whole character is missing"


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_are_shown_where_they_come(family: str) -> None:
    """Parsers look for them: a tool call may begin with one."""
    tokenizer = dialect(family).tokenizer
    stop = next(t for t in dialect(family).family.stop_tokens if t in tokenizer.get_vocab())
    tokens = [*encode(family, "a b"), tokenizer.get_vocab()[stop], *encode(family, "c")]
    assert "".join(pieces_of(family, tokens)) == decode_of(family)(tokens)
    assert stop in "".join(pieces_of(family, tokens))


def _spelling(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def test_bytes_that_are_no_text_do_not_hold_up_what_follows() -> None:
    """A model with its weights spoilt writes such; every token is a byte here."""
    detokenizer = Detokenizer(_spelling)
    shown = "".join(detokenizer.add(0xE2) for _ in range(100))
    assert len(shown) > 50
    assert "".join(detokenizer.add(byte) for byte in b"then a word").endswith("word")


@pytest.mark.parametrize("text", ["plain words " * 400, "東京🎉" * 400])
def test_the_work_for_a_token_does_not_grow_with_the_text(text: str) -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return _spelling(tokens)

    detokenizer = Detokenizer(decode)
    assert "".join(detokenizer.add(byte) for byte in text.encode()) == text
    assert longest <= 8


def test_garbage_costs_no_more_than_text() -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return _spelling(tokens)

    detokenizer = Detokenizer(decode)
    for _ in range(5000):
        detokenizer.add(0xE2)
    assert longest < 50
