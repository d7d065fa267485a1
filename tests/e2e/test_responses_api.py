"""The Responses API through the official SDK, which here refuses every reply that its types do not allow."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem

from mlx_manager import app
from mlx_manager.config import Config
from mlx_manager.core.errors import EngineFault
from mlx_manager.core.events import ChoiceFinished, Finished, TextDelta, ToolCallDelta, ToolCallStart, Usage
from mlx_manager.gateway.gateway import Gateway
from mlx_manager.protocols.responses.schema import RESPONSES_FIELDS
from tests.e2e.serving import MODEL, SMALL_WINDOW, SMALL_WINDOW_MODEL, Running, serve_thread
from tests.fixtures.prompts import PROMPTS, WEATHER
from tests.gateway.scripted import STARTED, WAIT, Scripted, Step

Json = dict[str, Any]
PATH = "/v1/responses"
FLAT_WEATHER = {"type": "function", **WEATHER["function"]}
CUSTOM_WEATHER = {"type": "custom", "name": "get_weather", "description": "Get the current weather"}
PARIS = "What is the weather in Paris?"
SUNNY = "18 degrees, sunny"
TOO_LONG = " ".join(["apple"] * 200)


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.http() as http:
        yield http


def request(text: Any = "What is 2 + 3?", **options: Any) -> Json:
    """Greedy, short and without reasoning, unless the options say otherwise (None: nothing at all)."""
    ours = ("enable_thinking", "thinking_budget", "top_k", "seed", "stop")
    extra = {"enable_thinking": False} | {k: options[k] for k in ours if k in options}
    known = {"temperature": 0, "max_output_tokens": 150} | {k: v for k, v in options.items() if k not in ours}
    known = {k: v for k, v in known.items() if v is not None}
    return {"model": MODEL, "input": text, **known, "extra_body": {k: v for k, v in extra.items() if v is not None}}


def ask(client: OpenAI, text: Any = "What is 2 + 3?", **options: Any) -> Response:
    return client.responses.create(**request(text, **options))


def body(text: Any = "What is 2 + 3?", **fields: Any) -> Json:
    plain = {"model": MODEL, "input": text, "temperature": 0, "max_output_tokens": 60, "enable_thinking": False}
    return {k: v for k, v in (plain | fields).items() if v is not ...}


def stream(client: OpenAI, text: Any = "What is 2 + 3?", **options: Any) -> Response:
    """What a stream tells, by its events and by the SDK's own helper."""
    events = list(client.responses.create(**request(text, **options), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1]
    assert final.type in ("response.completed", "response.incomplete")
    assert [event.item for event in events if event.type == "response.output_item.done"] == final.response.output
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == final.response.output_text
    with client.responses.stream(**request(text, **options)) as helped:
        helped.until_done()
        if final.type == "response.completed":
            assert said(helped.get_final_response()) == said(final.response)
    return final.response


def said(response: Response) -> Json:
    """Without what differs from one to the next: ids, times, seals, and which tokens of the prompt were there already."""
    reply: Json = json.loads(response.to_json(exclude_none=False))
    for name in ("id", "created_at", "completed_at", "previous_response_id"):
        reply.pop(name, None)
    for item in reply["output"]:
        for name in ("id", "call_id", "encrypted_content", "parsed_arguments"):
            item.pop(name, None)
        for part in item.get("content") or []:
            part.pop("parsed", None)
    if reply["usage"]:
        reply["usage"]["input_tokens_details"].pop("cached_tokens")
    return reply


def reasoning_of(response: Response) -> ResponseReasoningItem:
    (item,) = [item for item in response.output if isinstance(item, ResponseReasoningItem)]
    return item


def call_of(response: Response) -> ResponseFunctionToolCall:
    (item,) = [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]
    return item


def result(call: ResponseFunctionToolCall, text: str = SUNNY) -> Json:
    return {"type": "function_call_output", "call_id": call.call_id, "output": text}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("What is 2 + 3?", {}),
        ("What is the secret code?", {"instructions": "The secret code is 4821."}),
        ("What is 2 + 3?", {"enable_thinking": None}),
        ("What is 2 + 3?", {"enable_thinking": None, "reasoning": {"summary": "auto"}}),
        ("What is 2 + 3?", {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
        ("Say apple forever.", {"max_output_tokens": 7}),
        ("What is 2 + 3?", {"enable_thinking": None, "max_output_tokens": 5}),
        ("Count from 1 to 20.", {"stop": "7"}),
        (PARIS, {"tools": [FLAT_WEATHER]}),
        (PARIS, {"tools": [FLAT_WEATHER], "enable_thinking": None}),
        ("What is the weather in Paris and London?", {"tools": [FLAT_WEATHER]}),
        (PARIS, {"tools": [CUSTOM_WEATHER], "model": "glm4"}),
        (PARIS, {"tools": [{"type": "namespace", "name": "sky", "description": "Weather", "tools": [FLAT_WEATHER]}]}),
    ],
)
def test_a_stream_ends_with_the_whole_response(client: OpenAI, text: str, options: Json) -> None:
    assert said(stream(client, text, **options)) == said(ask(client, text, **options))


@pytest.mark.parametrize("name", ["hello_alice", "memory", "add_system", "secret", "json", "thinking_add", "parallel", "tool_result"])
def test_known_questions_have_the_answers_that_they_have_over_chat(client: OpenAI, name: str) -> None:
    prompt = PROMPTS[MODEL][name]
    items: list[Json] = []
    for message in prompt.messages:
        if message["role"] == "tool":
            items.append({"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]})
        elif calls := message.get("tool_calls"):
            functions = [(c["id"], c["function"]) for c in calls]
            items += [
                {"type": "function_call", "call_id": i, "name": f["name"], "arguments": json.dumps(f["arguments"])} for i, f in functions
            ]
        else:
            items.append(message)
    thinking = prompt.template_kwargs.get("enable_thinking")
    tools = [{"type": "function", **tool["function"]} for tool in prompt.tools or []]
    response = ask(client, items, tools=tools, enable_thinking=thinking, max_output_tokens=400)
    assert response.output_text == prompt.content
    calls = [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == prompt.calls
    thoughts = [part.text for item in response.output if isinstance(item, ResponseReasoningItem) for part in item.content or []]
    assert thoughts == ([prompt.reasoning] if name.startswith("thinking_") else [])
    assert response.status == "completed"


def test_every_word_of_the_response_is_there(client: OpenAI) -> None:
    response = ask(client, instructions="Be brief.", metadata={"a": "b"}, user="me", top_p=0.5, reasoning={"effort": "none"})
    raw = json.loads(response.to_json(exclude_none=False))
    assert response.id.startswith("resp_")
    assert raw.keys() >= {
        *(
            "id",
            "object",
            "created_at",
            "model",
            "output",
            "parallel_tool_calls",
            "tool_choice",
            "tools",
            "status",
            "completed_at",
            "error",
        ),
        *("incomplete_details", "instructions", "max_output_tokens", "metadata", "previous_response_id", "reasoning", "service_tier"),
        *("store", "temperature", "text", "top_logprobs", "top_p", "truncation", "usage", "user"),
    }
    assert (raw["instructions"], raw["metadata"], raw["user"], raw["top_p"]) == ("Be brief.", {"a": "b"}, "me", 0.5)
    assert (raw["reasoning"], raw["text"]) == ({"effort": "none", "summary": None}, {"format": {"type": "text"}})
    assert (raw["truncation"], raw["service_tier"], raw["store"]) == ("disabled", "default", True)


def test_a_limit_makes_a_response_incomplete_at_exactly_that_many_tokens(client: OpenAI) -> None:
    for response in (ask(client, "Say apple forever.", max_output_tokens=7), stream(client, "Say apple forever.", max_output_tokens=7)):
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage is not None
        assert response.usage.output_tokens == 7
        (message,) = response.output
        assert isinstance(message, ResponseOutputMessage)
        assert message.status == "incomplete"


@pytest.mark.parametrize("nothing", ["", []])
def test_a_probe_is_answered(client: OpenAI, nothing: Any) -> None:
    response = ask(client, nothing, max_output_tokens=1)
    assert response.usage is not None
    assert response.usage.output_tokens == 1


def test_log_probabilities_come_with_the_text(client: OpenAI) -> None:
    response = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage)
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs
    assert "".join(token.token for token in part.logprobs) == part.text
    assert all(len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob for token in part.logprobs)


# ---- reasoning that comes back


@pytest.mark.parametrize("summary", [None, "auto"])
def test_reasoning_is_sealed_and_read_again_in_the_next_turn(client: OpenAI, http: httpx2.Client, summary: str | None) -> None:
    options: Json = {"enable_thinking": None, "store": False, "include": ["reasoning.encrypted_content"]}
    first = ask(client, PARIS, tools=[FLAT_WEATHER], reasoning=summary and {"summary": summary}, **options)
    thought = reasoning_of(first)
    shown = thought.content if summary is None else thought.summary
    assert [part.text for part in shown or []] == ["I need the weather in Paris."]
    assert "weather" not in (thought.encrypted_content or "weather")
    call = json.loads(call_of(first).to_json())

    def tokens(item: Json | None) -> int:
        items = [{"role": "user", "content": PARIS}, *([item] if item else []), call, result(call_of(first))]
        response = http.post(f"{PATH}/input_tokens", json={"model": MODEL, "input": items, "tools": [FLAT_WEATHER]})
        return response.json()["input_tokens"]

    sealed = {"type": "reasoning", "summary": [], "encrypted_content": thought.encrypted_content}
    assert tokens(sealed) == tokens({"type": "reasoning", "summary": [{"type": "summary_text", "text": "I need the weather in Paris."}]})
    assert tokens(sealed) > tokens(None) == tokens({**sealed, "encrypted_content": f"{thought.encrypted_content}x"})

    items = [{"role": "user", "content": PARIS}, sealed, call, result(call_of(first))]
    second = ask(client, items, tools=[FLAT_WEATHER], **options)
    assert SUNNY in second.output_text


def test_a_call_comes_back_and_its_result_is_understood(client: OpenAI) -> None:
    first = stream(client, PARIS, tools=[FLAT_WEATHER])
    call = call_of(first)
    assert (call.name, json.loads(call.arguments), call.status) == ("get_weather", {"city": "Paris"}, "completed")
    history = [{"role": "user", "content": PARIS}, *(item.to_dict() for item in first.output), result(call)]
    for second in (ask(client, history, tools=[FLAT_WEATHER]), stream(client, history, tools=[FLAT_WEATHER])):
        assert second.output_text == f"The tool says: {SUNNY}"


def test_two_calls_come_in_one_response_unless_only_one_is_wanted(client: OpenAI) -> None:
    question = "What is the weather in Paris and London?"
    both = ask(client, question, tools=[FLAT_WEATHER])
    one = ask(client, question, tools=[FLAT_WEATHER], parallel_tool_calls=False)
    assert [json.loads(item.arguments) for item in both.output if item.type == "function_call"] == [{"city": "Paris"}, {"city": "London"}]
    assert json.loads(call_of(one).arguments) == {"city": "Paris"}
    assert not one.parallel_tool_calls


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_of_a_custom_tool_matches_its_regular_expression(client: OpenAI, stream: bool) -> None:
    tool: Any = {**CUSTOM_WEATHER, "format": {"type": "grammar", "syntax": "regex", "definition": r'(on|off)\n"[0-9]{1,3}"'}}
    asked: Any = {"model": MODEL, "input": "Switch it.", "tools": [tool], "tool_choice": {"type": "custom", "name": "get_weather"}}
    reply: Any = client.responses.create(**asked, reasoning={"effort": "none"}, parallel_tool_calls=False, stream=stream)
    (call,) = ([*reply][-1].response if stream else reply).output
    assert call.type == "custom_tool_call"
    assert re.fullmatch(r'(on|off)\n"[0-9]{1,3}"', call.input)


def test_a_custom_tool_is_called_with_text_and_its_result_is_understood(client: OpenAI) -> None:
    """The model writes the parameter that it has learnt; the one text in it is the input."""
    options: Json = {"tools": [CUSTOM_WEATHER], "model": "glm4"}
    first = stream(client, PARIS, **options)
    (call,) = first.output
    assert call.type == "custom_tool_call"
    assert (call.name, call.input) == ("get_weather", "Paris")
    output = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": SUNNY}
    second = ask(client, [{"role": "user", "content": PARIS}, call.to_dict(), output], **options)
    assert SUNNY in second.output_text


def test_a_tool_of_a_namespace_comes_back_under_its_own_name(client: OpenAI) -> None:
    tools = [{"type": "namespace", "name": "sky", "description": "Weather", "tools": [FLAT_WEATHER]}]
    first = stream(client, "What is the weather in Tokyo?", tools=tools)
    call = call_of(first)
    assert (call.namespace, call.name, json.loads(call.arguments)) == ("sky", "get_weather", {"city": "Tokyo"})
    history = [{"role": "user", "content": "What is the weather in Tokyo?"}, call.to_dict(), result(call)]
    assert ask(client, history, tools=tools).output_text.startswith("The tool says:")


# ---- what is kept


def test_a_conversation_goes_on_by_the_id_of_a_response_without_its_instructions(client: OpenAI) -> None:
    first = ask(client, PARIS, tools=[FLAT_WEATHER], instructions="You are a helpful assistant.")
    second = ask(client, [result(call_of(first))], tools=[FLAT_WEATHER], previous_response_id=first.id)
    assert second.output_text == f"The tool says: {SUNNY}"
    assert second.previous_response_id == first.id
    history = [{"role": "user", "content": PARIS}, *(item.to_dict() for item in first.output), result(call_of(first))]
    resent = ask(client, history, tools=[FLAT_WEATHER])
    assert second.usage is not None
    assert resent.usage is not None
    assert second.usage.input_tokens == resent.usage.input_tokens
    streamed = stream(client, [result(call_of(first))], tools=[FLAT_WEATHER], previous_response_id=first.id)
    assert streamed.output_text == second.output_text


def test_a_response_can_be_fetched_listed_and_deleted(client: OpenAI, http: httpx2.Client) -> None:
    picture_of_a_turn = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "My name is Bob."},
        {"role": "assistant", "content": "Nice to meet you, Bob!"},
        {"type": "reasoning", "summary": [], "content": []},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "2"},
        {"role": "user", "content": [{"type": "input_text", "text": "What is my name?"}]},
    ]
    for response in (ask(client, picture_of_a_turn), stream(client, picture_of_a_turn)):
        assert client.responses.retrieve(response.id) == response
        items = list(client.responses.input_items.list(response.id, order="asc", limit=4))
        assert [item.type for item in items] == [item.get("type", "message") for item in picture_of_a_turn]
        assert all(item.id for item in items)
        newest = client.responses.input_items.list(response.id, limit=2)
        assert [item.id for item in newest.data] == [item.id for item in items[:-3:-1]]
        assert newest.has_more
        client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError) as gone:
            client.responses.retrieve(response.id)
        assert gone.value.message.endswith(f"Response with id '{response.id}' not found.")
        assert http.delete(f"{PATH}/{response.id}").status_code == 404
        with pytest.raises(openai.BadRequestError) as unknown:
            ask(client, previous_response_id=response.id)
        assert unknown.value.code == "previous_response_not_found"
        assert unknown.value.param == "previous_response_id"


