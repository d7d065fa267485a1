"""Messages through Anthropic's official SDK, which here refuses every reply that its types do not allow."""

import base64
import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, beta_tool
from anthropic.types import Message, TextBlock, ThinkingBlock, ToolUseBlock

from tests.e2e.serving import MODEL, SMALL_WINDOW, SMALL_WINDOW_MODEL, Running, serve_process
from tests.fixtures.prompts import HELP, numbers

WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city name"}},
        "required": ["city"],
    },
}
OFF, ON = {"type": "disabled"}, {"type": "adaptive"}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Anthropic]:
    with server.anthropic() as client:
        yield client


def request(said: str | list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    """Greedy and without thinking, unless the options say otherwise (None: nothing at all)."""
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    defaults: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "thinking": OFF, "extra_body": {"temperature": 0}}
    return {"messages": messages} | {k: v for k, v in (defaults | options).items() if v is not None}


def whole(client: Anthropic, said: str | list[dict[str, Any]], **options: Any) -> Message:
    return client.messages.create(**request(said, options))


def streamed(client: Anthropic, said: str | list[dict[str, Any]], **options: Any) -> Message:
    with client.messages.stream(**request(said, options)) as stream:
        return stream.get_final_message()


def content_of(message: Message) -> list[dict[str, Any]]:
    """Without what differs from one reply to the next."""
    blocks = [block.model_dump(exclude_none=True, exclude={"id", "parsed_output"}) for block in message.content]
    return [b | {"signature": bool(b["signature"])} if "signature" in b else b for b in blocks]


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if isinstance(block, TextBlock))


def input_tokens(message: Message) -> int:
    """All of the prompt."""
    used = message.usage
    return used.input_tokens + (used.cache_read_input_tokens or 0) + (used.cache_creation_input_tokens or 0)


