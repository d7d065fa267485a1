from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.bench.sse import ServerEvent, SseParser


def parsed(*pieces: bytes) -> list[ServerEvent]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


STREAM = (
    "\ufeff: hello\n\nevent: error\ndata: größer\ndata:  zwei\nid: 7\nretry: 3\n\ndata\n\ndata: 🦊🦊\n\nevent: alone\n\ndata: [DONE]\n\n"
)
EVENTS = [
    ServerEvent("error", "größer\n zwei"),
    ServerEvent("message", ""),
    ServerEvent("message", "🦊🦊"),
    ServerEvent("message", "[DONE]"),
]


@pytest.mark.parametrize("ending", ["\n", "\r", "\r\n"])
def test_a_stream_cut_at_any_byte_gives_the_same_events(ending: str) -> None:
    stream = STREAM.replace("\n", ending).encode()
    assert parsed(stream) == EVENTS
    for at in range(len(stream) + 1):
        assert parsed(stream[:at], stream[at:]) == EVENTS
    assert parsed(*(bytes([byte]) for byte in stream)) == EVENTS


@given(
    payloads=st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5),
    endings=st.lists(st.sampled_from([b"\n", b"\r", b"\r\n"]), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_whatever_was_written_is_read_back_however_it_was_cut(payloads: list[str], endings: list[bytes], cuts: list[int]) -> None:
    written = b"".join(b"data: " + payload.encode() + endings[n % len(endings)] * 2 for n, payload in enumerate(payloads))
    at = sorted({0, len(written), *(cut for cut in cuts if cut < len(written))})
    pieces = [written[start:end] for start, end in pairwise(at)]
    assert [event.data for event in parsed(*pieces)] == payloads


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_no_bytes_make_it_fail(pieces: list[bytes]) -> None:
    assert parsed(*pieces) == parsed(b"".join(pieces))


def test_an_event_without_its_blank_line_counts_and_half_a_line_does_not() -> None:
    assert parsed(b"data: [DONE]\n") == [ServerEvent("message", "[DONE]")]
    assert parsed(b'data: {"half') == []


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert parsed(b"data: a\xffb\n\n") == [ServerEvent("message", "a\ufffdb")]