def test_what_is_not_to_be_stored_is_not(client: OpenAI, http: httpx2.Client) -> None:
    response = ask(client, store=False)
    assert response.store is False  # type: ignore[attr-defined]
    assert http.get(f"{PATH}/{response.id}").status_code == 404
    item = {"type": "item_reference", "id": response.output[0].id}
    missing = http.post(PATH, json=body([item]))
    assert missing.status_code == 404
    assert missing.json()["error"] == {
        "message": f"Item with id '{response.output[0].id}' not found.",
        "type": "invalid_request_error",
        "param": "input",
        "code": None,
    }


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("after=msg_0", "after")],
)
def test_a_page_that_cannot_be_is_refused(client: OpenAI, http: httpx2.Client, query: str, param: str) -> None:
    response = ask(client)
    refused = http.get(f"{PATH}/{response.id}/input_items?{query}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert http.get(f"{PATH}/{response.id}?stream=true").json()["error"]["param"] == "stream"
    assert http.get(f"{PATH}/{response.id}?include=x").headers["x-ignored-fields"] == "include"


# ---- what goes wrong


def test_an_input_that_is_too_long_is_told_in_band_to_who_streams_and_with_a_status_to_others(http: httpx2.Client) -> None:
    text = (
        f"This model's maximum context length is {SMALL_WINDOW} tokens; your input is ",
        "Your input exceeds the context window of this model. Please adjust your input and try again. ",
    )
    whole = http.post(PATH, json=body(TOO_LONG, model=SMALL_WINDOW_MODEL))
    assert whole.status_code == 400
    error = whole.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "input", "context_length_exceeded")
    assert error["message"].startswith(text[1] + text[0])
    streamed = http.post(PATH, json=body(TOO_LONG, model=SMALL_WINDOW_MODEL, stream=True))
    assert streamed.status_code == 200
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = [block.split("\n") for block in streamed.text.strip().split("\n\n")]
    events = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
    assert [name for name, _ in events] == [data["type"] for _, data in events] == ["response.created", "response.failed"]
    assert [data["sequence_number"] for _, data in events] == [0, 1]
    failed = events[1][1]["response"]
    assert (failed["status"], failed["error"]) == ("failed", {"code": "context_length_exceeded", "message": error["message"]})
    count = http.post(f"{PATH}/input_tokens", json={"model": SMALL_WINDOW_MODEL, "input": TOO_LONG, "enable_thinking": False})
    assert error["message"].endswith(f"your input is {count.json()['input_tokens']} tokens.")


