"""What happened → what a client of the Responses API reads: the official SDK accepts every stream, and it tells the whole reply."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import omit
from openai._models import validate_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent

from mlx_manager.core.events import (
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    ReasoningDelta,
    Reply,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    Usage,
    collect,
)
from mlx_manager.protocols.custom_tools import InputReader, write_input
from mlx_manager.protocols.responses.replies import ResponsesWriter
from mlx_manager.protocols.responses.requests import CalledTool, read_responses
from mlx_manager.protocols.seal import Seal
from mlx_manager.protocols.wire import Failure, Frame

Json = dict[str, Any]
TOOLS = {
    "f": CalledTool("function", "f"),
    "g": CalledTool("custom", "g"),
    "crm.f": CalledTool("function", "f", "crm"),
    "crm.g": CalledTool("custom", "g", "crm"),
}
USAGE = Usage(prompt=7, completion=5, cached=4, reasoning=2)


class Nothing:
    def response(self, response_id: str) -> None: ...
    def item(self, item_id: str) -> None: ...


GIVEN = read_responses(b'{"model": "m", "input": "Hi", "temperature": 0, "metadata": {"a": "b"}}', Nothing(), Seal(lambda: bytes(32))).given


def writer(*, summarises: bool = False) -> ResponsesWriter:
    ids = count()
    return ResponsesWriter(
        id="resp_1",
        model="m",
        created_at=1,
        given=GIVEN,
        tools=TOOLS,
        summarises=summarises,
        seal=lambda text: f"sealed {text}",
        new_id=lambda prefix: f"{prefix}_{next(ids)}",
        clock=lambda: 2.5,
        ended=lambda response: None,
    )


def collected(events: Iterable[Event]) -> Reply:
    async def each() -> AsyncIterator[Event]:
        for event in events:
            yield event

    return asyncio.run(collect(each()))


def data(frames: Iterable[Frame]) -> list[Json]:
    """The events, which are what the SDK takes them for."""
    told: list[Json] = []
    for frame in frames:
        assert isinstance(frame.data, dict)
        assert frame.event == frame.data["type"]
        validate_type(type_=ResponseStreamEvent, value=frame.data)  # type: ignore[arg-type]
        told.append(json.loads(json.dumps(frame.data, allow_nan=False)))
    return told


def streamed(events: Iterable[Event], *, summarises: bool = False) -> list[Json]:
    writing = writer(summarises=summarises)
    return data(frame for event in events for frame in writing.frames(event))


texts = st.text(max_size=5)
logprobs = st.builds(TokenLogprob, texts, st.binary(max_size=3), st.floats(max_value=0, allow_nan=False))
said = st.one_of(
    st.builds(TextDelta, texts, logprobs=st.lists(logprobs, max_size=2).map(tuple)),
    st.builds(ReasoningDelta, texts),
).map(lambda event: [event])
FINISHES: list[FinishReason] = ["stop", "stop_string", "length", "context_full", "tool_calls"]


@st.composite
def call(draw: st.DrawFn) -> list[Event]:
    """One call, its arguments in pieces: JSON, or not, or cut."""
    arguments = draw(st.one_of(texts, texts.map(write_input), st.dictionaries(texts, texts, max_size=2).map(json.dumps)))
    arguments = arguments[: draw(st.integers(0, len(arguments)))] if draw(st.booleans()) else arguments
    cuts = sorted(draw(st.lists(st.integers(0, len(arguments)), max_size=4)))
    pieces = [arguments[a:b] for a, b in zip([0, *cuts], [*cuts, len(arguments)], strict=True)]
    return [ToolCallStart(0, "", draw(st.sampled_from([*TOOLS, "unknown"]))), *(ToolCallDelta(0, piece) for piece in pieces)]


def numbered(sections: list[list[Event]], reason: FinishReason) -> list[Event]:
    """A stream, its calls numbered from 0."""
    events, num_calls = list[Event]([Started(7)]), -1
    for event in (event for section in sections for event in section):
        match event:
            case ToolCallStart(name=name):
                num_calls += 1
                events.append(ToolCallStart(num_calls, f"call_{num_calls}", name))
            case ToolCallDelta(arguments=arguments):
                events.append(ToolCallDelta(num_calls, arguments))
            case _:
                events.append(event)
    return [*events, ChoiceFinished(reason), Finished(USAGE)]


streams = st.builds(numbered, st.lists(said | call(), max_size=8), st.sampled_from(FINISHES))


@given(streams, st.booleans())
def test_any_stream_is_one_that_the_sdk_accepts_and_tells_the_whole_reply(events: list[Event], summarises: bool) -> None:
    told = streamed(events, summarises=summarises)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert [event["type"] for event in told[:2]] == ["response.created", "response.in_progress"]
    final = told[-1]["response"]
    assert told[-1]["type"] == f"response.{final['status']}"
    assert {event["response"]["id"] for event in told if "response" in event} == {"resp_1"}

    added = [event for event in told if event["type"] == "response.output_item.added"]
    done = [event for event in told if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in added] == [event["output_index"] for event in done] == list(range(len(final["output"])))
    assert [event["item"] for event in done] == final["output"]
    for event in told:
        if "item_id" in event:
            assert event["item_id"] == final["output"][event["output_index"]]["id"]
    for item in final["output"]:
        assert_pieces_join_to(item, [event for event in told if event.get("item_id") == item["id"]])

    helper: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in told:
        helper.handle_event(validate_type(type_=ResponseStreamEvent, value=event))  # type: ignore[arg-type]

    whole = writer(summarises=summarises).whole(collected(events))
    validate_type(type_=Response, value=whole)
    assert json.loads(json.dumps(whole)) == final


def assert_pieces_join_to(item: Json, events: list[Json]) -> None:
    deltas = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    match item:
        case {"type": "message", "content": [part]}:
            assert deltas == part["text"]
            assert [p for e in events if e["type"].endswith(".delta") for p in e["logprobs"]] == part["logprobs"]
        case {"type": "reasoning", "content": content, "summary": summary}:
            (part,) = [*content, *summary]
            assert deltas == part["text"]
            assert item["encrypted_content"] == f"sealed {part['text']}"
        case {"type": "function_call"}:
            assert deltas == item["arguments"]
        case {"type": "custom_tool_call"}:
            assert deltas == item["input"]
        case _:
            raise AssertionError(item)


@given(streams, st.data())
def test_a_stream_that_fails_says_so_once_and_last(events: list[Event], choose: st.DataObject) -> None:
    writing = writer()
    told = data(frame for event in events[: choose.draw(st.integers(0, len(events) - 1))] for frame in writing.frames(event))
    told += data(writing.failed(Failure(500, "server_error", None, "It broke.")))
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert told[0]["type"] == "response.created"
    assert told[-1]["type"] == "response.failed"
    response = told[-1]["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": "It broke."})
    finished = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert response["output"][: len(finished)] == finished
    assert len(response["output"]) == len([event for event in told if event["type"] == "response.output_item.added"])


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (Failure(400, "invalid_request_error", "context_length_exceeded", "Too long."), "context_length_exceeded", "Too long."),
        (Failure(400, "invalid_request_error", "invalid_value", "Bad."), "invalid_prompt", "Bad."),
        (Failure(429, "rate_limit_error", "x", "Slow.", retry_after_s=7), "rate_limit_exceeded", "Slow. Please try again in 7s."),
        (Failure(503, "server_error", "queue_full", "Full."), "server_error", "Full."),
    ],
)
def test_failures_have_the_codes_that_clients_act_on(failure: Failure, code: str, message: str) -> None:
    first, last = [frame.data for frame in writer().failed(failure)]
    assert isinstance(first, dict)
    assert isinstance(last, dict)
    assert (first["type"], last["type"]) == ("response.created", "response.failed")
    assert last["response"]["error"] == {"code": code, "message": message}


def test_a_sign_of_life_is_the_next_event() -> None:
    writing = writer()
    told = data([*writing.frames(Started(7)), writing.keep_alive(), *writing.frames(TextDelta("a")), writing.keep_alive()])
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert [event["type"] for event in told].count("response.in_progress") == 3


def test_the_events_of_an_item_have_the_order_and_the_fields_that_upstream_sends() -> None:
    events = [ReasoningDelta("Hm."), TextDelta("Yes"), ToolCallStart(0, "c1", "crm.f"), ToolCallDelta(0, "{}"), ToolCallStart(1, "c2", "g")]
    stream = numbered([[event] for event in events] + [[ToolCallDelta(1, '{"input": "a\\nb"}')]], "tool_calls")
    raw = streamed(stream)
    assert [event["type"].removeprefix("response.") for event in raw] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
        "completed",
    ]
    by_type = {event["type"]: event for event in raw}
    assert by_type["response.output_text.delta"]["logprobs"] == []
    reasoning, _, function, custom = raw[-1]["response"]["output"]
    assert (reasoning["summary"], reasoning["content"]) == ([], [{"type": "reasoning_text", "text": "Hm."}])
    assert (function["namespace"], function["name"], function["call_id"], function["arguments"]) == ("crm", "f", "call_0", "{}")
    assert (custom["name"], custom["call_id"], custom["input"], "namespace" in custom) == ("g", "call_1", "a\nb", False)
    assert by_type["response.custom_tool_call_input.done"]["input"] == "a\nb"
    summarised = streamed(stream, summarises=True)
    assert [event["type"].removeprefix("response.") for event in summarised[2:8]] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    assert summarised[-1]["response"]["output"][0]["summary"] == [{"type": "summary_text", "text": "Hm."}]


@pytest.mark.parametrize("reason", FINISHES)
def test_a_reply_that_was_cut_is_incomplete_and_so_is_its_last_message(reason: FinishReason) -> None:
    final = streamed(numbered([[TextDelta("a")], [ReasoningDelta("b")], [TextDelta("c")]], reason))[-1]["response"]
    was_cut = reason in ("length", "context_full")
    assert final["status"] == ("incomplete" if was_cut else "completed")
    assert final["incomplete_details"] == ({"reason": "max_output_tokens"} if was_cut else None)
    assert [item["status"] for item in final["output"]] == ["completed", "completed", final["status"]]
    assert (final["completed_at"] is None) == was_cut
    assert final["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }


def test_what_cannot_happen_has_a_log_probability_that_json_can_write() -> None:
    never = TokenLogprob("a", b"a", -math.inf)
    assert "-9999.0" in json.dumps(streamed(numbered([[TextDelta("a", logprobs=(never,))]], "stop")), allow_nan=False)


def test_who_keeps_responses_hears_of_each_one_once() -> None:
    heard: list[Json] = []
    writing = writer()
    writing.ended = heard.append
    for event in numbered([[TextDelta("a")]], "stop"):
        writing.frames(event)
    assert [response["status"] for response in heard] == ["completed"]


# ---- the input of a custom tool


def read(pieces: Iterable[str]) -> tuple[str, list[str]]:
    reader = InputReader()
    told = [reader.feed(piece) for piece in pieces] + [reader.finish()]
    assert "".join(told) == reader.input
    return reader.input, told


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(st.text(), st.lists(st.integers(0, 60)), st.booleans())
def test_an_input_is_read_however_its_json_is_cut_and_escaped(text: str, cuts: list[int], as_ascii: bool) -> None:
    arguments = json.dumps({"input": text}) if as_ascii else write_input(text)
    assert read(pieces_of(arguments, cuts))[0] == text


@given(st.text(), st.lists(st.integers(0, 60)))
def test_any_arguments_give_the_same_input_in_any_pieces(arguments: str, cuts: list[int]) -> None:
    for source in (arguments, '{"input": "' + arguments):
        assert read(pieces_of(source, cuts))[0] == read([source])[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"input": "ab\\ud83d\\ude00"}', "ab😀"),
        ('{"input": "\\ud83d!"}', "\ufffd!"),
        ('{"input": "\\ude00"}', "\ufffd"),
        ('{"input": "\\ud83d\\ud83d\\ude00"}', "\ufffd😀"),
        ('{"input": "cut\\', "cut"),
        ('{"input": "cut\\u00', "cut"),
        ('{"patch": "only text"}', "only text"),
        ('{"a": 1, "input": "later"}', "later"),
        ('{"a": "x", "b": "y"}', '{"a": "x", "b": "y"}'),
        ("free text", "free text"),
        ("", ""),
    ],
)
def test_the_text_in_the_arguments_is_the_input(arguments: str, expected: str) -> None:
    assert read(arguments)[0] == expected


def test_an_input_is_told_while_it_is_written() -> None:
    _, told = read(['{"inp', 'ut": "a', "b\\", "nc", '"}'])
    assert told == ["", "a", "b", "\nc", "", ""]
