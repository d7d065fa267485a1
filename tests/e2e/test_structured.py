"""Forms and calls that are enforced, through the official SDK in its strict mode, over a real socket."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from tests.e2e.replies import collected, said
from tests.e2e.serving import Running
from tests.fixtures.prompts import PROMPTS
from tests.inference.fixture_models import FAMILIES

QUIET = {"enable_thinking": False}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "warm": {"type": "boolean"}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "warm", "days"],
    "additionalProperties": False,
}


def tool(name: str, *, strict: bool = False, **properties: Any) -> Any:
    parameters = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "…", "parameters": parameters, "strict": strict}}


WEATHER = tool("get_weather", city={"type": "string", "maxLength": 20}, strict=True)
BOOK = tool("book_table", people={"type": "integer", "minimum": 1, "maximum": 9}, outside={"type": "boolean"}, strict=True)


def ask(client: OpenAI, text: str, *, model: str = "qwen3", **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    if fields.get("stream"):
        fields["stream_options"] = {"include_usage": True}
    return client.chat.completions.create(model=model, messages=messages, max_tokens=300, extra_body=QUIET, **fields)


@pytest.mark.requirement("ADAPT-09", "14.4")
@pytest.mark.parametrize("model", FAMILIES)
def test_an_answer_has_its_schema_whole_and_streamed(client: OpenAI, model: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    whole = ask(client, "How is the weather?", model=model, response_format=form, temperature=0)
    jsonschema.validate(json.loads(whole.choices[0].message.content), SCHEMA)
    assert whole.choices[0].finish_reason == "stop"
    streamed = collected(ask(client, "How is the weather?", model=model, response_format=form, temperature=0, stream=True))
    assert streamed["choices"][0]["message"]["content"] == whole.choices[0].message.content


class Weather(BaseModel):
    city: str = Field(max_length=12)
    sky: Literal["clear", "cloudy"]
    days: list[Annotated[int, Field(ge=0, le=99)]] = Field(max_length=2)


def test_the_sdk_parses_an_answer_into_its_own_type(client: OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="qwen3",
        messages=[{"role": "user", "content": "Weather?"}],
        response_format=Weather,
        max_tokens=300,
        temperature=1,
        extra_body=QUIET,
    )
    assert isinstance(completion.choices[0].message.parsed, Weather)


@pytest.mark.requirement("ADAPT-06")
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required_comes_though_nobody_asked_for_it(client: OpenAI, model: str, stream: bool) -> None:
    reply = ask(client, "Hello!", model=model, tools=[WEATHER, BOOK], tool_choice="required", parallel_tool_calls=False, stream=stream)
    (choice,) = (collected(reply) if stream else said(reply))["choices"]
    (call,) = choice["message"]["tool_calls"]
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in (WEATHER, BOOK)}
    jsonschema.validate(json.loads(call["arguments"]), schemas[call["name"]])
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("model", FAMILIES)
def test_a_tool_by_name_is_the_one_that_is_called(client: OpenAI, model: str) -> None:
    named: Any = {"type": "function", "function": {"name": "book_table"}}
    reply = ask(client, "What is the weather in Paris?", model=model, tools=[WEATHER, BOOK], tool_choice=named)
    calls = reply.choices[0].message.tool_calls
    assert {call.function.name for call in calls} == {"book_table"}


@pytest.mark.parametrize("model", FAMILIES)
def test_tools_that_must_not_be_called_are_not(client: OpenAI, model: str) -> None:
    reply = ask(client, "What is the weather in Paris?", model=model, tools=[WEATHER], tool_choice="none", temperature=0)
    assert not reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason != "tool_calls"


@pytest.mark.parametrize("model", FAMILIES)
def test_a_call_that_the_model_decides_on_is_held_to_the_tools_it_may_call(client: OpenAI, model: str) -> None:
    """In a form that the prompt does not show, so that the models know what is asked."""
    known: Any = PROMPTS[model]["weather"].tools
    allowed: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": known}}
    reply = ask(client, "What is the weather in Paris?", model=model, tools=known, tool_choice=allowed, temperature=0)
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})


def test_free_and_constrained_requests_run_side_by_side(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}

    def one(i: int) -> str:
        kind: dict[str, Any] = {"response_format": form} if i % 2 else {}
        return ask(client, "Say apple forever.", temperature=0, **kind).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(8)))
    assert len(set(answers[::2])) == 1
    assert answers[0].startswith("apple apple")
    for answer in answers[1::2]:
        jsonschema.validate(json.loads(answer), SCHEMA)


def test_a_model_that_thinks_does_so_before_its_form(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="qwen3",
        messages=[{"role": "user", "content": "What is 3 plus 4?"}],
        max_tokens=300,
        temperature=0,
        response_format={"type": "json_object"},
        extra_body={"enable_thinking": True},
    )
    message: Any = reply.choices[0].message
    assert message.reasoning_content
    assert isinstance(message.content, str)
    assert message.content.startswith("{")


def test_a_budget_ends_the_thinking_and_the_answer_comes(client: OpenAI) -> None:
    def ask_with(budget: int | None) -> Any:
        return client.chat.completions.create(
            model="qwen3",
            messages=[{"role": "user", "content": "What is 3 plus 4?"}],
            max_tokens=300,
            temperature=0,
            extra_body={"enable_thinking": True, "thinking_budget": budget},
        )

    free, bounded = ask_with(None), ask_with(2)
    assert free.usage.completion_tokens_details.reasoning_tokens > bounded.usage.completion_tokens_details.reasoning_tokens
    assert bounded.choices[0].message.content
    assert bounded.choices[0].finish_reason == "stop"


def test_a_form_that_cannot_be_enforced_names_the_keyword(client: OpenAI) -> None:
    schema = {**SCHEMA, "properties": {**SCHEMA["properties"], "days": {"type": "array", "uniqueItems": True, "items": {"type": "null"}}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    with pytest.raises(BadRequestError, match="uniqueItems") as refused:
        ask(client, "Hi", response_format=form)
    assert refused.value.param == "response_format.json_schema.schema"


SWITCH: Any = {
    "type": "custom",
    "custom": {
        "name": "switch",
        "description": "Switches it",
        "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": r"(on|off)\n[0-9]{1,3}"}},
    },
}


@pytest.mark.parametrize("model", FAMILIES)
def test_a_custom_tool_is_called_with_a_text_of_its_form_and_understood_in_the_history(client: OpenAI, model: str) -> None:
    named: Any = {"type": "custom", "custom": {"name": "switch"}}
    asked: Any = {"model": model, "max_tokens": 300, "extra_body": QUIET, "tools": [SWITCH, WEATHER]}
    user: Any = {"role": "user", "content": "Hello!"}
    reply = client.chat.completions.create(messages=[user], tool_choice=named, parallel_tool_calls=False, **asked)
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.type == "custom"
    assert re.fullmatch(r"(on|off)\n[0-9]{1,3}", call.custom.input)
    assert reply.choices[0].finish_reason == "tool_calls"
    assistant: Any = reply.choices[0].message.model_dump(exclude_none=True)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    again = client.chat.completions.create(messages=[user, assistant, result], tool_choice="none", **asked)
    assert again.choices[0].finish_reason in ("stop", "length")


def test_a_custom_tool_in_a_stream_is_refused_because_no_chunk_tells_of_one(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        ask(client, "Hi", tools=[WEATHER, SWITCH], stream=True)
    assert refused.value.param == "tools[1].type"


# ---- the same over the other protocols


@pytest.fixture(scope="module")
def anthropic(server: Running) -> Iterator[Anthropic]:
    with server.anthropic() as client:
        yield client


INPUT_SCHEMAS = {t["function"]["name"]: t["function"]["parameters"] for t in (WEATHER, BOOK)}


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "book_table"}])
def test_messages_enforce_a_call_streamed_and_whole(anthropic: Anthropic, model: str, choice: Any) -> None:
    tools: Any = [{"name": name, "input_schema": schema, "strict": True} for name, schema in INPUT_SCHEMAS.items()]
    asked: Any = {"model": model, "max_tokens": 300, "messages": [{"role": "user", "content": "Hello!"}], "tools": tools}
    asked |= {"tool_choice": choice, "thinking": {"type": "disabled"}, "extra_body": {"temperature": 0}}
    whole = anthropic.messages.create(**asked)
    with anthropic.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        calls = [block for block in message.content if block.type == "tool_use"]
        assert calls
        assert calls == message.content
        for call in calls:
            jsonschema.validate(call.input, INPUT_SCHEMAS[call.name])
            assert choice["type"] == "any" or call.name == "book_table"
    assert [c.input for c in whole.content if c.type == "tool_use"] == [c.input for c in streamed.content if c.type == "tool_use"]


def test_messages_give_an_answer_its_form(anthropic: Anthropic) -> None:
    form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = anthropic.messages.create(
        model="qwen3",
        max_tokens=300,
        messages=[{"role": "user", "content": "How is the weather?"}],
        output_config=form,
        thinking={"type": "disabled"},
    )
    (block,) = message.content
    assert block.type == "text"
    jsonschema.validate(json.loads(block.text), SCHEMA)


@pytest.mark.parametrize("model", FAMILIES)
def test_responses_enforce_a_call_and_a_form(client: OpenAI, model: str) -> None:
    tools: Any = [{"type": "function", "name": name, "parameters": schema, "strict": True} for name, schema in INPUT_SCHEMAS.items()]
    asked: Any = {"model": model, "input": "Hello!", "max_output_tokens": 300, "reasoning": {"effort": "none"}, "store": False}
    called = client.responses.create(**asked, tools=tools, tool_choice="required", parallel_tool_calls=False)
    (call,) = called.output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), INPUT_SCHEMAS[call.name])
    form: Any = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
    answered = client.responses.create(**asked, text=form)
    jsonschema.validate(json.loads(answered.output_text), SCHEMA)


def test_responses_parse_into_a_type(client: OpenAI) -> None:
    response = client.responses.parse(
        model="qwen3", input="Weather?", text_format=Weather, max_output_tokens=300, reasoning={"effort": "none"}
    )
    assert isinstance(response.output_parsed, Weather)