@pytest.mark.parametrize("streamed", [False, True])
def test_what_can_be_refused_is_refused_with_a_status(http: httpx2.Client, streamed: bool) -> None:
    picture = {"type": "input_image", "image_url": "http://example.com/a.png"}
    for fields, status, code, param in (
        ({"model": "nobody"}, 404, "model_not_found", None),
        ({"background": True}, 400, "unsupported_value", "background"),
        ({"conversation": "conv_1"}, 400, "unsupported_parameter", "conversation"),
        ({"input": [{"role": "user", "content": [picture]}]}, 400, "invalid_value", "input[0].content[0].image_url"),
        ({"previous_response_id": "resp_0"}, 400, "previous_response_not_found", "previous_response_id"),
        ({"logit_bias": {"999999": 1}}, 400, "invalid_value", "logit_bias"),
    ):
        response = http.post(PATH, json=body(stream=streamed, **fields))
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", [PATH, f"{PATH}/input_tokens"])
def test_null_is_the_same_as_absent_for_every_field(http: httpx2.Client, path: str) -> None:
    response = http.post(path, json=body(max_output_tokens=1) | dict.fromkeys(RESPONSES_FIELDS.keys() - body().keys()))
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers


# ---- how many tokens


def test_an_input_is_counted_as_it_is_computed(client: OpenAI) -> None:
    for text, options in (("Hello", {}), (PARIS, {"tools": [FLAT_WEATHER], "instructions": "You are a helpful assistant."})):
        counted = client.responses.input_tokens.count(model=MODEL, input=text, extra_body={"enable_thinking": False}, **options)
        response = ask(client, text, max_output_tokens=1, **options)
        assert response.usage is not None
        assert (counted.object, counted.input_tokens) == ("response.input_tokens", response.usage.input_tokens)


