"""One conversation, said over chat, messages and responses, asks for the same thing."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Document, Image, Message, RemoteImage, ToolCall, Video
from mlx_manager.core.requests import (
    AnyJson,
    Conversation,
    GenerationRequest,
    Grammar,
    JsonSchema,
    OneOf,
    Reasoning,
    Regex,
    Sampling,
    ToolChoice,
    ToolSpec,
)
from mlx_manager.protocols.anthropic.client import write_messages
from mlx_manager.protocols.anthropic.requests import read_messages
from mlx_manager.protocols.openai.client import write_chat
from mlx_manager.protocols.openai.requests import read_chat
from mlx_manager.protocols.responses.client import write_responses
from mlx_manager.protocols.responses.requests import read_responses
from mlx_manager.protocols.seal import Seal
from tests.protocols.test_responses_replies import Nothing

Json = dict[str, Any]
SEAL = Seal(lambda: bytes(32))
NAMES = ["get_weather", "add", "search"]
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda s: bool(s.strip()) and not s.startswith("x-anthropic") and not s.startswith("<total_tokens>")
)
value = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | text,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3),
    max_leaves=5,
)
arguments = st.dictionaries(text, value, max_size=3)


@st.composite
def turns(draw: st.DrawFn) -> list[Json]:
    """What was said, in nobody's format: users and assistants in turns, calls with their results."""
    said: list[Json] = []
    num_calls = 0
    for _ in range(draw(st.integers(1, 3))):
        said.append({"user": draw(text)})
        if draw(st.booleans()):
            calls = [
                (f"call_{(num_calls := num_calls + 1)}", draw(st.sampled_from(NAMES)), draw(arguments))
                for _ in range(draw(st.integers(1, 2)))
            ]
            said.append({"assistant": draw(st.none() | text), "reasoning": draw(st.none() | text), "calls": calls})
            said += [{"result": call_id, "content": draw(text)} for call_id, _, _ in calls]
        said.append({"assistant": draw(text), "reasoning": draw(st.none() | text), "calls": []})
    return [*said, {"user": draw(text)}]


conversations = st.fixed_dictionaries(
    {
        "system": st.none() | text,
        "turns": turns(),
        "tools": st.lists(st.sampled_from(NAMES), unique=True),
        "parameters": st.sampled_from([{}, {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}]),
        "description": text,
        "choice": st.sampled_from(["auto", "none", "required", "named"]),
        "parallel": st.booleans(),
        "max_tokens": st.integers(1, 1000),
        "temperature": st.sampled_from([None, 0, 0.5, 1]),
        "top_p": st.sampled_from([None, 0.5, 1]),
        "schema": st.none()
        | st.just({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}),
    }
)


def written(arguments: Json) -> str:
    return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))


def chat(c: Json) -> GenerationRequest:
    messages: list[Json] = [] if c["system"] is None else [{"role": "system", "content": c["system"]}]
    for turn in c["turns"]:
        if "user" in turn:
            messages.append({"role": "user", "content": turn["user"]})
        elif "result" in turn:
            messages.append({"role": "tool", "tool_call_id": turn["result"], "content": turn["content"]})
        else:
            calls = [{"id": i, "type": "function", "function": {"name": n, "arguments": written(a)}} for i, n, a in turn["calls"]]
            messages.append(
                {"role": "assistant", "content": turn["assistant"], "reasoning_content": turn["reasoning"], "tool_calls": calls or None}
            )
    tools = [
        {"type": "function", "function": {"name": n, "description": c["description"], "parameters": c["parameters"]}} for n in c["tools"]
    ]
    choice: Any = c["choice"]
    if choice == "named":
        choice = {"type": "function", "function": {"name": c["tools"][0]}}
    form = None if c["schema"] is None else {"type": "json_schema", "json_schema": {"name": "n", "schema": c["schema"], "strict": True}}
    body = {"messages": messages, "tools": tools, "tool_choice": choice, "max_completion_tokens": c["max_tokens"], "response_format": form}
    return read_chat(_body(c, body)).request


