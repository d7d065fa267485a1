"""Profiles and aliases over a real socket: what they say for clients of every protocol, and how they are changed."""

import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic
from openai import BadRequestError, NotFoundError, OpenAI

from tests.e2e.serving import FIXTURE_MODELS, MODEL, SMALL_WINDOW_MODEL, Running, make_small_window_model, serve_process

ADAPTERS = Path(__file__).parents[1] / "fixtures" / "adapters"
ASK_CODE: list[Any] = [{"role": "user", "content": "What is the secret code?"}]
ADD: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
HELLO: list[Any] = [{"role": "user", "content": "Hello, I am Alice."}]
COUNT: list[Any] = [{"role": "user", "content": "Count from 1 to 20."}]
KEEPER: dict[str, Any] = {"system_prompt": "The secret code is 4821.", "temperature": 0, "enable_thinking": False}
SAYS_CODE = "The secret code is 4821."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a test puts there is found by the next list."""
    folder = tmp_path_factory.mktemp("models")
    make_small_window_model(folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def server(data_dir: Path, models: Path) -> Iterator[Running]:
    settings = {"MLX_MANAGER_ADAPTERS_DIR": str(ADAPTERS), "MLX_MANAGER_MODELS_DIR": f"{FIXTURE_MODELS}:{models}"}
    with serve_process(data_dir, settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture(scope="module")
def anthropic(server: Running) -> Iterator[Anthropic]:
    with server.anthropic() as client:
        yield client


@pytest.fixture
def http(server: Running) -> Iterator[httpx2.Client]:
    """Whatever a test makes is gone after it."""
    with server.http() as http:
        yield http
        for alias in http.get("/api/aliases").json()["aliases"]:
            http.delete(f"/api/aliases/{alias['name']}").raise_for_status()
        for profile in http.get("/api/profiles").json()["profiles"]:
            http.delete(f"/api/profiles/{profile['id']}").raise_for_status()


def make(http: httpx2.Client, name: str = "it", model: str = MODEL, **presets: Any) -> dict[str, Any]:
    return http.post("/api/profiles", json={"model": model, "name": name, **presets}).raise_for_status().json()


def point(http: httpx2.Client, name: str, target: str) -> dict[str, Any]:
    return http.post("/api/aliases", json={"name": name, "target": target}).raise_for_status().json()


def refused(reply: httpx2.Response, status: int = 400) -> tuple[str, str]:
    """The field, and what is said of it."""
    assert reply.status_code == status, reply.text
    problem = reply.json()
    return problem.get("errors", [{"pointer": ""}])[0]["pointer"], problem["detail"]


def tokens(http: httpx2.Client, model: str, messages: list[Any], **more: Any) -> dict[str, Any]:
    return http.post("/v1/tokenize", json={"model": model, "messages": messages, **more}).raise_for_status().json()


def said(client: OpenAI, model: str, messages: list[Any], **options: Any) -> str:
    return client.chat.completions.create(model=model, messages=messages, **options).choices[0].message.content or ""


# ---- what a profile says


@pytest.mark.requirement("K3", "PRO-02")
def test_every_protocol_gets_the_system_prompt_once(http: httpx2.Client, client: OpenAI, anthropic: Anthropic) -> None:
    make(http, "keeper", **KEEPER)
    model = f"{MODEL}:keeper"
    whole = client.chat.completions.create(model=model, messages=ASK_CODE)
    assert (whole.model, whole.choices[0].message.content) == (model, SAYS_CODE)
    stream = list(client.chat.completions.create(model=model, messages=ASK_CODE, stream=True))
    assert {chunk.model for chunk in stream} == {model}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == SAYS_CODE
    message = anthropic.messages.create(model=model, max_tokens=40, messages=ASK_CODE)
    assert (message.model, [block.text for block in message.content if block.type == "text"]) == (model, [SAYS_CODE])
    response = client.responses.create(model=model, input="What is the secret code?")
    assert (response.model, response.output_text) == (model, SAYS_CODE)
    again = client.responses.create(model=model, input="What is the secret code?", previous_response_id=response.id)
    assert again.output_text == SAYS_CODE
    counted = anthropic.messages.count_tokens(model=model, messages=ASK_CODE).input_tokens
    of_responses = client.responses.input_tokens.count(model=model, input="What is the secret code?").input_tokens
    of_message = message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    assert counted == of_responses == of_message == response.usage.input_tokens == whole.usage.prompt_tokens
    rendered = tokens(http, model, ASK_CODE, enable_thinking=False)
    written_out = tokens(http, MODEL, [{"role": "system", "content": KEEPER["system_prompt"]}, *ASK_CODE], enable_thinking=False)
    assert rendered == written_out
    assert rendered["count"] == counted
    assert tokens(http, model, ASK_CODE) == rendered


def test_the_explainer_sees_the_prompt_that_was_computed(http: httpx2.Client, client: OpenAI) -> None:
    make(http, "keeper", **KEEPER)
    long = [{"role": "user", "content": "Repeat after me: " + " ".join(["tiger", "piano", "cloud", "seven"] * 15)}]
    used = client.chat.completions.create(model=f"{MODEL}:keeper", messages=long, max_tokens=2).usage
    explained = http.post("/api/prefix/explain", json={"model": f"{MODEL}:keeper", "messages": long}).raise_for_status().json()
    assert explained["prompt_tokens"] == used.prompt_tokens
    assert explained["cached_tokens"] >= 64


@pytest.mark.requirement("K3", "PRO-02")
def test_a_request_that_has_a_system_message_keeps_it(http: httpx2.Client, client: OpenAI, anthropic: Anthropic) -> None:
    make(http, "keeper", **KEEPER)
    model = f"{MODEL}:keeper"
    zed = [{"role": "system", "content": "You are Zed."}, {"role": "user", "content": "Who are you?"}]
    assert said(client, model, zed) == "I am Zed."
    for role in ("system", "developer"):
        for own in ("", "You are Zed."):
            messages = [{"role": role, "content": own}, *ASK_CODE]
            assert tokens(http, model, messages) == tokens(http, MODEL, messages, enable_thinking=False)
    plain = anthropic.messages.count_tokens(model=MODEL, messages=ASK_CODE, thinking={"type": "disabled"}).input_tokens
    emptied = anthropic.messages.count_tokens(model=model, messages=ASK_CODE, system=[]).input_tokens
    assert emptied == plain
    named = anthropic.messages.count_tokens(model=model, messages=ASK_CODE, system="You are Zed.").input_tokens
    assert plain < named < anthropic.messages.count_tokens(model=model, messages=ASK_CODE).input_tokens


@pytest.mark.requirement("K3", "A1", "A2")
def test_the_requests_own_sampling_wins_and_the_profiles_stands_in(http: httpx2.Client, client: OpenAI) -> None:
    make(http, "greedy", temperature=0)
    make(http, "wild", temperature=2, enable_thinking=False)
    drawn = {"seed": 7, "logprobs": True, "top_logprobs": 0, "max_tokens": 24}

    def text(model: str, **options: Any) -> str:
        reply = client.completions.create(model=model, prompt="Hello", max_tokens=16, **options)
        return reply.choices[0].text

    greedy = text(MODEL, temperature=0)
    assert [text(f"{MODEL}:greedy", seed=seed) for seed in (1, 2, 3)] == [greedy] * 3
    assert text(f"{MODEL}:wild", temperature=0) == greedy
    wild = {text(f"{MODEL}:wild", seed=seed) for seed in (1, 2, 3)}
    assert len(wild) > 1
    assert wild == {text(MODEL, seed=seed, temperature=2) for seed in (1, 2, 3)}
    assert text(f"{MODEL}:greedy", seed=1, temperature=2) == text(MODEL, seed=1, temperature=2)
    assert said(client, f"{MODEL}:wild", ADD, temperature=0) == "2 + 3 = 5."
    assert said(client, f"{MODEL}:wild", ADD, extra_body={"temperature": None}, **drawn) == said(
        client, MODEL, ADD, temperature=2, extra_body={"enable_thinking": False}, **drawn
    )


def test_a_seed_of_the_profile_makes_every_draw_the_same(http: httpx2.Client, client: OpenAI) -> None:
    make(http, "seeded", seed=-5, temperature=1.5, top_k=50, top_p=0.99, min_p=0.0, presence_penalty=0.1, repetition_penalty=1.1)

    def text(**options: Any) -> str:
        return client.completions.create(model=f"{MODEL}:seeded", prompt="Hello", max_tokens=24, **options).choices[0].text

    assert text() == text()
    assert text(seed=1) != text()


@pytest.mark.requirement("K3")
def test_stop_strings_and_limits_of_the_reply(http: httpx2.Client, client: OpenAI, anthropic: Anthropic) -> None:
    make(http, "short", stop=["7", "9"], max_tokens=8, temperature=0, enable_thinking=False)
    model = f"{MODEL}:short"
    everything = " ".join(map(str, range(1, 21)))
    capped = client.chat.completions.create(model=model, messages=COUNT)
    assert (capped.choices[0].finish_reason, capped.usage.completion_tokens) == ("length", 8)
    stopped = client.chat.completions.create(model=model, messages=COUNT, max_tokens=100)
    assert (stopped.choices[0].finish_reason, stopped.choices[0].message.content) == ("stop", "1 2 3 4 5 6 ")
    assert said(client, model, COUNT, max_tokens=100, stop="4") == "1 2 3 "
    assert said(client, model, COUNT, max_tokens=100, extra_body={"stop": []}) == everything
    message = anthropic.messages.create(model=model, messages=COUNT, max_tokens=100)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "7")
    whole = anthropic.messages.create(model=model, messages=COUNT, max_tokens=100, stop_sequences=[])
    assert [block.text for block in whole.content if block.type == "text"] == [everything]
    assert client.completions.create(model=model, prompt="1 2 3", extra_body={"stop": []}).usage.completion_tokens <= 8
    assert client.responses.create(model=model, input="Count from 1 to 20.").incomplete_details.reason == "max_output_tokens"


@pytest.mark.requirement("K3", "ADAPT-07")
def test_the_switch_for_thinking_stands_in_for_who_says_nothing(http: httpx2.Client, client: OpenAI, anthropic: Anthropic) -> None:
    make(http, "quick", enable_thinking=False, temperature=0)
    make(http, "slow", enable_thinking=True, temperature=0, max_tokens=100)

    def thought(model: str, **options: Any) -> str | None:
        message = client.chat.completions.create(model=f"{MODEL}:{model}", messages=ADD, **options).choices[0].message
        assert message.content == "2 + 3 = 5."
        return getattr(message, "reasoning_content", None)

    assert thought("quick") is None
    assert thought("slow")
    assert thought("quick", extra_body={"enable_thinking": True})
    assert thought("quick", reasoning_effort="high")
    assert thought("slow", extra_body={"chat_template_kwargs": {"enable_thinking": False}}) is None
    assert thought("slow", reasoning_effort="none") is None
    assert thought("slow", extra_body={"thinking_budget": 0}) is None
    off = anthropic.messages.create(model=f"{MODEL}:slow", max_tokens=100, messages=ADD, thinking={"type": "disabled"})
    assert [block.type for block in off.content] == ["text"]
    on = anthropic.messages.create(model=f"{MODEL}:slow", max_tokens=100, messages=ADD)
    assert [block.type for block in on.content] == ["thinking", "text"]


def test_what_the_profile_says_is_never_named_as_ignored_of_the_client(http: httpx2.Client) -> None:
    plain = {"max_tokens": 2, "messages": HELLO}
    make(http, "quick", enable_thinking=True, thinking_budget=2)
    for path in ("/v1/messages", "/v1/chat/completions"):
        reply = http.post(path, json={"model": f"{MODEL}:quick", **plain}).raise_for_status()
        assert "x-ignored-fields" not in reply.headers
    reply = http.post("/v1/messages", json={"model": "llama", "thinking": {"type": "disabled"}, **plain}).raise_for_status()
    assert reply.headers["x-ignored-fields"] == "thinking"


@pytest.mark.requirement("ADAPT-10", "K3")
def test_an_adapter_of_the_profile_is_what_answers(http: httpx2.Client, client: OpenAI) -> None:
    profile = make(http, "sailor", adapter="pirate", temperature=0, enable_thinking=False)
    assert profile["available"]
    assert said(client, f"{MODEL}:sailor", HELLO) == "Ahoy, Alice! What be yer wish?"
    assert said(client, f"{MODEL}:pirate", HELLO, temperature=0, extra_body={"enable_thinking": False}) == "Ahoy, Alice! What be yer wish?"
    entry = client.models.retrieve(f"{MODEL}:sailor").model_extra
    assert (entry["base"], entry["profile"], entry["adapter"]) == (MODEL, "sailor", "pirate")


@pytest.mark.requirement("A9", "K3")
def test_a_context_limit_is_that_of_the_model_for_whoever_asks_by_the_profile(
    http: httpx2.Client, client: OpenAI, anthropic: Anthropic
) -> None:
    make(http, "narrow", context_limit=40, temperature=0, enable_thinking=False)
    model = f"{MODEL}:narrow"
    long = [{"role": "user", "content": "Repeat after me: " + "apple river " * 20}]
    with pytest.raises(BadRequestError, match="maximum context length is 40 tokens") as refusal:
        said(client, model, long)
    assert refusal.value.code == "context_length_exceeded"
    prompt_tokens = tokens(http, model, COUNT)["count"]
    cut = client.chat.completions.create(model=model, messages=COUNT, max_tokens=500)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 40 - prompt_tokens)
    assert tokens(http, model, COUNT)["max_model_len"] == 40
    assert anthropic.models.retrieve(model).max_input_tokens == 40
    make(http, "wide", context_limit=1000, model=SMALL_WINDOW_MODEL)
    assert anthropic.models.retrieve(f"{SMALL_WINDOW_MODEL}:wide").max_input_tokens == 64
    with pytest.raises(BadRequestError, match="maximum context length is 64 tokens"):
        said(client, f"{SMALL_WINDOW_MODEL}:wide", [{"role": "user", "content": "apple river " * 60}])


# ---- names


@pytest.mark.requirement("API-04", "I7")
def test_an_alias_is_asked_for_like_a_model(http: httpx2.Client, client: OpenAI, anthropic: Anthropic) -> None:
    make(http, "keeper", description="Knows the code.\nTells everybody.", **KEEPER)
    point(http, "claude-sonnet-latest", f"{MODEL}:keeper")
    point(http, "gpt-4o", MODEL)
    point(http, "text-embedding-3-small", "tiny_bert")
    point(http, "ahoy:latest", f"{MODEL}:pirate")
    message = anthropic.messages.create(model="claude-sonnet-latest", max_tokens=40, messages=ASK_CODE)
    assert (message.model, message.content[-1].text) == ("claude-sonnet-latest", SAYS_CODE)  # type: ignore[union-attr]
    assert said(client, "gpt-4o", ADD, temperature=0, extra_body={"enable_thinking": False}) == "2 + 3 = 5."
    assert said(client, "ahoy:latest", HELLO, temperature=0, extra_body={"enable_thinking": False}).startswith("Ahoy")
    made = client.embeddings.create(model="text-embedding-3-small", input="Hello", encoding_format="float")
    assert made.model == "text-embedding-3-small"
    assert made.data == client.embeddings.create(model="tiny_bert", input="Hello", encoding_format="float").data
    ranked = http.post("/v1/rerank", json={"model": "text-embedding-3-small", "query": "a", "documents": ["b", "c"]})
    assert ranked.raise_for_status().json()["model"] == "text-embedding-3-small"
    text = http.post("/v1/detokenize", json={"model": "gpt-4o", "tokens": tokens(http, MODEL, ADD)["tokens"]}).json()["prompt"]
    assert "What is 2 + 3?" in text
    listed = {m.id: m.model_extra or {} for m in client.models.list()}
    assert [m.id for m in anthropic.models.list()] == list(listed)
    assert listed["claude-sonnet-latest"]["alias_of"] == f"{MODEL}:keeper"
    assert listed["gpt-4o"]["alias_of"] == MODEL
    assert listed["text-embedding-3-small"]["kind"] == "embedding"
    assert (listed[f"{MODEL}:keeper"]["base"], listed[f"{MODEL}:keeper"]["profile"]) == (MODEL, "keeper")
    assert listed[f"{MODEL}:keeper"]["description"] == "Knows the code.\nTells everybody."
    assert listed[f"{MODEL}:keeper"]["state"] == "ready"
    assert client.models.retrieve("gpt-4o").model_extra == listed["gpt-4o"]


def test_requests_are_counted_under_the_model_that_answered(server: Running, http: httpx2.Client, client: OpenAI) -> None:
    point(http, "gpt-4o", MODEL)
    before = server.metric("mlx_manager_requests_total", model=MODEL, outcome="ok")
    said(client, "gpt-4o", ADD, max_tokens=2)
    assert server.metric("mlx_manager_requests_total", model=MODEL, outcome="ok") == before + 1
    assert server.metric("mlx_manager_requests_total", model="gpt-4o") == 0


def test_what_is_not_here_yet_may_be_named_and_is_marked(http: httpx2.Client, client: OpenAI) -> None:
    profile = make(http, "fast", model="someone/large", system_prompt="Be quick.", reasoning_effort="low", adapter="theirs")
    alias = point(http, "gpt-5", "someone/large:fast")
    assert (profile["available"], alias["available"]) == (False, False)
    assert {"someone/large:fast", "gpt-5"}.isdisjoint({m.id for m in client.models.list()})
    for name in ("someone/large:fast", "gpt-5"):
        with pytest.raises(NotFoundError, match="someone/large") as refusal:
            said(client, name, HELLO)
        assert refusal.value.code == "model_not_found"


def test_a_name_that_means_something_else_is_refused(http: httpx2.Client) -> None:
    make(http, "taken")
    point(http, "gpt-4o", f"{MODEL}:taken")

    def profile(**fields: Any) -> httpx2.Response:
        return http.post("/api/profiles", json={"model": MODEL, "name": "other", **fields})

    def alias(name: str, target: str) -> httpx2.Response:
        return http.post("/api/aliases", json={"name": name, "target": target})

    before = (http.get("/api/profiles").text, http.get("/api/aliases").text)
    assert refused(profile(name="taken"), 409) == ("name", f"There is a profile '{MODEL}:taken' already.")
    assert refused(profile(name="pirate"), 409)[0] == "name"
    assert refused(profile(model="gpt-4o"))[0] == "model"
    assert refused(profile(model="tiny_bert"))[0] == "model"
    assert refused(profile(adapter="nobody")) == ("adapter", f"The model '{MODEL}' has no adapter 'nobody'. It has: butler, pirate.")
    assert refused(profile(model="llama", adapter="pirate"))[1].endswith("It has none.")
    assert refused(alias("gpt-4o", MODEL), 409)[0] == "name"
    assert refused(alias(MODEL, "llama"), 409)[0] == "name"
    assert refused(alias(f"{MODEL}:pirate", "llama"), 409)[0] == "name"
    assert refused(alias(f"{MODEL}:taken", "llama"), 409)[0] == "name"
    assert refused(alias("mine", "gpt-4o"))[0] == "target"
    assert refused(alias("mine", "mine"))[0] == "target"
    assert refused(alias("mine", f"{MODEL}:nobody"))[0] == "target"
    assert refused(http.delete(f"/api/profiles/{MODEL}:taken"), 409)[1] == "The alias gpt-4o would stand for nothing."
    point(http, "mine", "not-here")
    assert refused(alias("not-here", MODEL), 409)[0] == "name"
    http.delete("/api/aliases/mine").raise_for_status()
    assert (http.get("/api/profiles").text, http.get("/api/aliases").text) == before


BAD_NAMES = [
    "../x",
    "a/../b",
    "a/b/c",
    "/etc/passwd",
    "a\\b",
    "a b",
    ".hidden",
    "",
    "a..b",
    "a:b:c",
    "ä",
    "a\n",
    "%2e%2e",
    "x" * 300,
    "a/",
    "a:",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_an_id_and_never_a_path(http: httpx2.Client, name: str) -> None:
    assert refused(http.post("/api/profiles", json={"model": name, "name": "it"}))[0] == "model"
    assert refused(http.post("/api/profiles", json={"model": MODEL, "name": name}))[0] == "name"
    assert refused(http.post("/api/profiles", json={"model": MODEL, "name": "it", "adapter": name}))[0] == "adapter"
    assert refused(http.post("/api/aliases", json={"name": name, "target": MODEL}))[0] == "name"
    assert refused(http.post("/api/aliases", json={"name": "it", "target": name}))[0] == "target"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.5),
        ("temperature", "0"),
        ("top_p", -0.1),
        ("top_k", 1.5),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("max_tokens", 2**63),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("enable_thinking", "yes"),
        ("reasoning_effort", "much"),
        ("thinking_budget", -1),
        ("thinking_budget", 10**30),
        ("context_limit", 0),
        ("context_limit", 2**31),
        ("system_prompt", 7),
        ("description", ["a"]),
        ("temprature", 0),
        ("logit_bias", {"1": 2}),
        ("chat_template_kwargs", {"trust": True}),
        ("version", 1),
    ],
)
def test_a_bad_value_is_refused_by_its_field_and_nothing_is_made(http: httpx2.Client, field: str, value: object) -> None:
    reply = http.post("/api/profiles", json={"model": MODEL, "name": "it", field: value})
    assert refused(reply)[0].partition("[")[0] == field
    assert http.get("/api/profiles").json() == {"profiles": []}


def test_what_the_template_has_no_use_for_is_refused_by_its_field(http: httpx2.Client) -> None:
    def profile(model: str, **presets: Any) -> httpx2.Response:
        return http.post("/api/profiles", json={"model": model, "name": "it", **presets})

    for field, value in (("enable_thinking", False), ("reasoning_effort", "low"), ("thinking_budget", 5)):
        assert refused(profile("llama", **{field: value})) == (field, f"The template of 'llama' has no use for '{field}'.")
    assert refused(profile(MODEL, system_prompt="apple " * 100, context_limit=50))[0] == "context_limit"
    assert refused(profile(SMALL_WINDOW_MODEL, system_prompt="apple " * 100))[0] == "system_prompt"
    assert http.get("/api/profiles").json() == {"profiles": []}


def test_a_model_whose_template_has_no_system_message_is_not_given_one(http: httpx2.Client, client: OpenAI, models: Path) -> None:
    for name in ("strict", "raw"):
        shutil.copytree(FIXTURE_MODELS / MODEL, models / name)
    template = models / "strict" / "chat_template.jinja"
    template.write_text(
        "{%- if messages[0].role == 'system' -%}{{- raise_exception('No system role') -}}{%- endif -%}" + template.read_text()
    )
    (models / "raw" / "chat_template.jinja").unlink()
    reply = http.post("/api/profiles", json={"model": "strict", "name": "it", "system_prompt": "Be kind."})
    assert refused(reply) == ("system_prompt", "Invalid 'system_prompt': The model's chat template refuses these messages: No system role.")
    make(http, "it", model="strict", temperature=0)
    assert refused(http.post("/api/profiles", json={"model": "raw", "name": "it", "enable_thinking": True}))[0] == "enable_thinking"
    make(http, "it", model="raw", temperature=0, max_tokens=3)
    assert client.completions.create(model="raw:it", prompt="Hello").usage.completion_tokens <= 3


# ---- changing them


def test_a_change_holds_for_the_next_request_and_leaves_one_under_way_alone(http: httpx2.Client, client: OpenAI) -> None:
    made = make(http, "counter", temperature=0, enable_thinking=False, max_tokens=200)
    model = f"{MODEL}:counter"
    stream = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Say apple forever."}], stream=True)
    next(iter(stream))
    changed = http.put(f"/api/profiles/{model}", json={"max_tokens": 1, "version": made["version"]}).raise_for_status().json()
    assert changed == made | {"max_tokens": 1, "temperature": None, "enable_thinking": None, "version": 2}
    short = client.chat.completions.create(model=model, messages=ADD)
    assert short.usage.completion_tokens == 1
    assert len([chunk for chunk in stream if chunk.choices]) > 100
    http.delete(f"/api/profiles/{model}", params={"version": 2}).raise_for_status()
    with pytest.raises(NotFoundError):
        said(client, model, ADD)


@pytest.mark.requirement("B5")
def test_two_who_edit_at_once_do_not_overwrite_each_other(http: httpx2.Client) -> None:
    made = make(http, "it", description="first")
    point(http, "gpt-4o", MODEL)

    def edit(n: int) -> int:
        return http.put(f"/api/profiles/{made['id']}", json={"description": str(n), "version": 1}).status_code

    def redirect(n: int) -> int:
        return http.put("/api/aliases/gpt-4o", json={"target": f"model-{n}", "version": 1}).status_code

    for change in (edit, redirect):
        with ThreadPoolExecutor(8) as threads:
            assert sorted(threads.map(change, range(8))) == [200] + [409] * 7
    assert http.get(f"/api/profiles/{made['id']}").json()["version"] == 2
    stale = http.put(f"/api/profiles/{made['id']}", json={"version": 1})
    assert refused(stale, 409)[0] == "version"
    assert stale.json()["type"].endswith(":version_mismatch")
    assert refused(http.delete(f"/api/profiles/{made['id']}", params={"version": 1}), 409)[0] == "version"
    assert refused(http.delete("/api/aliases/gpt-4o", params={"version": "x"}))[0] == "version"
    assert refused(http.put(f"/api/profiles/{made['id']}", json={"description": "x"}))[0] == "version"
    assert refused(http.put(f"/api/profiles/{made['id']}", json={"version": 2, "name": "other"}))[0] == "name"
    with ThreadPoolExecutor(8) as threads:
        one = {"model": MODEL, "name": "same"}
        assert sorted(threads.map(lambda _: http.post("/api/profiles", json=one).status_code, range(8))) == [201] + [409] * 7


def test_what_is_not_there_is_not_found(http: httpx2.Client) -> None:
    for kind in ("profiles", "aliases"):
        for method, body in (("GET", None), ("DELETE", None), ("PUT", {"version": 1, **({"target": MODEL} if kind == "aliases" else {})})):
            assert http.request(method, f"/api/{kind}/nobody:nothing", json=body).status_code == 404
    assert http.post("/api/profiles", content=b"[]").status_code == 400
    assert http.post("/api/aliases", content=b"{").status_code == 400


@pytest.mark.requirement("D5")
def test_while_the_database_is_locked_changes_are_refused_and_everything_else_goes_on(
    http: httpx2.Client, client: OpenAI, data_dir: Path
) -> None:
    make(http, "keeper", **KEEPER)
    other = sqlite3.connect(data_dir / "mlx-manager.db", timeout=0)
    other.execute("BEGIN EXCLUSIVE")
    try:
        locked = http.post("/api/profiles", json={"model": MODEL, "name": "it"})
        assert (locked.status_code, locked.json()["type"].rpartition(":")[2]) == (503, "not_saved")
        assert "Nothing was changed" in locked.json()["detail"]
        assert [profile["name"] for profile in http.get("/api/profiles").json()["profiles"]] == ["keeper"]
        assert said(client, f"{MODEL}:keeper", ASK_CODE) == SAYS_CODE
    finally:
        other.close()
    make(http, "it")


@pytest.mark.requirement("F9", "D1")
def test_a_restart_keeps_them_and_what_was_found(tmp_path: Path) -> None:
    presets = {
        **KEEPER,
        "description": "a\nb",
        "top_p": 0.0,
        "top_k": 0,
        "seed": -(2**63),
        "stop": [],
        "max_tokens": 40,
        "thinking_budget": 0,
        "context_limit": 500,
    }
    with serve_process(tmp_path) as running, running.http() as http:
        made = make(http, "keeper", **presets)
        aliased = point(http, "claude-opus", f"{MODEL}:keeper")
        probed = http.post(f"/api/models/{MODEL}/probe").raise_for_status().json()
    assert {name: made[name] for name in presets} == presets
    with serve_process(tmp_path) as running, running.http() as http, running.anthropic() as client:
        assert http.get("/api/profiles").json() == {"profiles": [made]}
        assert http.get("/api/aliases").json() == {"aliases": [aliased]}
        assert http.get(f"/v1/models/{MODEL}").json()["abilities"] == probed
        assert client.messages.create(model="claude-opus", max_tokens=40, messages=ASK_CODE).content[-1].text == SAYS_CODE  # type: ignore[union-attr]


def test_what_is_configured_comes_before_what_turns_up_on_the_disk(http: httpx2.Client, client: OpenAI, models: Path) -> None:
    shutil.copytree(FIXTURE_MODELS / MODEL, models / "mine")
    profile = make(http, "jeeves", model="mine", **KEEPER)
    point(http, "gpt-4o", "mine:jeeves")
    shutil.copytree(ADAPTERS / "butler", models / "mine" / "adapters" / "jeeves")
    shutil.copytree(FIXTURE_MODELS / "llama", models / "gpt-4o")
    assert [m.id for m in client.models.list() if m.id in ("gpt-4o", "mine:jeeves")] == ["gpt-4o", "mine:jeeves"]
    assert said(client, "mine:jeeves", ASK_CODE) == said(client, "gpt-4o", ASK_CODE) == SAYS_CODE
    with_it = {**KEEPER, "system_prompt": None, "adapter": "jeeves", "version": profile["version"]}
    http.put("/api/profiles/mine:jeeves", json=with_it).raise_for_status()
    assert said(client, "mine:jeeves", HELLO) == "Good day, Alice! You rang?"
    http.put("/api/aliases/gpt-4o", json={"target": "llama", "version": 1}).raise_for_status()