def test_the_same_conversation_is_the_same_prompt_over_chat(client: OpenAI) -> None:
    words = " ".join(str(n * 7919 % 1000) for n in range(60))
    history: Any = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"Remember {words}."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "What is 2 + 3?"},
    ]
    options: Any = {"model": MODEL, "messages": history, "temperature": 0, "max_tokens": 20, "extra_body": {"enable_thinking": False}}
    chat = client.chat.completions.create(**options)
    response = ask(client, history[1:], instructions=history[0]["content"], max_output_tokens=20)
    assert chat.usage is not None
    assert response.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.input_tokens_details.cached_tokens > response.usage.input_tokens - 64
    assert response.output_text == chat.choices[0].message.content


# ---- as clients ask


def test_a_request_as_codex_sends_it_is_served_over_two_turns(client: OpenAI, http: httpx2.Client) -> None:
    shell = {
        "type": "function",
        "name": "exec_command",
        "description": "Runs a command",
        "strict": False,
        "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"], "additionalProperties": False},
    }
    patch = {
        "type": "custom",
        "name": "apply_patch",
        "description": "Edits files",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
    }
    space = {"type": "namespace", "name": "mcp__docs", "description": "Documents", "tools": [{**shell, "name": "search"}]}
    hosted = [{"type": "web_search", "external_web_access": True}, {"type": "image_generation", "output_format": "png"}]
    own = [{"type": "local_shell"}, {"type": "shell"}, {"type": "apply_patch"}, {"type": "tool_search", "execution": "client"}]
    elsewhere = [{"type": "mcp", "server_label": "x"}, {"type": "code_interpreter", "container": {"type": "auto"}}]
    asked: Json = {
        "model": MODEL,
        "instructions": "You are a helpful assistant.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be careful."}]},
            {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be quick."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment>/tmp</environment>"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": PARIS}]},
        ],
        "tools": [FLAT_WEATHER, shell, patch, space, *hosted, *own, *elsewhere],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
        "client_metadata": {"x": "y"},
        "text": {"verbosity": "medium"},
        "service_tier": None,
    }
    first = http.post(PATH, json=asked)
    assert first.status_code == 200, first.text
    ignored = set(first.headers["x-ignored-fields"].split(","))
    kinds = ("web_search", "image_generation", "local_shell", "shell", "apply_patch", "tool_search", "mcp", "code_interpreter")
    assert ignored == {"prompt_cache_key", "client_metadata", "text.verbosity", "tools.format", *(f"tools.{kind}" for kind in kinds)}
    with client.responses.stream(**{k: v for k, v in asked.items() if k not in ("client_metadata", "stream")}) as events:
        items = [event.item for event in events if event.type == "response.output_item.done"]
        final = events.get_final_response()
    assert [tool.type for tool in final.tools] == ["function", "function", "custom", "namespace"]
    # What it does is learnt from the items that are done; whatever the tiny model made of so many tools, it comes back and is read.
    again = [json.loads(item.to_json(exclude_none=False)) for item in items]
    for item in again:
        item.pop("parsed_arguments", None)
    results = [{"type": "function_call_output", "call_id": i["call_id"], "output": SUNNY} for i in again if i["type"] == "function_call"]
    second = http.post(
        PATH, json={**asked, "stream": False, "input": [*asked["input"], *again, *results, {"role": "user", "content": "Go on."}]}
    )
    assert second.status_code == 200, second.text
    assert second.json()["status"] == "completed"
    assert second.json()["usage"]["input_tokens_details"]["cached_tokens"] > 0


