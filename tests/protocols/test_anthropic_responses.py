"""What happened → what an Anthropic client reads: its SDK makes the same message of every stream as of the whole reply."""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic, APIStatusError
from anthropic.types import Message, ThinkingBlock
from hypothesis import given
from hypothesis import strategies as st
from jiter import from_json

from mlx_manager.api.answer import frame_bytes
from mlx_manager.core.events import (
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
    collect,
)
from mlx_manager.protocols.anthropic.errors import error_type
from mlx_manager.protocols.anthropic.requests import read_messages
from mlx_manager.protocols.anthropic.responses import MessagesWriter
from mlx_manager.protocols.seal import Seal
from mlx_manager.protocols.wire import Failure, Frame, Json

SEAL = Seal(lambda: bytes(32))
USED = Usage(prompt=50, completion=9, cached=32, reasoning=4)
END = [ChoiceFinished("stop"), Finished(USED)]


def writer(**options: Any) -> MessagesWriter:
    return MessagesWriter("msg_1", "m", SEAL, **options)


def frames_of(events: Sequence[Event], **options: Any) -> list[Frame]:
    w = writer(**options)
    return [frame for event in events for frame in w.frames(event)]


def read_by_sdk(frames: Sequence[Frame]) -> Message:
    """What the official client makes of a stream."""
    body = b"".join(map(frame_bytes, frames))
    reply = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=body)
    with (
        httpx2.Client(transport=httpx2.MockTransport(lambda _: reply)) as http,
        Anthropic(api_key="none", base_url="http://test", http_client=http, _strict_response_validation=True) as client,
        client.messages.stream(model="m", max_tokens=1, messages=[{"role": "user", "content": "Hello"}]) as stream,
    ):
        return Message.model_validate(stream.get_final_message().model_dump(exclude={"content": {"__all__": {"parsed_output"}}}))


async def whole(events: Sequence[Event], **options: Any) -> Json:
    async def stream() -> AsyncIterator[Event]:
        for event in events:
            yield event

    return writer(**options).whole(await collect(stream()))


# ---- any chunking

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
arguments = st.dictionaries(texts, st.recursive(st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | texts, st.lists))
calls = st.lists(st.tuples(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), arguments, st.booleans()), max_size=3)
ENDINGS = (
    ChoiceFinished("stop"),
    ChoiceFinished("stop_string", stop_string="\n\n"),
    ChoiceFinished("length"),
    ChoiceFinished("context_full"),
)


