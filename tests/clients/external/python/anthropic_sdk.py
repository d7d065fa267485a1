"""Messages through Anthropic's SDK in strict mode; also in versions that are years old."""

import os
from typing import Any

from anthropic import Anthropic, NotFoundError

client = Anthropic(base_url=os.environ["SERVER_URL"], api_key="none", max_retries=0, _strict_response_validation=True)
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
COUNT: Any = [{"role": "user", "content": "Count from 1 to 20."}]
NUMBERS = " ".join(map(str, range(1, 21)))
ASKED: Any = {"model": "qwen3", "max_tokens": 300, "extra_body": {"temperature": 0}}
WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the current weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string", "description": "The city name"}}, "required": ["city"]},
}


def said(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def models() -> None:
    assert "qwen3" in [model.id for model in client.models.list()]


def messages() -> None:
    reply = client.messages.create(**ASKED, messages=COUNT)
    assert said(reply) == NUMBERS
    assert reply.stop_reason == "end_turn"
    with client.messages.stream(**ASKED, messages=COUNT) as stream:
        assert "".join(stream.text_stream) == NUMBERS
        assert said(stream.get_final_message()) == NUMBERS


def thinking() -> None:
    asked = ASKED | {"max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    first = client.messages.create(**asked, messages=COUNT)
    assert [block.type for block in first.content] == ["thinking", "text"]
    turns = [*COUNT, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Count to 10."}]
    assert client.messages.create(**asked, messages=turns).stop_reason == "end_turn"


def tools() -> None:
    asked = ASKED | {"model": "llama", "tools": [WEATHER]}
    reply = client.messages.create(**asked, messages=QUESTION, tool_choice={"type": "any"})
    (call,) = [block for block in reply.content if block.type == "tool_use"]
    assert call.input == {"city": "Paris"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees, sunny"}
    turns: Any = [*QUESTION, {"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    assert "18 degrees, sunny" in said(client.messages.create(**asked, messages=turns))


def picture() -> None:
    source: Any = {"type": "base64", "media_type": "image/png", "data": os.environ["PICTURE"]}
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": "What color is this image?"}]
    reply = client.messages.create(**ASKED | {"model": "qwen2_vl"}, messages=[{"role": "user", "content": content}])
    assert said(reply) == "The image is green."


def count_tokens() -> None:
    counted = client.messages.count_tokens(model="qwen3", messages=COUNT).input_tokens
    usage = client.messages.create(**ASKED, messages=COUNT).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)


def mistake() -> None:
    error: NotFoundError | None = None
    try:
        client.messages.create(**ASKED | {"model": "nobody"}, messages=COUNT)
    except NotFoundError as caught:
        error = caught
    assert error is not None
    assert (error.request_id or "").startswith("req_")


for scenario in (models, messages, thinking, tools, picture, count_tokens, mistake):
    scenario()
    print(scenario.__name__)  # noqa: T201 - what passed