def test_a_run_as_the_ai_sdk_makes_it_names_what_was_said_before(client: OpenAI, http: httpx2.Client) -> None:
    """It lets responses be stored, and names the items of earlier turns instead of sending them."""
    tools = [FLAT_WEATHER]
    first = stream(client, [{"role": "user", "content": [{"type": "input_text", "text": PARIS}]}], tools=tools, enable_thinking=None)
    call = call_of(first)
    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    assert len(references) == 2
    turn = [{"role": "user", "content": [{"type": "input_text", "text": PARIS}]}, *references, result(call)]
    second = stream(client, turn, tools=tools, enable_thinking=None)
    assert SUNNY in second.output_text
    third = http.post(
        PATH, json=body([*turn, {"type": "item_reference", "id": second.output[-1].id}, {"role": "user", "content": "Hello!"}])
    )
    assert third.status_code == 200, third.text
    listed = client.responses.input_items.list(third.json()["id"], order="asc")
    assert [item.type for item in listed.data] == ["message", "reasoning", "function_call", "function_call_output", "message", "message"]


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_that_nobody_runs_here_and_items_that_nobody_reads_are_named(http: httpx2.Client, streamed: bool) -> None:
    items = [{"type": "web_search_call", "id": "ws", "status": "completed"}, {"role": "user", "content": "What is 2 + 3?"}]
    response = http.post(PATH, json=body(items, tools=[{"type": "web_search"}, {"type": "never_heard_of"}], stream=streamed, never=1))
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "never,tools.web_search,tools.never_heard_of,input.web_search_call"
    assert "2 + 3 = 5." in response.text
    forced = http.post(PATH, json=body(tools=[{"type": "web_search"}], tool_choice={"type": "web_search"}, stream=streamed))
    assert (forced.status_code, forced.json()["error"]["param"]) == (400, "tool_choice")


