"""Stop strings against a reference that looks at one character at a time."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.inference.stopping import StopMatcher


def reference(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """What is shown of a text, and the stop string that ended it: the first that is complete, of several the longest."""
    for length in range(1, len(text) + 1):
        complete = [s for s in stop if text[:length].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: length - len(longest)], longest
    return text, None


def shown(matcher: StopMatcher, chunks: Sequence[str]) -> str:
    return "".join([*(matcher.feed(chunk) for chunk in chunks), matcher.flush()])


def chunked(text: str, cuts: Sequence[int]) -> list[str]:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


CASES = [
    ("The end. Not shown.", ["end."], "The "),
    ("one\n\ntwo", ["\n\n"], "one"),
    ("a <b> c", ["<bold>"], "a <b> c"),
    ("ababac", ["abac"], "ab"),
    ("aaaab", ["aab"], "aa"),
    ("xSTOPy", ["OP", "STOP"], "x"),
    ("xSTOPy", ["ST", "STOP"], "x"),
    ("abcd", ["abcd", "c"], "ab"),
    ("STOP", ["STOP"], ""),
    ("STO", ["STOP"], "STO"),
    ("日本🎉!", ["🎉"], "日本"),
    ("nothing here", [], "nothing here"),
]


@pytest.mark.parametrize(("text", "stop", "expected"), CASES)
def test_a_stop_string_is_found_however_the_text_is_cut(text: str, stop: list[str], expected: str) -> None:
    assert reference(text, stop)[0] == expected
    for at in range(len(text) + 1):
        matcher = StopMatcher(stop)
        assert shown(matcher, [text[:at], text[at:]]) == expected
        assert matcher.matched == reference(text, stop)[1]
    matcher = StopMatcher(stop)
    assert shown(matcher, list(text)) == expected


@given(
    st.text("abc<", max_size=30),
    st.lists(st.text("abc<", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 30), max_size=10),
)
def test_any_text_any_stops_any_cuts(text: str, stop: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stop)
    assert shown(matcher, chunked(text, cuts)) == reference(text, stop)[0]
    assert matcher.matched == reference(text, stop)[1]


@given(st.text("ab<", max_size=20), st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_is_kept_back_that_cannot_become_a_stop_string(text: str, stop: list[str]) -> None:
    matcher, told = StopMatcher(stop), ""
    for length, character in enumerate(text, 1):
        told += matcher.feed(character)
        if matcher.matched is None:
            held = text[len(told) : length]
            assert text.startswith(told)
            assert held == "" or any(s.startswith(held) for s in stop)


def test_after_a_match_nothing_comes_any_more() -> None:
    matcher = StopMatcher(["."])
    assert matcher.feed("a.b") == "a"
    assert matcher.feed("c") == ""
    assert matcher.flush() == ""


def test_a_stop_string_that_never_completes_costs_no_more_with_a_longer_text() -> None:
    """What is held is shorter than the longest stop string, whatever came before."""
    matcher = StopMatcher(["aaaaaaaaab"])
    given_out = sum(len(matcher.feed("a")) for _ in range(5000))
    assert given_out == 5000 - 9


class _PieceByPiece(StopMatcher):
    """Looks for stop strings in each piece alone, as servers have done."""

    def feed(self, text: str) -> str:
        return super().feed(text) + self.flush()


def test_the_proof_notices_a_matcher_that_forgets_between_pieces() -> None:
    text, stop, expected = CASES[0]
    assert any(shown(_PieceByPiece(stop), [text[:at], text[at:]]) != expected for at in range(len(text)))
