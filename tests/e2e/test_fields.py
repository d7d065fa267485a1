"""The field rule at the door: each honoured field has something to see, each noted one is named, each refused one is a 400."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from mlx_manager.protocols.openai.schema import CHAT_FIELDS, COMPLETION_FIELDS
from tests.e2e.serving import MODEL, Running

Json = dict[str, Any]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RULES = {CHAT: CHAT_FIELDS, COMPLETIONS: COMPLETION_FIELDS}
BASE: dict[str, Json] = {
    CHAT: {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say apple forever."}],
        "temperature": 0,
        "max_tokens": 12,
        "enable_thinking": False,
    },
    COMPLETIONS: {"model": MODEL, "prompt": "apple apple", "temperature": 0, "max_tokens": 12},
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.http() as http:
        yield http


class Endpoint:
    def __init__(self, http: httpx2.Client, path: str) -> None:
        self.http = http
        self.path = path

    def ask(self, **fields: Any) -> Json:
        """Without the parts of a reply that no request has a say in. A value `...` takes a field of the base away."""
        response = self.post(**fields)
        assert response.status_code == 200, response.text
        reply: Json = response.json()
        return {k: v for k, v in reply.items() if k not in ("id", "created")}

    def post(self, **fields: Any) -> httpx2.Response:
        return self.http.post(self.path, json={k: v for k, v in {**BASE[self.path], **fields}.items() if v is not ...})

    def stream(self, **fields: Any) -> str:
        response = self.post(stream=True, **fields)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return response.text

    def text(self, **fields: Any) -> str:
        (choice,) = self.ask(**fields)["choices"]
        return choice["text"] if self.path == COMPLETIONS else choice["message"]["content"]

    def prompt_tokens(self, **fields: Any) -> int:
        return self.ask(**fields)["usage"]["prompt_tokens"]

    def moves(self, **fields: Any) -> bool:
        """Whether some of a few random replies come out otherwise."""
        return any(self.text(temperature=2, seed=s, **fields) != self.text(temperature=2, seed=s) for s in range(6))


Seen = Callable[[Endpoint], bool]


def _takes_the_likeliest(**fields: Any) -> Seen:
    return lambda e: e.text(temperature=2, seed=1, **fields) == e.text() != e.text(temperature=2, seed=1)


SEEN_EVERYWHERE: dict[str, Seen] = {
    "model": lambda e: e.post(model="nobody").status_code == 404,
    "max_tokens": lambda e: e.ask(max_tokens=3)["usage"]["completion_tokens"] == 3,
    "temperature": lambda e: any(e.text(temperature=2, seed=s) != e.text(temperature=0) for s in range(6)),
    "top_p": _takes_the_likeliest(top_p=0),
    "top_k": _takes_the_likeliest(top_k=1),
    "min_p": _takes_the_likeliest(min_p=1),
    "presence_penalty": lambda e: e.moves(presence_penalty=2),
    "frequency_penalty": lambda e: e.moves(frequency_penalty=2),
    "repetition_penalty": lambda e: e.moves(repetition_penalty=2),
    "seed": lambda e: (
        len({e.text(temperature=2, seed=s) for s in range(6)}) > 1 and e.text(temperature=2, seed=7) == e.text(temperature=2, seed=7)
    ),
    "stop": lambda e: e.text(stop=e.text()[3:5]) == e.text()[:3],
    "n": lambda e: len(e.ask(n=3)["choices"]) == 3,
    "logit_bias": lambda e: e.text(logit_bias={"300": 100}) != e.text(),
    "structured_outputs": lambda e: e.text(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no"),
    "guided_json": lambda e: e.text(guided_json={"const": {"a": [1]}}) == '{"a": [1]}',
    "guided_regex": lambda e: e.text(guided_regex="[0-9]{3}").isdigit(),
    "guided_choice": lambda e: e.text(guided_choice=["yes", "no"]) in ("yes", "no"),
    "guided_grammar": lambda e: e.text(guided_grammar='start: "a" "b"') == "ab",
    "stream": lambda e: e.stream().endswith("data: [DONE]\n\n"),
    "stream_options": lambda e: '"usage":{' in e.stream(stream_options={"include_usage": True}) and '"usage"' not in e.stream(),
}
SEEN: dict[str, dict[str, Seen]] = {
    CHAT: {
        **SEEN_EVERYWHERE,
        "messages": lambda e: e.prompt_tokens(messages=[{"role": "user", "content": "Hello"}]) < e.prompt_tokens(),
        "max_completion_tokens": lambda e: e.ask(max_tokens=..., max_completion_tokens=3)["usage"]["completion_tokens"] == 3,
        "logprobs": lambda e: len(e.ask(logprobs=True)["choices"][0]["logprobs"]["content"]) > 0,
        "top_logprobs": lambda e: len(e.ask(logprobs=True, top_logprobs=4)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 4,
        "tools": lambda e: e.prompt_tokens(tools=[TOOL]) > e.prompt_tokens(),
        "tool_choice": lambda e: "tool_calls" in e.ask(tools=[TOOL], tool_choice="required", max_tokens=60)["choices"][0]["message"],
        # What it does needs a model that calls tools: tests/e2e/test_chat.py.
        "parallel_tool_calls": lambda e: e.ask(parallel_tool_calls=False) == e.ask(),
        "response_format": lambda e: e.text(response_format={"type": "json_object"}).startswith("{"),
        "reasoning_effort": lambda e: (
            e.prompt_tokens(enable_thinking=..., reasoning_effort="none") > e.prompt_tokens(enable_thinking=..., reasoning_effort="low")
        ),
        "enable_thinking": lambda e: e.prompt_tokens(enable_thinking=False) > e.prompt_tokens(enable_thinking=True),
        "thinking_budget": lambda e: (
            e.ask(enable_thinking=True, thinking_budget=3, max_tokens=40)["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 5
        ),
        "chat_template_kwargs": lambda e: e.ask(enable_thinking=..., chat_template_kwargs={"enable_thinking": False}) == e.ask(),
        "store": lambda e: e.ask(store=False) == e.ask() and e.post(store=True).json()["error"]["param"] == "store",
        "modalities": lambda e: e.ask(modalities=["text"]) == e.ask() and e.post(modalities=["text", "audio"]).status_code == 400,
    },
    COMPLETIONS: {
        **SEEN_EVERYWHERE,
        "prompt": lambda e: e.prompt_tokens(prompt="apple") < e.prompt_tokens(),
        "echo": lambda e: e.text(echo=True) == "apple apple" + e.text(),
        "logprobs": lambda e: len(e.ask(logprobs=2)["choices"][0]["logprobs"]["tokens"]) > 0,
        "best_of": lambda e: len(e.ask(best_of=2, n=2)["choices"]) == 2 and e.post(best_of=2).json()["error"]["param"] == "best_of",
    },
}


def _fields(kind: str) -> list[tuple[str, str]]:
    return [(path, name) for path, rules in RULES.items() for name, rule in rules.items() if rule.kind == kind]


@pytest.mark.parametrize(("path", "name"), _fields("honoured"))
def test_what_is_honoured_can_be_seen(http: httpx2.Client, path: str, name: str) -> None:
    assert SEEN[path][name](Endpoint(http, path))


@pytest.mark.parametrize(("path", "name"), _fields("noted"))
def test_what_is_noted_changes_nothing_and_is_named(http: httpx2.Client, path: str, name: str) -> None:
    endpoint = Endpoint(http, path)
    for value in ("x", 0, False, [], {"a": 1}):
        assert endpoint.post(**{name: value}).headers["x-ignored-fields"] == name
    assert endpoint.ask(**{name: "x"}) == endpoint.ask()


@pytest.mark.parametrize(("path", "name"), _fields("refused"))
def test_what_is_refused_is_named(http: httpx2.Client, path: str, name: str) -> None:
    for value in ("x", 0, False, [], {}):
        response = Endpoint(http, path).post(**{name: value})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert f"'{name}'" in error["message"]


@pytest.mark.parametrize("path", RULES)
def test_null_is_the_same_as_absent_for_every_field(http: httpx2.Client, path: str) -> None:
    endpoint = Endpoint(http, path)
    plain = endpoint.ask()
    for name in [*RULES[path], "never_heard_of"]:
        if name in BASE[path]:
            continue
        response = endpoint.post(**{name: None})
        assert response.status_code == 200
        assert "x-ignored-fields" not in response.headers
        assert response.json()["choices"] == plain["choices"]
    for name in ("model", "messages" if path == CHAT else "prompt"):
        assert endpoint.post(**{name: None}).json()["error"]["code"] == "missing_required_parameter"


@pytest.mark.parametrize("path", RULES)
def test_an_unknown_field_is_accepted_and_named_wherever_it_stands(http: httpx2.Client, path: str) -> None:
    endpoint = Endpoint(http, path)
    response = endpoint.post(never_heard_of=1, stream=True, stream_options={"include_obfuscation": False}, **{"naïve, field\r\n": 0})
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "never_heard_of,na_ve__field__,stream_options.include_obfuscation"
    many = endpoint.post(**{f"field_{i:03}": 1 for i in range(200)}).headers["x-ignored-fields"]
    assert 400 < len(many) <= 512
    assert many.split(",") == [f"field_{i:03}" for i in range(len(many.split(",")))]


def test_an_unknown_field_of_a_message_is_named_once(http: httpx2.Client) -> None:
    part = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [part], "mood": "good", "name": None}] * 3
    assert Endpoint(http, CHAT).post(messages=messages).headers["x-ignored-fields"] == "messages.mood,messages.content.cache_control"


@pytest.mark.parametrize("path", RULES)
def test_a_request_without_surprises_has_no_header_about_them(http: httpx2.Client, path: str) -> None:
    response = Endpoint(http, path).post()
    assert "x-ignored-fields" not in response.headers
    assert response.headers["x-backend"] == "local"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_switch_that_the_model_does_not_have_is_named(http: httpx2.Client, streamed: bool) -> None:
    fields: dict[str, Any] = {"model": "llama", "enable_thinking": True, "reasoning_effort": "low", "stream": streamed}
    response = Endpoint(http, CHAT).post(**fields)
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "enable_thinking,reasoning_effort"