@pytest.mark.parametrize(
    ("said", "options", "content", "ending"),
    [
        ("Hello!", {}, [{"type": "text", "text": f"Hello! {HELP}"}], ("end_turn", None)),
        (
            "Hello!",
            {"thinking": ON},
            [
                {"type": "thinking", "thinking": "The user greets me.", "signature": True},
                {"type": "text", "text": f"Hello! {HELP}"},
            ],
            ("end_turn", None),
        ),
        (
            "Hello!",
            {"thinking": ON | {"display": "omitted"}},
            [{"type": "thinking", "thinking": "", "signature": True}, {"type": "text", "text": f"Hello! {HELP}"}],
            ("end_turn", None),
        ),
        ("Count from 1 to 20.", {"max_tokens": 3}, None, ("max_tokens", None)),
        ("Count from 1 to 20.", {"stop_sequences": ["11", " 7"]}, [{"type": "text", "text": numbers(6)}], ("stop_sequence", " 7")),
        ("Say apple forever.", {"model": SMALL_WINDOW_MODEL}, None, ("model_context_window_exceeded", None)),
        ("Who are you?", {"system": "You are Zed."}, [{"type": "text", "text": "I am Zed."}], ("end_turn", None)),
        (
            "Who are you?",
            {"system": [{"type": "text", "text": "You are Zed.", "cache_control": {"type": "ephemeral"}}]},
            [{"type": "text", "text": "I am Zed."}],
            ("end_turn", None),
        ),
        (
            "What is the weather in Paris?",
            {"tools": [WEATHER]},
            [{"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}],
            ("tool_use", None),
        ),
        (
            "What is the weather in Paris and London?",
            {"tools": [WEATHER]},
            [{"type": "tool_use", "name": "get_weather", "input": {"city": city}} for city in ("Paris", "London")],
            ("tool_use", None),
        ),
        (
            "What is the weather in Paris and London?",
            {"tools": [WEATHER], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            [{"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}],
            ("tool_use", None),
        ),
        ("Hello!", {"max_tokens": 0}, [], ("max_tokens", None)),
    ],
    ids=lambda v: json.dumps(v)[:40] if isinstance(v, dict) else "",
)
def test_a_reply_is_what_it_should_be_and_its_stream_collects_to_it(
    client: Anthropic, said: str, options: dict[str, Any], content: list[dict[str, Any]] | None, ending: tuple[str, str | None]
) -> None:
    at_once, in_pieces = whole(client, said, **options), streamed(client, said, **options)
    for reply in (at_once, in_pieces):
        assert (reply.stop_reason, reply.stop_sequence) == ending
        assert (reply.type, reply.role, reply.model) == ("message", "assistant", options.get("model", MODEL))
        assert reply.id.startswith("msg_")
        assert content is None or content_of(reply) == content
    assert content_of(in_pieces) == content_of(at_once)
    assert input_tokens(in_pieces) == input_tokens(at_once) > 0
    assert in_pieces.usage.output_tokens == at_once.usage.output_tokens
    assert in_pieces.usage.output_tokens_details == at_once.usage.output_tokens_details
    assert at_once.id != in_pieces.id


def test_the_beta_address_answers_the_same(server: Running, client: Anthropic) -> None:
    options = request("Hello!", {})
    beta = client.beta.messages.create(**options, betas=["interleaved-thinking-2025-05-14", "never-heard-of-2030-01-01"])
    assert [b.model_dump(exclude_none=True) for b in beta.content] == content_of(whole(client, "Hello!"))
    assert beta.stop_reason == "end_turn"
    counted = client.beta.messages.count_tokens(model=MODEL, messages=options["messages"], thinking=OFF)  # type: ignore[arg-type]
    assert counted.input_tokens == beta.usage.input_tokens + (beta.usage.cache_read_input_tokens or 0)
    for version in ("2023-06-01", "2026-10-21", "tomorrow"):
        assert client.messages.create(**options, extra_headers={"anthropic-version": version}).stop_reason == "end_turn"
    with server.http() as http:
        assert http.post("/v1/messages", json={"model": MODEL, "max_tokens": 1, "messages": options["messages"]}).status_code == 200


def test_usage_counts_every_token_once(client: Anthropic) -> None:
    used = whole(client, "Say apple forever.", max_tokens=5).usage
    assert used.output_tokens == 5
    assert used.output_tokens_details is not None
    assert used.output_tokens_details.thinking_tokens == 0
    assert used.cache_creation is not None
    assert (used.cache_creation.ephemeral_1h_input_tokens, used.cache_creation.ephemeral_5m_input_tokens) == (0, 0)
    thinking = whole(client, "Hello!", thinking=ON).usage
    assert thinking.output_tokens_details is not None
    assert 0 < thinking.output_tokens_details.thinking_tokens < thinking.output_tokens


# ---- tools


def test_a_call_is_streamed_and_its_result_is_understood(client: Anthropic) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    fragments = list[str]()
    with client.messages.stream(**request([question], {"tools": [WEATHER], "thinking": ON})) as stream:
        for event in stream:
            if event.type == "input_json":
                fragments.append(event.partial_json)
        reply = stream.get_final_message()
    assert json.loads("".join(fragments)) == {"city": "Paris"}
    thought, call = reply.content
    assert isinstance(thought, ThinkingBlock)
    assert isinstance(call, ToolUseBlock)
    assert call.id.startswith("toolu_")
    assert thought.thinking == "I need the weather in Paris."
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "18 degrees, sunny"}]}
    history = [question, reply.to_param(), {"role": "user", "content": [result]}]
    for answer in (
        whole(client, history, tools=[WEATHER], thinking=ON),  # type: ignore[arg-type]
        streamed(client, history, tools=[WEATHER], thinking=ON),  # type: ignore[arg-type]
    ):
        assert text_of(answer) == "The tool says: 18 degrees, sunny"
        assert answer.stop_reason == "end_turn"


def test_what_a_tool_could_not_do_is_told_as_an_error(client: Anthropic) -> None:
    call = {"type": "tool_use", "id": "toolu_anything at all", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "no such city", "is_error": True}
    history = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    assert text_of(whole(client, history, tools=[WEATHER])).startswith("The tool says: Err")
    result["is_error"] = False
    assert not text_of(whole(client, history, tools=[WEATHER])).startswith("The tool says: Err")


# ---- thinking


def test_thinking_that_comes_back_is_believed_by_its_signature(client: Anthropic) -> None:
    """In a loop of tools the template shows the model its own thoughts: what reaches the prompt is seen in its length."""
    question = {"role": "user", "content": "What is the weather in Paris?"}

    def second_turn(**thinking: Any) -> tuple[int, str]:
        history = [
            question,
            {"role": "assistant", "content": [{**thought.model_dump(), **thinking}, call.model_dump(exclude_none=True)]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees"}]},
        ]
        raw = client.messages.with_raw_response.create(**request(history, {"tools": [WEATHER], "thinking": ON}))
        return input_tokens(raw.parse()), raw.headers.get("x-ignored-fields", "")

    sealed_thought, _ = whole(client, [question], tools=[WEATHER], thinking=ON | {"display": "omitted"}).content
    thought, call = whole(client, [question], tools=[WEATHER], thinking=ON).content
    assert isinstance(thought, ThinkingBlock)
    assert isinstance(sealed_thought, ThinkingBlock)
    assert isinstance(call, ToolUseBlock)
    with_thought, named = second_turn()
    without, named_without = second_turn(thinking="I need nothing.")
    assert with_thought > without
    assert named == ""
    assert named_without == "messages.content.thinking"
    assert second_turn(thinking="", signature=sealed_thought.signature) == (with_thought, "")
    assert second_turn(signature="EqQBCkYIBBgCKkD") == (with_thought, "")
    assert second_turn(thinking="", signature=sealed_thought.signature[:-1]) == (without, "messages.content.thinking")


def test_a_budget_is_checked_and_a_model_without_thinking_says_so(client: Anthropic) -> None:
    reply = client.messages.with_raw_response.create(
        **request("Hello!", {"model": "llama", "thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1025})
    )
    assert reply.headers["x-ignored-fields"] == "thinking,thinking.budget_tokens"
    with pytest.raises(anthropic.BadRequestError, match=r"thinking\.budget_tokens.*max_tokens"):
        whole(client, "Hello!", thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=1024)


# ---- the beginning of a reply


def test_the_reply_goes_on_with_what_the_assistant_began(client: Anthropic) -> None:
    begun = [{"role": "user", "content": "Count from 1 to 20."}, {"role": "assistant", "content": "1 2 3 4"}]
    for reply in (whole(client, begun), streamed(client, begun)):
        assert "1 2 3 4" + text_of(reply) == numbers(20)
    begun[-1] = {"role": "assistant", "content": [{"type": "text", "text": "1 2 3 4 "}]}
    assert "1 2 3 4 " + text_of(whole(client, begun)) == numbers(20)
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        whole(client, begun, thinking=ON)


# ---- counting


@pytest.mark.parametrize(
    "prompt",
    [
        {"messages": [{"role": "user", "content": "Hello!"}]},
        {
            "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
            "tools": [WEATHER],
            "system": "Be kind.",
            "thinking": ON,
        },
        {
            "messages": [
                {"role": "user", "content": "What is the weather in Paris?"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Paris"}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "18 degrees"}]},
            ],
            "tools": [WEATHER],
        },
    ],
)
def test_the_count_is_what_the_same_message_uses_cached_or_not(client: Anthropic, prompt: dict[str, Any]) -> None:
    nonce = " ".join(str(secrets.randbelow(1000)) for _ in range(40))
    prompt = prompt | {"system": f"{prompt.get('system', '')} {nonce}"}
    counted = client.messages.count_tokens(model=MODEL, **prompt)
    assert counted.model_dump(exclude_none=True).keys() == {"input_tokens"}
    first, again = (client.messages.create(model=MODEL, max_tokens=1, **prompt) for _ in range(2))
    assert counted.input_tokens == input_tokens(first) == input_tokens(again)
    assert again.usage.cache_read_input_tokens is not None
    assert again.usage.cache_read_input_tokens >= 32
    assert again.usage.input_tokens == counted.input_tokens - again.usage.cache_read_input_tokens


def test_no_tokens_at_all_compute_the_prompt_for_who_comes_next(client: Anthropic) -> None:
    words = " ".join(str(secrets.randbelow(1000)) for _ in range(40))
    silent = whole(client, f"Remember {words}.", max_tokens=0)
    assert (silent.content, silent.stop_reason, silent.usage.output_tokens) == ([], "max_tokens", 0)
    then = whole(client, f"Remember {words}.", max_tokens=1)
    assert (then.usage.cache_read_input_tokens or 0) > (silent.usage.cache_read_input_tokens or 0)


def test_counting_loads_no_weights_and_counts_what_would_not_fit(tmp_path: Path) -> None:
    with serve_process(tmp_path) as server, server.anthropic() as client:
        long = [{"role": "user", "content": "apple " * 5000}]
        assert client.messages.count_tokens(model=MODEL, messages=long).input_tokens > 4096  # type: ignore[arg-type]
        with server.http() as http:
            (state,) = [m["state"] for m in http.get("/api/status").json()["models"] if m["id"] == MODEL]
        assert state == "cold"


# ---- errors


def test_the_sdk_sees_the_class_of_error_that_it_knows_and_words_that_name_the_field(server: Running) -> None:
    with server.anthropic(max_retries=2) as client:
        with pytest.raises(anthropic.NotFoundError, match="'nobody' does not exist here") as missing:
            whole(client, "Hello!", model="nobody")
        assert missing.value.body == {
            "type": "error",
            "error": {"type": "not_found_error", "message": missing.value.body["error"]["message"]},  # type: ignore[index]
            "request_id": missing.value.request_id,
        }
        assert missing.value.response.request.headers["x-stainless-retry-count"] == "0"
        picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(b"\x89PNG").decode()}}
        for wrong, named in [
            ({"extra_body": {"temperature": 1.5}}, "'temperature'"),
            ({"max_tokens": -1}, "'max_tokens'"),
            ({"stop_sequences": [""]}, r"'stop_sequences\[0\]'"),
            ({"tools": [WEATHER, WEATHER]}, "get_weather"),
            ({"tools": [WEATHER | {"name": "two words"}]}, r"'tools\[0\]\.name'"),
            ({"tool_choice": {"type": "any"}}, "'tool_choice'"),
            ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [WEATHER]}, r"'tool_choice\.name'"),
            ({"thinking": {"type": "enabled", "budget_tokens": 5}}, r"'thinking\.budget_tokens'"),
            ({"thinking": {"type": "enabled"}}, r"'thinking\.budget_tokens'"),
            ({"messages": []}, "'messages'"),
            ({"messages": [{"role": "robot", "content": "Hello"}]}, r"'messages\[0\]\.role'"),
            ({"messages": [{"role": "user", "content": 5}]}, r"'messages\[0\]\.content': expected a string or an array"),
            ({"messages": [{"role": "user", "content": ["Hello"]}]}, r"'messages\[0\]\.content\[0\]'"),
            ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"'messages\[0\]\.content\[0\]\.text'"),
            ({"messages": [{"role": "user", "content": [picture]}]}, "text only"),
            ({"extra_body": {"container": "c"}}, "'container'"),
            ({"extra_body": {"mcp_servers": [{"url": "https://a"}]}}, "'mcp_servers'"),
        ]:
            with pytest.raises(anthropic.BadRequestError) as refused:
                whole(client, "Hello!", **wrong)
            assert re.search(named, refused.value.body["error"]["message"])  # type: ignore[index]
            assert refused.value.type == "invalid_request_error"
            assert refused.value.response.headers["x-should-retry"] == "false"


def test_a_body_without_what_is_required_names_it(server: Running) -> None:
    full = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
    with server.http() as http:
        for name in full:
            for body in ({k: v for k, v in full.items() if k != name}, full | {name: None}):
                reply = http.post("/v1/messages", json=body)
                assert reply.status_code == 400
                assert reply.json()["error"] == {"type": "invalid_request_error", "message": f"Missing required parameter: '{name}'."}
        assert http.get("/v1/messages").status_code == 405
        assert http.post("/v1/messages", content=b"{").json()["type"] == "error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_look_for(client: Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(
            model=SMALL_WINDOW_MODEL, max_tokens=5, messages=[{"role": "user", "content": "apple " * SMALL_WINDOW}], stream=stream
        )
    found = re.search(r"'message': 'prompt is too long: (\d+) tokens > (\d+) maximum'", str(refused.value))
    assert found is not None
    assert int(found[1]) >= int(found[2]) == SMALL_WINDOW