def messages(c: Json) -> GenerationRequest:
    turns: list[Json] = []
    for turn in c["turns"]:
        if "user" in turn:
            turns.append({"role": "user", "content": turn["user"]})
        elif "result" in turn:
            block = {"type": "tool_result", "tool_use_id": turn["result"], "content": turn["content"]}
            if turns[-1]["role"] == "user":
                turns[-1]["content"].append(block)  # as this protocol has it: the results of one turn together
            else:
                turns.append({"role": "user", "content": [block]})
        else:
            thinking = [] if turn["reasoning"] is None else [{"type": "thinking", "thinking": turn["reasoning"]}]
            said = [] if turn["assistant"] is None else [{"type": "text", "text": turn["assistant"]}]
            calls = [{"type": "tool_use", "id": i, "name": n, "input": a} for i, n, a in turn["calls"]]
            turns.append({"role": "assistant", "content": [*thinking, *said, *calls]})
    tools = [{"name": n, "description": c["description"], "input_schema": c["parameters"]} for n in c["tools"]]
    kind = {"auto": "auto", "none": "none", "required": "any", "named": "tool"}[c["choice"]]
    choice: Json = {"type": kind}
    if kind == "tool":
        choice["name"] = c["tools"][0]
    if kind != "none":
        choice["disable_parallel_tool_use"] = not c["parallel"]
    form = None if c["schema"] is None else {"format": {"type": "json_schema", "schema": c["schema"]}}
    body = {
        "system": c["system"],
        "messages": turns,
        "tools": tools,
        "tool_choice": choice,
        "max_tokens": c["max_tokens"],
        "output_config": form,
    }
    return read_messages(_body(c, body, has_parallel=False), SEAL).request


def responses(c: Json) -> GenerationRequest:
    items: list[Json] = []
    for turn in c["turns"]:
        if "user" in turn:
            items.append({"role": "user", "content": turn["user"]})
        elif "result" in turn:
            items.append({"type": "function_call_output", "call_id": turn["result"], "output": turn["content"]})
        else:
            if turn["reasoning"] is not None:
                items.append(
                    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": turn["reasoning"]}]}
                )
            if turn["assistant"] is not None:
                items.append({"role": "assistant", "content": [{"type": "output_text", "text": turn["assistant"], "annotations": []}]})
            items += [{"type": "function_call", "call_id": i, "name": n, "arguments": written(a)} for i, n, a in turn["calls"]]
    tools = [
        {"type": "function", "name": n, "description": c["description"], "parameters": c["parameters"], "strict": False} for n in c["tools"]
    ]
    choice: Any = c["choice"]
    if choice == "named":
        choice = {"type": "function", "name": c["tools"][0]}
    form = None if c["schema"] is None else {"format": {"type": "json_schema", "name": "n", "schema": c["schema"], "strict": True}}
    body = {
        "instructions": c["system"],
        "input": items,
        "tools": tools,
        "tool_choice": choice,
        "max_output_tokens": c["max_tokens"],
        "text": form,
        "store": False,
    }
    return read_responses(_body(c, body), Nothing(), SEAL).request


def _body(c: Json, body: Json, *, has_parallel: bool = True) -> bytes:
    if not body["tools"]:
        del body["tools"], body["tool_choice"]
    more = {"model": "m", "temperature": c["temperature"], "top_p": c["top_p"]} | (
        {"parallel_tool_calls": c["parallel"]} if has_parallel else {}
    )
    return json.dumps({k: v for k, v in (body | more).items() if v is not None}).encode()


@given(conversations)
def test_the_same_is_asked_for_whatever_the_protocol(conversation: Json) -> None:
    if not conversation["tools"]:
        conversation["choice"] = "auto"
    if not conversation["tools"] or conversation["choice"] == "none":
        conversation["parallel"] = True  # messages say this with the choice, and no choice says it
    over_chat, over_messages, over_responses = chat(conversation), messages(conversation), responses(conversation)
    assert over_chat == over_messages
    assert over_chat == over_responses
    assert read_chat(sent(write_chat(over_chat))).request == over_chat
    assert read_messages(sent(write_messages(over_chat)), SEAL).request == over_chat
    assert read_responses(sent(write_responses(over_chat)), Nothing(), SEAL).request == over_chat


