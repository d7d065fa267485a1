"""Pydantic AI's agents over chat, Responses and messages, and its embedder."""

import base64
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.clients.witness import Witness
from tests.e2e.serving import GENEROUS_S, MODEL, Running
from tests.e2e.test_pictures import encoded
from tests.fixtures.prompts import numbers

ai = pytest.importorskip("pydantic_ai")
openai_models = pytest.importorskip("pydantic_ai.models.openai")
anthropic_models = pytest.importorskip("pydantic_ai.models.anthropic")
openai_provider = pytest.importorskip("pydantic_ai.providers.openai")
anthropic_provider = pytest.importorskip("pydantic_ai.providers.anthropic")
embeddings = pytest.importorskip("pydantic_ai.embeddings")
openai_embeddings = pytest.importorskip("pydantic_ai.embeddings.openai")

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
PROTOCOLS = list(PATHS)
# Of the fixture models the one that copies a city also if the schema is not spelt as it was trained on.
TOOL_USER = "llama"


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Tokyo"]
    sky: Literal["clear", "cloudy"]


@pytest.fixture
async def sdks(server: Running) -> Any:
    from anthropic import AsyncAnthropic  # noqa: PLC0415
    from openai import AsyncOpenAI  # noqa: PLC0415

    options: Any = {"api_key": "none", "max_retries": 0, "timeout": GENEROUS_S}
    async with AsyncOpenAI(base_url=f"{server.url}/v1", **options) as openai, AsyncAnthropic(base_url=server.url, **options) as anthropic:
        yield openai, anthropic


@pytest.fixture
def agent(sdks: Any) -> Any:
    def make(protocol: str, name: str = MODEL, **options: Any) -> Any:
        openai, anthropic = sdks
        if protocol == "messages":
            provider = anthropic_provider.AnthropicProvider(anthropic_client=anthropic)
            knows = {"supports_json_schema_output": True}  # else it takes the name for a model too old for schemas
            model = anthropic_models.AnthropicModel(name, provider=provider, profile=knows)
        else:
            kind = openai_models.OpenAIChatModel if protocol == "chat" else openai_models.OpenAIResponsesModel
            model = kind(name, provider=openai_provider.OpenAIProvider(openai_client=openai))
        return ai.Agent(model, model_settings={"temperature": 0, "max_tokens": 300}, **options)

    return make


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_it_answers(agent: Any, wire: Witness, protocol: str) -> None:
    result = await agent(protocol, system_prompt="You are Zed.").run("Who are you?")
    assert result.output == "I am Zed."
    assert result.usage.output_tokens > 0
    (exchange,) = wire.exchanges()
    assert exchange.path == PATHS[protocol]
    assert exchange.ignored == set()


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_it_streams_in_pieces(agent: Any, protocol: str) -> None:
    async with agent(protocol).run_stream("Count from 1 to 20.") as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces) == numbers(20)
    assert len(pieces) > 5
    assert result.usage.output_tokens >= 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_an_agent_calls_a_tool_and_reads_its_result(agent: Any, wire: Witness, protocol: str) -> None:
    cities: list[str] = []

    def get_weather(city: str) -> str:
        """Get the current weather

        Args:
            city: The city name
        """
        cities.append(city)
        return "18 degrees, sunny"

    result = await agent(protocol, TOOL_USER, tools=[get_weather]).run("What is the weather in Paris?")
    assert cities == ["Paris"]
    assert "18 degrees, sunny" in result.output
    assert result.usage.requests == 2
    call, answer = wire.exchanges()
    assert answer.prompt[0] > call.prompt[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("marker", ["ToolOutput", "NativeOutput"])
async def test_it_answers_in_a_form(agent: Any, protocol: str, marker: str) -> None:
    """Through a tool that has to be called, and through a schema of the reply."""
    made = agent(protocol, output_type=getattr(ai, marker)(Weather))
    result = await made.run("Give me a JSON object with name Alice and age 42.")
    assert isinstance(result.output, Weather)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_form_fills_while_it_is_streamed(agent: Any, protocol: str) -> None:
    async with agent(protocol, output_type=Weather).run_stream("How is the weather?") as result:
        partial = [piece async for piece in result.stream_output(debounce_by=None)]
    assert isinstance(partial[-1], Weather)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_it_shows_a_picture(agent: Any, protocol: str) -> None:
    picture = ai.BinaryContent(base64.b64decode(encoded("green")), media_type="image/png")
    result = await agent(protocol, "qwen2_vl").run(["What color is this image?", picture])
    assert "green" in result.output


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_the_next_turn_remembers_and_computes_only_what_is_new(agent: Any, wire: Witness, protocol: str) -> None:
    made = agent(protocol, system_prompt="You are a helpful assistant. " * 20)
    first = await made.run("My name is Bob.")
    await made.run("What is my name?", message_history=first.all_messages())
    before, after = wire.exchanges()
    prompt, cached = after.prompt
    assert prompt > before.prompt[0]
    assert cached >= (before.prompt[0] - 1) // 32 * 32


async def test_it_embeds(sdks: Any) -> None:
    model = openai_embeddings.OpenAIEmbeddingModel("tiny_bert", provider=openai_provider.OpenAIProvider(openai_client=sdks[0]))
    result = await embeddings.Embedder(model).embed_documents(["weather in Paris", "Count to 10."])
    assert len(result.embeddings) == 2
    assert sum(x * x for x in result.embeddings[0]) == pytest.approx(1, abs=1e-5)
