"""PDFs through each protocol, over a real socket: the model reads the text that is in them."""

import base64
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from tests.e2e.serving import MODEL, Running
from tests.fixtures.documents import PICTURE_ONLY, pdf

PAGES = pdf("The first page.", "The second page.")
TEXT = "The first page.\n\nThe second page."


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes) -> str:
    return f"data:application/pdf;base64,{in_base64(data)}"


def chat(data: bytes) -> tuple[str, dict[str, Any]]:
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": url(data)}}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], "max_tokens": 4}


def messages(data: bytes) -> tuple[str, dict[str, Any]]:
    source = {"type": "base64", "media_type": "application/pdf", "data": in_base64(data)}
    return "/v1/messages", {"messages": [{"role": "user", "content": [{"type": "document", "source": source}]}], "max_tokens": 4}


def responses(data: bytes) -> tuple[str, dict[str, Any]]:
    part = {"type": "input_file", "filename": "a.pdf", "file_data": url(data)}
    return "/v1/responses", {"input": [{"role": "user", "content": [part]}], "max_output_tokens": 16}


def test_a_pdf_is_the_text_that_is_in_it(client: OpenAI) -> None:
    _, asked = chat(PAGES)
    told = {"role": "user", "content": f"a.pdf:\n{TEXT}?"}
    read = client.chat.completions.create(model=MODEL, temperature=0, **asked)
    written = client.chat.completions.create(model=MODEL, messages=[told], temperature=0, max_tokens=4)  # type: ignore[list-item]
    assert read.choices[0].message.content == written.choices[0].message.content
    assert read.usage is not None
    assert written.usage is not None
    assert read.usage.prompt_tokens == written.usage.prompt_tokens


def test_its_prefix_is_found_again_and_counted(server: Running) -> None:
    long = pdf(*[f"Page {i} has a few words on it, and no more than these." for i in range(8)])
    with server.anthropic() as anthropic:
        _, asked = messages(long)
        counted = anthropic.messages.count_tokens(model=MODEL, messages=asked["messages"]).input_tokens
        first, second = (anthropic.messages.create(model=MODEL, **asked) for _ in range(2))
    for message in (first, second):
        assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == counted
    assert (second.usage.cache_read_input_tokens or 0) >= counted - 64


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (chat, "messages[0].content[0].file.file_data"),
        (messages, "messages[0].content[0].source.data"),
        (responses, "input[0].content[0].file_data"),
    ],
)
def test_each_protocol_reads_one_and_refuses_one_without_text(server: Running, asked: Any, field: str) -> None:
    with server.http() as http:
        path, body = asked(PAGES)
        answered = http.post(path, json=body | {"model": MODEL})
        assert answered.status_code == 200, answered.text
        refused: httpx2.Response = http.post(path, json=asked(PICTURE_ONLY)[1] | {"model": MODEL})
        assert refused.status_code == 400
        assert f"'{field}'" in refused.json()["error"]["message"]
        again = http.post(path, json=body | {"model": MODEL})
        assert again.status_code == 200


def test_a_response_that_is_kept_keeps_its_pdf(client: OpenAI) -> None:
    _, asked = responses(PAGES)
    first = client.responses.create(model=MODEL, **asked)
    second = client.responses.create(model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=16)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