def sent(body: Json) -> bytes:
    return json.dumps(body, default=dict).encode()


PICTURE = Image(b"\x89PNG\r\n...")
SEEN = Message("user", ("a", PICTURE, "b", RemoteImage("https://example.com/a.png")))
ANSWERED = Message("tool", ("seen", PICTURE), tool_call_id="call_1")
CALLED = Message("assistant", "", tool_calls=(ToolCall("call_1", "f", '{"a":1}'),))
TOOLS = (ToolSpec("f", "F", {"type": "object"}), ToolSpec("g"))


def asking(*messages: Message, tools: tuple[ToolSpec, ...] = (), **more: Any) -> GenerationRequest:
    named = {name: more.pop(name) for name in ("tool_choice", "reasoning", "continues") if name in more}
    return GenerationRequest("m", (Conversation(messages, tools=tools, **named),), max_tokens=9, **more)


@pytest.mark.parametrize(
    "request_",
    [
        asking(SEEN, CALLED, ANSWERED, tools=TOOLS),
        asking(SEEN, reasoning=Reasoning(enabled=True)),
        asking(SEEN, reasoning=Reasoning(enabled=False)),
        asking(SEEN, reasoning=Reasoning(effort="low")),
        asking(SEEN, tools=TOOLS, tool_choice=ToolChoice("required", ("g",)), parallel_tool_calls=False),
        asking(SEEN, sampling=Sampling(temperature=0.5, top_p=0.1, top_k=3, min_p=0.2, seed=0, presence_penalty=1)),
    ],
)
def test_what_one_client_mode_sends_is_read_as_it_was_meant(request_: GenerationRequest) -> None:
    assert read_chat(sent(write_chat(request_))).request == request_
    assert read_messages(sent(write_messages(request_)), SEAL).request == request_
    assert read_responses(sent(write_responses(request_)), Nothing(), SEAL).request == request_


@pytest.mark.parametrize(
    "request_",
    [
        asking(SEEN, output=Regex("a+")),
        asking(SEEN, output=OneOf(("a", "b"))),
        asking(SEEN, output=Grammar('start: "a"')),
        asking(SEEN, output=AnyJson()),
        asking(SEEN, output=JsonSchema({"type": "object"}, strict=False)),
        asking(SEEN, num_replies=3, num_top_logprobs=2, stop=("x",), sampling=Sampling(logit_bias={3: 1.5})),
        asking(SEEN, reasoning=Reasoning(enabled=True, effort="high", budget=7)),
        asking(SEEN, tools=TOOLS, tool_choice=ToolChoice("auto", ("g",))),
        asking(Message("user", (Video(b"clip", 3),))),
    ],
)
def test_what_only_chat_has_words_for_survives_there(request_: GenerationRequest) -> None:
    assert read_chat(sent(write_chat(request_))).request == request_


def test_what_messages_alone_can_say_survives_there() -> None:
    begun = asking(SEEN, Message("assistant", "Well"), continues=True)
    assert read_messages(sent(write_messages(begun)), SEAL).request == begun


def test_a_document_comes_through_each_client_mode() -> None:
    paper = Document(b"%PDF-1.7 ...")
    asked = asking(Message("user", ("Read ", paper)))
    read = [
        read_chat(sent(write_chat(asked))).request,
        read_messages(sent(write_messages(asked)), SEAL).request,
        read_responses(sent(write_responses(asked)), Nothing(), SEAL).request,
    ]
    for request in read:
        (conversation,) = request.prompts
        assert isinstance(conversation, Conversation)
        content = conversation.messages[0].content
        assert not isinstance(content, str)
        assert [part for part in content if not isinstance(part, str)] == [paper]


@pytest.mark.parametrize("write", [write_messages, write_responses])
def test_what_a_protocol_has_no_word_for_is_refused_by_name(write: Any) -> None:
    with pytest.raises(InvalidField, match="form"):
        write(asking(SEEN, output=Regex("a")))
    with pytest.raises(InvalidField, match="videos"):
        write(asking(Message("user", (Video(b"clip", 3, "there"),))))