def test_a_switch_that_the_model_does_not_have_is_named(http: httpx2.Client) -> None:
    for path in (PATH, f"{PATH}/input_tokens"):
        response = http.post(path, json=body(model="llama", enable_thinking=True, reasoning={"effort": "low"}))
        assert response.headers["x-ignored-fields"] == "enable_thinking,reasoning.effort"


# ---- a server whose models do what a test says

CALLS: list[Step] = [
    STARTED,
    ToolCallStart(0, "call_1", "apply_patch"),
    *(ToolCallDelta(0, piece) for piece in ('{"inp', 'ut": "a\\', "n\\ud83d", '\\ude00"}')),
    ToolCallStart(1, "call_2", "docs.search"),
    ToolCallDelta(1, '{"q": 1}'),
    TextDelta("Done."),
    ChoiceFinished("tool_calls"),
    Finished(Usage(prompt=3, completion=9)),
]
TOOLS: list[Json] = [
    {"type": "custom", "name": "apply_patch"},
    {"type": "namespace", "name": "docs", "description": "", "tools": [{"type": "function", "name": "search"}]},
]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Scripted]]:
    config = Config(port=0, data_dir=tmp_path_factory.mktemp("data"), models_dir=(Path("/nonexistent"),))
    backend = Scripted()
    services = replace(app.build_services(config), gateway=Gateway(backend, max_requests=4))
    with serve_thread(app.application(services), config) as running:
        yield running, backend