@st.composite
def pieces(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def replies(draw: st.DrawFn) -> list[Event]:
    """The events of a reply, however it was cut: thoughts, then text, then calls. Some calls with nothing to say say nothing."""
    events: list[Event] = [Started(50)]
    events += [ReasoningDelta(piece) for piece in draw(pieces(draw(texts)))]
    events += [TextDelta(piece) for piece in draw(pieces(draw(texts)))]
    called = draw(calls)
    for i, (name, given_arguments, is_terse) in enumerate(called):
        events.append(ToolCallStart(i, f"call_{i}", name))
        if given_arguments or not is_terse:
            events += [ToolCallDelta(i, piece) for piece in draw(pieces(json.dumps(given_arguments, ensure_ascii=False)))]
    return [*events, ChoiceFinished("tool_calls") if called else draw(st.sampled_from(ENDINGS)), Finished(USED)]


@given(replies(), st.booleans())
async def test_any_chunking_reads_like_the_whole_reply(events: list[Event], omits_thinking: bool) -> None:
    streamed = read_by_sdk(frames_of(events, omits_thinking=omits_thinking))
    read_at_once = Message.model_validate(await whole(events, omits_thinking=omits_thinking))
    sealed = list[str | None]()
    if omits_thinking:  # no text is sealed twice in the same way
        for message in (streamed, read_at_once):
            for block in message.content:
                if isinstance(block, ThinkingBlock):
                    assert block.thinking == ""
                    sealed.append(SEAL.open(block.signature))
                    block.signature = ""
        assert sealed[:1] == sealed[1:]
    assert streamed.model_dump() == read_at_once.model_dump()


@given(replies(), st.booleans())
def test_a_stream_is_in_the_order_that_clients_rely_on(events: list[Event], omits_thinking: bool) -> None:
    frames = frames_of(events, omits_thinking=omits_thinking)
    assert all(isinstance(f.data, dict) and f.event == f.data["type"] for f in frames)
    check_order([f.data for f in frames if isinstance(f.data, dict)])


def check_order(sent: Sequence[Json]) -> None:
    kinds = [event["type"] for event in sent]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert sum(kinds.count(kind) for kind in ("message_start", "message_delta", "message_stop")) == 3
    for index, (block, deltas) in enumerate(blocks_in(sent[2:-2])):
        kind = block["type"]
        names = [delta["type"] for delta in deltas]
        assert all(value for delta in deltas for key, value in delta.items()), "no piece is empty"
        match kind:
            case "thinking":
                assert (block["thinking"], block["signature"]) == ("", "")
                assert names[-1] == "signature_delta"
                assert set(names[:-1]) <= {"thinking_delta"}
                assert index == 0
            case "text":
                assert block["text"] == ""
                assert names
                assert set(names) == {"text_delta"}
            case _:
                assert block["id"].startswith("toolu_")
                assert block["input"] == {}
                assert names
                assert set(names) == {"input_json_delta"}
                fragments = [delta["partial_json"] for delta in deltas]
                for end in range(1, len(fragments) + 1):
                    from_json("".join(fragments[:end]).encode(), partial_mode=True)
                assert isinstance(json.loads("".join(fragments)), dict)


def blocks_in(sent: Sequence[Json]) -> Iterator[tuple[Json, list[Json]]]:
    """Each block and its deltas; one is open at a time, and they are numbered from 0."""
    block: Json | None = None
    deltas = list[Json]()
    num_blocks = 0
    for event in sent:
        assert event["index"] == num_blocks
        match event["type"]:
            case "content_block_start":
                assert block is None
                block, deltas = event["content_block"], []
            case "content_block_delta":
                deltas.append(event["delta"])
            case "content_block_stop":
                assert block is not None
                yield block, deltas
                block, num_blocks = None, num_blocks + 1
            case kind:
                raise AssertionError(kind)
    assert block is None


# ---- single cases


def test_what_is_said_after_a_call_is_a_block_of_its_own_and_reads_back_the_same() -> None:
    call = [ToolCallStart(0, "call_a", "f"), ToolCallDelta(0, '{"x":1}')]
    streamed = read_by_sdk(frames_of([Started(5), TextDelta("one "), *call, TextDelta("two"), *END]))
    assert [block.type for block in streamed.content] == ["text", "tool_use", "text"]
    block = [b.model_dump(exclude_none=True) for b in streamed.content]
    asked = {"model": "m", "max_tokens": 1}
    history = [{"role": "user", "content": "?"}, {"role": "assistant", "content": block}, {"role": "user", "content": "!"}]
    moved = [{"role": "user", "content": "?"}, {"role": "assistant", "content": [block[0], block[2], block[1]]}, history[2]]
    first, second = (read_messages(json.dumps(asked | {"messages": m}).encode(), SEAL).request for m in (history, moved))
    assert first == second


async def test_nothing_said_is_no_block() -> None:
    nothing = [Started(5), ReasoningDelta(""), TextDelta(""), *END]
    assert (await whole(nothing))["content"] == read_by_sdk(frames_of(nothing)).content == []


async def test_a_call_keeps_its_id_under_the_name_that_clients_expect() -> None:
    events = [Started(5), ToolCallStart(0, "call_a1", "f"), *END]
    (call,) = (await whole(events))["content"]
    assert call == {"type": "tool_use", "id": "toolu_a1", "name": "f", "input": {}}
    sent = [frame.data for frame in frames_of(events)]
    assert {"type": "content_block_start", "index": 0, "content_block": call} in sent
    assert {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": "{}"}} in sent


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("stop", "end_turn"),
        ("stop_string", "stop_sequence"),
        ("length", "max_tokens"),
        ("context_full", "model_context_window_exceeded"),
        ("tool_calls", "tool_use"),
    ],
)
async def test_every_ending_has_its_name(reason: FinishReason, told: str) -> None:
    stop_string = "7" if reason == "stop_string" else None
    events = [Started(5), TextDelta("a"), ChoiceFinished(reason, stop_string=stop_string), Finished(USED)]
    for message in (Message.model_validate(await whole(events)), read_by_sdk(frames_of(events))):
        assert (message.stop_reason, message.stop_sequence) == (told, stop_string)


async def test_what_was_cached_is_no_input_and_the_end_of_a_stream_says_so() -> None:
    events = [Started(50), TextDelta("a"), *END]
    frames = frames_of(events)
    assert isinstance(frames[0].data, dict)
    assert frames[0].data["message"]["usage"]["input_tokens"] == 50
    for message in (Message.model_validate(await whole(events)), read_by_sdk(frames)):
        used = message.usage
        assert (used.input_tokens, used.cache_read_input_tokens, used.cache_creation_input_tokens) == (18, 32, 0)
        assert used.output_tokens == 9
        assert used.output_tokens_details is not None
        assert used.output_tokens_details.thinking_tokens == 4


def test_a_failure_ends_the_stream_and_nothing_follows_it() -> None:
    (error,) = writer().failed(Failure(503, "server_error", "queue_full", "Too many."))
    assert error == Frame({"type": "error", "error": {"type": "overloaded_error", "message": "Too many."}}, event="error")
    with pytest.raises(APIStatusError, match="Too many"):
        read_by_sdk([*frames_of([Started(5), TextDelta("a")]), error])


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
        (529, "overloaded_error"),
    ],
)
def test_the_status_decides_what_a_failure_is_called(status: int, told: str) -> None:
    assert error_type(status) == told


def test_a_sign_of_life_is_a_ping() -> None:
    assert frame_bytes(writer().keep_alive()) == b'event: ping\ndata: {"type":"ping"}\n\n'
