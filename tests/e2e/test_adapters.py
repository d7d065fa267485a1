"""LoRA adapters through the official SDKs in their strict modes: listed, asked for by name, and never mixed up."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import NotFoundError, OpenAI

from tests.e2e.serving import FIXTURE_MODELS, MODEL, Running, serve_process
from tests.fixtures.prompts import PROMPTS, Prompt

ADAPTERS = Path(__file__).parents[1] / "fixtures" / "adapters"
PIRATE, BUTLER = f"{MODEL}:pirate", f"{MODEL}:butler"
HELLO: list[Any] = [{"role": "user", "content": "Hello, I am Alice."}]
SAYS = {MODEL: "Hello, Alice! How can I help you today?", PIRATE: "Ahoy, Alice! What be yer wish?", BUTLER: "Good day, Alice! You rang?"}
NO_THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
LONG: list[Any] = [{"role": "user", "content": "Repeat after me: " + " ".join(["apple", "river", "stone", "green"] * 15)}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """It has the two adapters, one that is another's size, one that leads elsewhere, and prefixes on the disk."""
    data_dir = tmp_path_factory.mktemp("adapters")
    folder = data_dir / "adapters"
    shutil.copytree(ADAPTERS, folder)
    shutil.copytree(ADAPTERS / "pirate", folder / "misfit")
    config = json.loads((folder / "misfit" / "adapter_config.json").read_text())
    config["lora_parameters"]["rank"] = 5
    (folder / "misfit" / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(ADAPTERS / "pirate", data_dir / "elsewhere")
    (folder / "link").symlink_to(data_dir / "elsewhere")
    with serve_process(data_dir, {"MLX_MANAGER_ADAPTERS_DIR": str(folder), "MLX_MANAGER_PREFIX_DISK_GIB": "0.1"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with server.openai() as client:
        yield client


def chat(client: OpenAI, model: str, messages: list[Any] = HELLO, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=messages, temperature=0, extra_body=NO_THINKING, **options)


@pytest.mark.requirement("ADAPT-10")
def test_each_adapter_is_listed_with_its_base(client: OpenAI) -> None:
    entries = {m.id: m for m in client.models.list()}
    assert {id for id in entries if ":" in id} == {PIRATE, BUTLER}
    for id in (PIRATE, BUTLER):
        entry = client.models.retrieve(id)
        assert entry.created > 0
        more = entry.model_extra or {}
        assert (more["base"], more["adapter"], more["kind"]) == (MODEL, id.partition(":")[2], "text")
        assert more["max_input_tokens"] == (entries[MODEL].model_extra or {})["max_input_tokens"]
    assert "adapter" not in (entries[MODEL].model_extra or {})


def test_what_cannot_be_used_is_in_the_log_with_its_reason_once(server: Running, client: OpenAI) -> None:
    client.models.list()
    assert server.log.count("the adapter *:link cannot be used: link is a link that leads out of the folder") == 1
    assert server.log.count("the adapter *:misfit cannot be used: ") == 1
    assert "does not have the rank 5" in server.log


@pytest.mark.parametrize("model", [f"{MODEL}:misfit", f"{MODEL}:link", f"{MODEL}:../adapters/pirate", "llama:pirate", f"{MODEL}:"])
def test_an_unknown_adapter_is_not_found_and_the_reply_says_what_there_is(client: OpenAI, model: str) -> None:
    with pytest.raises(NotFoundError, match=f"{BUTLER}, {PIRATE}") as asked:
        chat(client, model)
    assert asked.value.code == "model_not_found"
    with pytest.raises(NotFoundError, match=PIRATE):
        client.models.retrieve(model)


@pytest.mark.requirement("ADAPT-10", "F16")
def test_the_adapter_changes_the_answer_and_no_other_models(client: OpenAI) -> None:
    ids = list(SAYS) * 3
    with ThreadPoolExecutor(len(ids)) as threads:
        replies = list(threads.map(lambda id: chat(client, id), ids))
    assert [reply.choices[0].message.content for reply in replies] == [SAYS[id] for id in ids]
    assert [reply.model for reply in replies] == ids


def test_its_log_probabilities_are_others(client: OpenAI) -> None:
    def first(model: str) -> dict[str, float]:
        reply = chat(client, model, max_tokens=1, logprobs=True, top_logprobs=3)
        return {top.token: top.logprob for top in reply.choices[0].logprobs.content[0].top_logprobs}

    assert len({tuple(first(model).items()) for model in SAYS}) == 3


@pytest.mark.requirement("ADAPT-10", "E8", "I4")
def test_no_cached_token_of_one_is_used_for_another(server: Running, client: OpenAI) -> None:
    def cached(model: str) -> int:
        return chat(client, model, LONG, max_tokens=2).usage.prompt_tokens_details.cached_tokens

    def explained(model: str) -> dict[str, Any]:
        with server.http() as http:
            return http.post("/api/prefix/explain", json={"model": model, "messages": LONG, **NO_THINKING}).raise_for_status().json()

    assert [cached(MODEL), cached(PIRATE)] == [0, 0]
    assert explained(PIRATE)["cached_tokens"] >= 64
    assert (explained(BUTLER)["cached_tokens"], explained(BUTLER)["on_disk_tokens"]) == (0, 0)
    assert cached(BUTLER) == 0
    assert min(cached(model) for model in SAYS) >= 64


def test_every_protocol_takes_the_name(server: Running, client: OpenAI) -> None:
    response = client.responses.create(model=PIRATE, input=HELLO, temperature=0, reasoning={"effort": "none"})
    assert response.output_text == SAYS[PIRATE]
    raw = client.completions.create(model=PIRATE, prompt="Hello", max_tokens=4, temperature=0)
    assert raw.model == PIRATE
    with server.anthropic() as anthropic:
        message = anthropic.messages.create(model=PIRATE, max_tokens=60, messages=HELLO, extra_body={"temperature": 0})
        assert [block.text for block in message.content if block.type == "text"] == [SAYS[PIRATE]]
        asked = message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
        assert anthropic.messages.count_tokens(model=PIRATE, messages=HELLO).input_tokens == asked
    stream = client.chat.completions.create(model=BUTLER, messages=HELLO, temperature=0, stream=True, extra_body=NO_THINKING)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == SAYS[BUTLER]
    with server.http() as http:
        ours, base = (http.post("/v1/tokenize", json={"model": model, "prompt": "Hello"}).json() for model in (PIRATE, MODEL))
    assert ours == base


def test_tools_and_forms_are_kept_to(client: OpenAI) -> None:
    p: Prompt = PROMPTS[MODEL]["weather"]
    reply = chat(client, PIRATE, p.messages, tools=p.tools)
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    schema = {"type": "object", "properties": {"ahoy": {"enum": ["aye", "nay"]}}, "required": ["ahoy"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
    said = json.loads(chat(client, PIRATE, response_format=form, max_tokens=40).choices[0].message.content)
    assert said["ahoy"] in ("aye", "nay")


def test_a_models_own_folder_of_adapters_is_found_while_the_server_runs(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE_MODELS / MODEL, tmp_path / "models" / "mine")
    with serve_process(tmp_path, {"MLX_MANAGER_MODELS_DIR": str(tmp_path / "models")}) as running, running.openai() as client:
        assert chat(client, "mine").choices[0].message.content == SAYS[MODEL]
        shutil.copytree(ADAPTERS / "butler", tmp_path / "models" / "mine" / "adapters" / "jeeves")
        assert chat(client, "mine:jeeves").choices[0].message.content == SAYS[BUTLER]
        assert chat(client, "mine").choices[0].message.content == SAYS[MODEL]


@pytest.mark.requirement("ADAPT-10", "E8")
def test_after_a_restart_each_finds_its_own_prefixes_on_the_disk(tmp_path: Path) -> None:
    settings = {"MLX_MANAGER_ADAPTERS_DIR": str(ADAPTERS), "MLX_MANAGER_PREFIX_DISK_GIB": "0.1"}

    def cached(model: str) -> int:
        with serve_process(tmp_path, settings) as running, running.openai() as client:
            return chat(client, model, LONG, max_tokens=2).usage.prompt_tokens_details.cached_tokens

    assert cached(PIRATE) == 0
    assert cached(MODEL) == 0
    assert cached(PIRATE) >= 64
