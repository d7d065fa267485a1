"""LangChain over chat, Responses, embeddings and messages."""

import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel

from tests.clients.witness import Witness
from tests.e2e.serving import GENEROUS_S, MODEL, Running
from tests.e2e.test_pictures import encoded
from tests.fixtures.prompts import HELP, numbers

openai = pytest.importorskip("langchain_openai")
anthropic = pytest.importorskip("langchain_anthropic")
messages = pytest.importorskip("langchain_core.messages")
tools = pytest.importorskip("langchain_core.tools")

# Of the fixture models the one that copies a city also if the schema is not spelt as it was trained on.
TOOL_USER = "llama"
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
PROTOCOLS = list(PATHS)


def model(server: Running, protocol: str, name: str = MODEL, **options: Any) -> Any:
    """As an application makes it: greedy, and nothing else said."""
    common: dict[str, Any] = {
        "model": name,
        "api_key": "none",
        "temperature": 0,
        "max_retries": 0,
        "timeout": GENEROUS_S,
        "max_tokens": 300,
    }
    if protocol == "messages":
        return anthropic.ChatAnthropic(base_url=server.url, **common | options)
    common["stream_usage"] = True  # it asks no one but OpenAI of itself
    return openai.ChatOpenAI(base_url=f"{server.url}/v1", use_responses_api=protocol == "responses", **common | options)


@tools.tool
def get_weather(city: Annotated[str, "The city name"]) -> str:
    """Get the current weather"""
    return "18 degrees, sunny"


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Tokyo"]
    sky: Literal["clear", "cloudy"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_answers(server: Running, wire: Witness, protocol: str) -> None:
    reply = model(server, protocol).invoke([("system", "You are Zed."), ("human", "Who are you?")])
    assert reply.text == "I am Zed."
    assert reply.usage_metadata["output_tokens"] > 0
    assert reply.usage_metadata["input_tokens"] + reply.usage_metadata["output_tokens"] == reply.usage_metadata["total_tokens"]
    (exchange,) = wire.exchanges()
    assert exchange.path == PATHS[protocol]
    assert exchange.ignored == set()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_streams_in_pieces(server: Running, protocol: str) -> None:
    pieces = list(model(server, protocol).stream("Count from 1 to 20."))
    assert "".join(piece.text for piece in pieces) == numbers(20)
    assert sum(bool(piece.text) for piece in pieces) > 5
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.usage_metadata["output_tokens"] >= 20


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_calls_a_tool_and_reads_its_result(server: Running, protocol: str, streaming: bool) -> None:
    chat = model(server, protocol, TOOL_USER, streaming=streaming)
    bound = chat.bind_tools([get_weather], tool_choice="any")
    question = messages.HumanMessage("What is the weather in Paris?")
    call = bound.invoke([question])
    assert [(c["name"], c["args"]) for c in call.tool_calls] == [("get_weather", {"city": "Paris"})]
    assert call.invalid_tool_calls == []
    result = get_weather.invoke(call.tool_calls[0])
    answer = chat.bind_tools([get_weather]).invoke([question, call, result])
    assert answer.tool_calls == []
    assert "18 degrees, sunny" in answer.text


@pytest.mark.parametrize(
    ("protocol", "method"),
    [
        ("chat", "json_schema"),
        ("chat", "function_calling"),
        ("chat", "json_mode"),
        ("responses", "json_schema"),
        ("messages", "json_schema"),
        ("messages", "function_calling"),
    ],
)
def test_it_answers_in_a_form(server: Running, protocol: str, method: str) -> None:
    form: Any = dict if method == "json_mode" else Weather
    made = model(server, protocol).with_structured_output(None if form is dict else form, method=method, include_raw=True)
    reply = made.invoke("Give me a JSON object with name Alice and age 42.")
    assert reply["parsing_error"] is None
    assert isinstance(reply["parsed"], form)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_shows_a_picture(server: Running, protocol: str) -> None:
    picture = {"type": "image", "base64": encoded("green"), "mime_type": "image/png"}
    content = [picture, {"type": "text", "text": "What color is this image?"}]
    assert model(server, protocol, "qwen2_vl").invoke([messages.HumanMessage(content)]).text == "The image is green."


def test_reasoning_comes_back_in_the_next_turn(server: Running, wire: Witness) -> None:
    """Signed, as Anthropic's API wants it: what was thought is accepted as what we said."""
    chat = model(server, "messages", thinking={"type": "adaptive"}, temperature=None)
    first = chat.invoke("Hello!")
    assert first.text.startswith("Hello") and HELP in first.text  # noqa: PT018 - one answer
    kinds = [block["type"] for block in first.content]
    assert kinds == ["thinking", "text"]
    chat.invoke([("human", "Hello!"), first, ("human", "Count to 10.")])
    sent = wire.exchanges()[-1].body["messages"][1]["content"]
    assert sent[0]["signature"] == first.content[0]["signature"]


def test_a_conversation_goes_on_from_the_id_of_its_last_reply(server: Running, wire: Witness) -> None:
    chat = model(server, "responses", use_previous_response_id=True, store=True)
    first = chat.invoke("My name is Bob.")
    second = chat.invoke([messages.HumanMessage("My name is Bob."), first, messages.HumanMessage("What is my name?")])
    assert "Bob" in second.text
    body = wire.exchanges()[-1].body
    assert body["previous_response_id"] == first.response_metadata["id"]
    assert "My name is Bob." not in json.dumps(body)


def test_it_embeds(server: Running) -> None:
    embeddings = openai.OpenAIEmbeddings(
        model="tiny_bert", base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False, max_retries=0
    )
    near, far = embeddings.embed_documents(["weather in Paris", "Count to 10."])
    query = embeddings.embed_query("What is the weather in Paris?")

    def likeness(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert likeness(query, near) > likeness(query, far)
    assert likeness(query, query) == pytest.approx(1, abs=1e-5)