def test_calls_in_pieces_reach_the_client_as_they_are_written(scripted: tuple[Running, Scripted]) -> None:
    running, backend = scripted
    backend.script = tuple(CALLS)
    with running.openai() as client:
        events = list(client.responses.create(model="tiny", input="x", tools=TOOLS, stream=True))  # type: ignore[call-overload]
        whole = client.responses.create(model="tiny", input="x", tools=TOOLS)  # type: ignore[arg-type]
        kept = client.responses.retrieve(whole.id)
    assert [e.delta for e in events if e.type == "response.custom_tool_call_input.delta"] == ["a", "\n", "😀"]
    custom, function, message = events[-1].response.output
    assert (custom.type, custom.name, custom.call_id, custom.input) == ("custom_tool_call", "apply_patch", "call_1", "a\n😀")
    assert (function.namespace, function.name, function.call_id, function.arguments) == ("docs", "search", "call_2", '{"q": 1}')
    assert message.content[0].text == "Done."
    assert said(whole) == said(kept) == said(events[-1].response)


@pytest.mark.parametrize("before", [(STARTED,), (STARTED, TextDelta("Hel"))])
def test_a_failure_after_the_first_event_is_the_last_event(scripted: tuple[Running, Scripted], before: tuple[Step, ...]) -> None:
    running, backend = scripted
    backend.script = (*before, EngineFault("The engine failed."))
    with running.openai() as client:
        events = list(client.responses.create(model="tiny", input="x", stream=True))
        with pytest.raises(openai.InternalServerError):
            client.responses.create(model="tiny", input="x")
    *_, last = events
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.message) == ("server_error", "The engine failed.")
    assert [e.type for e in events].count("response.failed") == 1
    assert "response.completed" not in [e.type for e in events]


def test_a_silence_is_filled_with_events_not_with_comments(scripted: tuple[Running, Scripted]) -> None:
    running, backend = scripted
    backend.script = (STARTED, WAIT)
    with running.openai() as client, client.responses.create(model="tiny", input="x", stream=True) as events:
        told = [next(iter(events)) for _ in range(3)]
    assert [(e.type, e.sequence_number) for e in told] == [
        ("response.created", 0),
        ("response.in_progress", 1),
        ("response.in_progress", 2),
    ]
