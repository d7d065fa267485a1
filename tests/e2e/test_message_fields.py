"""The field rule for messages: each honoured field has something to see, each noted one is named, each refused one is a 400."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from mlx_manager.protocols.anthropic.schema import COUNT_FIELDS, MESSAGE_FIELDS
from tests.e2e.serving import MODEL, Running

Json = dict[str, Any]
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
RULES = {MESSAGES: MESSAGE_FIELDS, COUNT: COUNT_FIELDS}
PROMPT: Json = {"model": MODEL, "messages": [{"role": "user", "content": "Say apple forever."}], "thinking": {"type": "disabled"}}
BASE: dict[str, Json] = {MESSAGES: {**PROMPT, "temperature": 0, "max_tokens": 12}, COUNT: PROMPT}
TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.http() as http:
        yield http


class Endpoint:
    def __init__(self, http: httpx2.Client, path: str) -> None:
        self.http = http
        self.path = path

    def post(self, **fields: Any) -> httpx2.Response:
        """A value `...` takes a field of the base away."""
        return self.http.post(self.path, json={k: v for k, v in {**BASE[self.path], **fields}.items() if v is not ...})

    def ask(self, **fields: Any) -> Json:
        """Without the parts of a reply that no request has a say in."""
        response = self.post(**fields)
        assert response.status_code == 200, response.text
        reply: Json = response.json()
        if "usage" in reply:
            reply["prompt_tokens"] = sum(reply["usage"].pop(k) for k in ("input_tokens", "cache_read_input_tokens"))
        return {k: v for k, v in reply.items() if k != "id"}

    def text(self, **fields: Any) -> str:
        return "".join(block["text"] for block in self.ask(**fields)["content"] if block["type"] == "text")

    def num_tokens(self, **fields: Any) -> int:
        """Of the prompt."""
        reply = self.ask(**fields)
        return reply["input_tokens"] if self.path == COUNT else reply["prompt_tokens"]

    def moves(self, **fields: Any) -> bool:
        """Whether some of a few random replies come out otherwise."""
        more = {"repetition_penalty": 1.0, "temperature": 1}
        return any(self.text(**more | {"seed": s} | fields) != self.text(**more | {"seed": s}) for s in range(6))

    def refuses(self, named: str, **fields: Any) -> bool:
        response = self.post(**fields)
        return response.status_code == 400 and named in response.json()["error"]["message"]


Seen = Callable[[Endpoint], bool]

SEEN: dict[str, Seen] = {
    "model": lambda e: e.post(model="nobody").status_code == 404,
    "messages": lambda e: e.num_tokens(messages=[{"role": "user", "content": "Hello"}]) < e.num_tokens(),
    "system": lambda e: e.num_tokens(system="Be kind.") > e.num_tokens(),
    "tools": lambda e: e.num_tokens(tools=[TOOL]) > e.num_tokens(),
    "tool_choice": lambda e: (
        e.num_tokens(tools=[TOOL], tool_choice={"type": "none"}) == e.num_tokens(tools=[TOOL])
        and e.refuses("'tool_choice'", tool_choice={"type": "any"})
    ),
    "thinking": lambda e: e.num_tokens(thinking={"type": "disabled"}) > e.num_tokens(thinking={"type": "adaptive"}),
    "output_config": lambda e: (
        e.num_tokens(thinking=..., output_config={"effort": "none"}) > e.num_tokens(thinking=..., output_config={"effort": "low"})
    ),
    "cache_control": lambda e: e.ask(cache_control={"type": "ephemeral"}) == e.ask(),
    "mcp_servers": lambda e: e.ask(mcp_servers=[]) == e.ask() and e.refuses("'mcp_servers'", mcp_servers=[{"url": "https://a"}]),
    "max_tokens": lambda e: e.ask(max_tokens=3)["usage"]["output_tokens"] == 3 and e.ask(max_tokens=0)["usage"]["output_tokens"] == 0,
    "temperature": lambda e: any(e.text(temperature=1, seed=s) != e.text(temperature=0) for s in range(12)),
    "top_p": lambda e: e.text(temperature=1, seed=1, top_p=0) == e.text(),
    "top_k": lambda e: e.text(temperature=1, seed=1, top_k=1) == e.text(),
    "min_p": lambda e: e.text(temperature=1, seed=1, min_p=1) == e.text(),
    "presence_penalty": lambda e: e.moves(presence_penalty=2),
    "frequency_penalty": lambda e: e.moves(frequency_penalty=2),
    "repetition_penalty": lambda e: e.moves(repetition_penalty=2),
    "seed": lambda e: e.text(temperature=1, seed=7) == e.text(temperature=1, seed=7),
    "stop_sequences": lambda e: e.ask(stop_sequences=[e.text()[3:5]])["stop_reason"] == "stop_sequence",
    "stream": lambda e: e.post(stream=True).text.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n'),
}


def _fields(kind: str) -> list[tuple[str, str]]:
    return [(path, name) for path, rules in RULES.items() for name, rule in rules.items() if rule.kind == kind]


@pytest.mark.parametrize(("path", "name"), _fields("honoured"))
def test_what_is_honoured_can_be_seen(http: httpx2.Client, path: str, name: str) -> None:
    assert SEEN[name](Endpoint(http, path))


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
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["message"].startswith(f"'{name}' is not supported")


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
        assert endpoint.ask(**{name: None}) == plain


@pytest.mark.parametrize("path", RULES)
def test_an_unknown_field_is_accepted_and_named_wherever_it_stands(http: httpx2.Client, path: str) -> None:
    part = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}, "mood": "good", "citations": None}
    response = Endpoint(http, path).post(
        never_heard_of=1,
        messages=[{"role": "user", "content": [part, part, {"type": "smell\r\n"}]}],
        tools=[TOOL | {"defer_loading": True}, {"type": "web_search_20260318", "name": "web_search"}],
        output_config={"task_budget": {"total": 5}},
    )
    assert response.status_code == 200, response.text
    assert response.headers["x-ignored-fields"].split(",") == [
        "never_heard_of",
        "messages.content.mood",
        "tools.defer_loading",
        "output_config.task_budget",
        "tools.web_search_20260318",
        "messages.content.smell__",
    ]


def test_a_request_without_surprises_has_no_header_about_them(http: httpx2.Client) -> None:
    response = Endpoint(http, MESSAGES).post()
    assert "x-ignored-fields" not in response.headers
    assert response.headers["x-backend"] == "local"
    assert response.headers["request-id"] == response.headers["x-request-id"]
