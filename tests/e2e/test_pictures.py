"""Pictures over a real socket, in every protocol that can send them, through the official SDKs in their strict mode."""

import base64
import io
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI

from tests.e2e.replies import collected
from tests.e2e.serving import Running
from tests.fixtures.make.vision import COLOURS, paint

MODEL = "qwen2_vl"
QUESTION = "What color is this image?"


@pytest.fixture(scope="module")
def anthropic(server: Running) -> Iterator[Anthropic]:
    with server.anthropic() as client:
        yield client


def encoded(name: str, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    paint(random.Random(5), name).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def shown(*names: str, text: str = QUESTION) -> Any:
    pictures = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(name)}"}} for name in names]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def ask(client: OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=40, **options)


@pytest.mark.requirement("SRV-04")
@pytest.mark.parametrize("name", ["red", "green", "blue", "yellow"])
def test_a_picture_is_seen_whole_and_streamed(client: OpenAI, name: str) -> None:
    assert ask(client, shown(name)).choices[0].message.content == f"The image is {name}."
    stream = ask(client, shown(name), stream=True, stream_options={"include_usage": True})
    assert collected(stream)["choices"][0]["message"]["content"] == f"The image is {name}."


def test_two_pictures_are_told_apart(client: OpenAI) -> None:
    said = ask(client, shown("red", "blue", text="What colors are these images?")).choices[0].message.content
    assert said == "The first image is red and the second image is blue."


def test_many_are_looked_at_side_by_side_with_text(client: OpenAI) -> None:
    names = list(COLOURS)[:6]
    with ThreadPoolExecutor(8) as pool:
        greeting = pool.submit(ask, client, [{"role": "user", "content": "Hello"}])
        answers = list(pool.map(lambda name: ask(client, shown(name)).choices[0].message.content, names))
    assert answers == [f"The image is {name}." for name in names]
    assert greeting.result().choices[0].message.content.startswith("Hello")


def test_messages_and_responses_see_what_chat_sees(client: OpenAI, anthropic: Anthropic) -> None:
    source: Any = {"type": "base64", "media_type": "image/png", "data": encoded("green")}
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    messages: Any = [{"role": "user", "content": content}]
    message = anthropic.messages.create(model=MODEL, max_tokens=40, extra_body={"temperature": 0}, messages=messages)
    (block,) = message.content
    assert block.type == "text"
    assert block.text == "The image is green."
    parts: Any = [
        {"type": "input_image", "image_url": f"data:image/png;base64,{encoded('green')}", "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    response = client.responses.create(
        model=MODEL, temperature=0, max_output_tokens=40, store=False, input=[{"role": "user", "content": parts}]
    )
    assert response.output_text == "The image is green."
    chat = ask(client, shown("green"))
    assert chat.usage is not None
    assert response.usage is not None
    assert chat.usage.prompt_tokens == response.usage.input_tokens
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens


def test_a_picture_that_cannot_be_read_is_named(client: OpenAI) -> None:
    messages = shown("red")
    messages[0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    for stream in (False, True):
        with pytest.raises(BadRequestError, match="could not be read") as refused:
            ask(client, messages, stream=stream)
        assert refused.value.param == "messages[0].content[0].image_url"


def test_the_list_of_models_says_which_one_sees(client: OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert models[MODEL]["kind"] == "vision"
    assert "images" in models[MODEL]["features"]
    assert "images" not in models["qwen3"]["features"]
