"""Every endpoint through OpenAI's SDK in strict mode; also in versions that are years old."""

import json
import os
from typing import Any

from openai import NotFoundError, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=os.environ["SERVER_URL"] + "/v1", api_key="none", max_retries=0, _strict_response_validation=True)
WEATHER: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "The city name"}},
    "required": ["city"],
    "additionalProperties": False,
}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
COUNT: Any = [{"role": "user", "content": "Count from 1 to 20."}]
NUMBERS = " ".join(map(str, range(1, 21)))


class Person(BaseModel):
    name: str
    age: int


def models() -> None:
    assert "qwen3" in [model.id for model in client.models.list()]


def chat() -> None:
    reply = client.chat.completions.create(model="qwen3", temperature=0, messages=COUNT)
    assert reply.choices[0].message.content == NUMBERS
    chunks = list(
        client.chat.completions.create(model="qwen3", temperature=0, messages=COUNT, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == NUMBERS
    assert chunks[-1].usage is not None


def tools() -> None:
    tool: Any = {"type": "function", "function": {"name": "get_weather", "description": "Get the current weather", "parameters": WEATHER}}
    reply = client.chat.completions.create(model="llama", temperature=0, messages=QUESTION, tools=[tool], tool_choice="required")
    (call,) = reply.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Paris"}  # type: ignore[union-attr]
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"}
    turns: Any = [*QUESTION, reply.choices[0].message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(model="llama", temperature=0, messages=turns, tools=[tool])
    assert "18 degrees, sunny" in (answer.choices[0].message.content or "")


def form() -> None:
    wish: Any = [{"role": "user", "content": "Give me a JSON object with name Alice and age 42."}]
    parse = getattr(client.chat.completions, "parse", None) or client.beta.chat.completions.parse
    reply = parse(model="qwen3", temperature=0, messages=wish, response_format=Person)
    assert reply.choices[0].message.parsed == Person(name="Alice", age=42)


def picture() -> None:
    parts: Any = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{os.environ['PICTURE']}"}},
        {"type": "text", "text": "What color is this image?"},
    ]
    reply = client.chat.completions.create(model="qwen2_vl", temperature=0, messages=[{"role": "user", "content": parts}])
    assert reply.choices[0].message.content == "The image is green."


def completions() -> None:
    assert client.completions.create(model="qwen3", prompt="apple", max_tokens=4, temperature=0).choices[0].text


def responses() -> None:
    reply = client.responses.create(model="qwen3", temperature=0, input="Count from 1 to 20.")
    assert reply.output_text == NUMBERS
    with client.responses.stream(model="qwen3", temperature=0, input="Count from 1 to 20.") as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == NUMBERS
        assert stream.get_final_response().output_text == NUMBERS
    tool: Any = {
        "type": "function",
        "name": "get_weather",
        "description": "Get the current weather",
        "parameters": WEATHER,
        "strict": False,
    }
    asked = client.responses.create(model="llama", temperature=0, input=QUESTION, tools=[tool], tool_choice="required")
    call = next(item for item in asked.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Paris"}
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees, sunny"}
    answer = client.responses.create(model="llama", temperature=0, previous_response_id=asked.id, input=[result], tools=[tool])
    assert "18 degrees, sunny" in answer.output_text


def embeddings() -> None:
    # Strict mode has no type for base64, which the SDK asks for of itself.
    relaxed = client.copy(_extra_kwargs={"_strict_response_validation": False})
    (entry,) = relaxed.embeddings.create(model="tiny_bert", input=["weather in Paris"]).data
    assert abs(sum(x * x for x in entry.embedding) - 1) < 1e-4
    raw: Any = client.embeddings.create(model="tiny_bert", input=["weather in Paris"], encoding_format="float").data[0].embedding
    assert max(abs(a - b) for a, b in zip(raw, entry.embedding, strict=True)) < 1e-6


def mistake() -> None:
    error: NotFoundError | None = None
    try:
        client.chat.completions.create(model="nobody", messages=COUNT)
    except NotFoundError as caught:
        error = caught
    assert error is not None
    assert error.code == "model_not_found"
    assert (error.request_id or "").startswith("req_")


for scenario in (models, chat, tools, form, picture, completions, responses, embeddings, mistake):
    scenario()
    print(scenario.__name__)  # noqa: T201 - what passed