# ---- Claude Code


RULES = " ".join(f"Rule {i}: keep file {(i * 7919) % 1000} and line {(i * 104729) % 1000} in mind." for i in range(48))
BASH = {
    "name": "Bash",
    "description": "Executes a given bash command.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"command": {"type": "string", "description": "The command to execute"}, "timeout": {"type": "number"}},
        "required": ["command"],
        "additionalProperties": False,
    },
}
EPHEMERAL = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def claude_code(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """A request as that client sends it: a header with a number used once, marks on the last message, a count of what is left."""
    *before, last = turns
    marked = last | {"content": [*last["content"][:-1], last["content"][-1] | EPHEMERAL]}
    count = f"<total_tokens>{secrets.randbelow(10**6)} tokens left</total_tokens>"
    return {
        "model": MODEL,
        "max_tokens": 100,
        "stream": True,
        "system": [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.37.fbe; cc_entrypoint=cli; cch={secrets.token_hex(3)};"},
            {"type": "text", "text": "You are Claude Code, Anthropic's official CLI for Claude.", **EPHEMERAL},
            {"type": "text", "text": RULES, **EPHEMERAL},
        ],
        "messages": [*before, marked, {"role": "system", "content": count}],
        "tools": [BASH, WEATHER | EPHEMERAL],
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "metadata": {"user_id": "user_0_account__session_0"},
        "temperature": 0,
    }


HEADERS = {
    "authorization": "Bearer none",
    "x-api-key": "none",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "user-agent": "claude-cli/2.1.37 (external, cli)",
    "x-app": "cli",
}


def events_of(body: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in body.split("\n") if line.startswith("data: ")]


def answered(events: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The blocks as the client puts them together, and the usage at the end."""
    blocks = list[dict[str, Any]]()
    parts = list[str]()
    for event in events:
        match event:
            case {"type": "content_block_start", "content_block": block}:
                blocks.append(dict(block))
                parts = []
            case {"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": signature}}:
                blocks[-1]["signature"] = signature
            case {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": piece}}:
                parts.append(piece)
            case {"type": "content_block_delta", "delta": delta}:
                (key,) = delta.keys() - {"type"}
                blocks[-1][key] += delta[key]
            case {"type": "content_block_stop"}:
                if parts:
                    blocks[-1]["input"] = json.loads("".join(parts))
            case _:
                pass
    assert events[-1] == {"type": "message_stop"}
    return blocks, events[-2]["usage"]


@pytest.mark.requirement("BATCH-02")
def test_a_coding_session_finds_its_prompt_again(server: Running) -> None:
    turns: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nDo what has been asked.\n</system-reminder>\n"},
                {"type": "text", "text": "What is the weather in Paris?"},
            ],
        }
    ]
    reuse = list[float]()
    with server.http() as http:
        for turn in range(4):
            body = claude_code(turns)
            reply = http.post("/v1/messages?beta=true", json=body, headers=HEADERS)
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-ignored-fields"].split(",") == ["context_management", "metadata"]
            blocks, usage = answered(events_of(reply.text))
            counted = http.post("/v1/messages/count_tokens?beta=true", json=body, headers=HEADERS).json()
            assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
            reuse.append(usage["cache_read_input_tokens"] / counted["input_tokens"])
            turns.append({"role": "assistant", "content": blocks})
            calls = [block for block in blocks if block["type"] == "tool_use"]
            results = [{"type": "tool_result", "tool_use_id": call["id"], "content": f"{turn} degrees"} for call in calls]
            turns.append({"role": "user", "content": results or [{"type": "text", "text": f"And what is 2 + {turn}?"}]})
    assert counted["input_tokens"] > 1000
    assert min(reuse[1:]) >= 0.95, reuse


@beta_tool
def get_weather(city: str) -> str:
    """Get the current weather

    Args:
        city: The city name
    """
    return "18 degrees, sunny"


def test_the_tool_runner_which_wants_a_thread_goes_on_without_one(client: Anthropic) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    for stream in (False, True):
        runner: Any = client.beta.messages.tool_runner(model="llama", max_tokens=200, messages=question, tools=[get_weather], stream=stream)
        last = [turn.get_final_message() if stream else turn for turn in runner][-1]
        assert last.content[0].text == "The tool says: 18 degrees, sunny"


def test_a_thread_is_refused_by_the_name_that_the_sdk_knows(client: Anthropic) -> None:
    thread = client.beta.messages.thread(model=MODEL, max_tokens=20)
    with pytest.raises(anthropic.BadRequestError, match="send the whole conversation") as refusal:
        thread.send({"role": "user", "content": "Hello!"})
    assert type(refusal.value).__name__ == "ThreadUnsupportedRequestError"
    assert refusal.value.response.headers["x-should-retry"] == "false"
