"""Every mistake of a client: the status, the envelope, and words that say which field it is."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from tests.e2e.serving import MODEL, SMALL_WINDOW, SMALL_WINDOW_MODEL, Running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hello"}
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [USER], "max_tokens": 1},
    COMPLETIONS: {"model": MODEL, "prompt": "Hello", "max_tokens": 1},
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.http() as http:
        yield http


def tool(name: Any, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def check(response: httpx2.Response, status: int, code: str | None, param: str | None) -> str:
    """The message, of an error that is all it must be."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == response.headers["request-id"]
    assert response.headers["x-request-id"].startswith("req_")
    if status < 500:
        assert response.headers["x-should-retry"] == "false"
    body = response.json()
    assert "detail" not in body
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    message: str = error["message"]
    for ours in (
        "Traceback",
        "pydantic",
        "/work",
        "/home",
        "/root",
        "site-packages",
        ".py",
        "InvalidField",
        "Input should be",
        "str]",
        "function-",
    ):
        assert ours not in response.text
    return message


MALFORMED = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b"\xff\xfe",
    b'{"model": NaN}',
    b'{"model": -Infinity}',
    b'{"temperature": 1e400}',
    b'{"model": "\\ud800"}',
    b'{"\\udc00": 1}',
    b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}",
    b'{"a": ' + b"[" * 100_000,
    b'{"a": ' + b'{"a":' * 64 + b"1" + b"}" * 65,
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"model": "m",}',
    b"{'model': 'm'}",
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda b: b[:24].decode("latin-1"))
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_body_that_is_not_a_json_object_is_refused(http: httpx2.Client, path: str, body: bytes) -> None:
    message = check(http.post(path, content=body, headers={"content-type": "application/json"}), 400, "invalid_json", None)
    assert message.startswith("The request body could not be read: ")


def test_a_body_of_the_greatest_depth_is_read(http: httpx2.Client) -> None:
    assert http.post(CHAT, json=BASE[CHAT] | {"deep": json.loads("[" * 63 + "]" * 63)}).status_code == 200
    assert http.post(CHAT, json=BASE[CHAT] | {"deep": json.loads("[" * 64 + "]" * 64)}).status_code == 400


WRONG: list[tuple[dict[str, Any], str, str]] = [
    # what is sent, the code, the parameter
    ({"model": None}, "missing_required_parameter", "model"),
    ({"model": 5}, "invalid_type", "model"),
    ({"model": ""}, "string_below_min_length", "model"),
    ({"model": "m" * 257}, "string_above_max_length", "model"),
    ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
    ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    ({"temperature": "hot"}, "invalid_type", "temperature"),
    ({"temperature": True}, "invalid_type", "temperature"),
    ({"temperature": 10**400}, "invalid_type", "temperature"),
    ({"top_p": 1.1}, "decimal_above_max_value", "top_p"),
    ({"top_k": -1}, "integer_below_min_value", "top_k"),
    ({"top_k": 1.5}, "invalid_type", "top_k"),
    ({"min_p": -1}, "decimal_below_min_value", "min_p"),
    ({"presence_penalty": 2.5}, "decimal_above_max_value", "presence_penalty"),
    ({"frequency_penalty": -3}, "decimal_below_min_value", "frequency_penalty"),
    ({"repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty"),
    ({"seed": 2**63}, "integer_above_max_value", "seed"),
    ({"seed": "1"}, "invalid_type", "seed"),
    ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    ({"max_tokens": 1.0}, "invalid_type", "max_tokens"),
    ({"max_tokens": True}, "invalid_type", "max_tokens"),
    ({"n": 0}, "integer_below_min_value", "n"),
    ({"n": 9}, "integer_above_max_value", "n"),
    ({"stop": ""}, "string_below_min_length", "stop"),
    ({"stop": [""]}, "string_below_min_length", "stop[0]"),
    ({"stop": ["a"] * 17}, "array_above_max_length", "stop"),
    ({"stop": "a" * 257}, "string_above_max_length", "stop"),
    ({"stop": ["a", "b" * 257]}, "string_above_max_length", "stop[1]"),
    ({"stop": 7}, "invalid_type", "stop"),
    ({"stop": ["a", 7]}, "invalid_type", "stop[1]"),
    ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
    ({"logit_bias": {"apple": 1}}, "invalid_value", "logit_bias.apple"),
    ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias.-1"),
    ({"logit_bias": {"1": 101}}, "decimal_above_max_value", "logit_bias.1"),
    ({"logit_bias": {"99999999": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "object_above_max_length", "logit_bias"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "invalid_type", "stream_options.include_usage"),
    ({"guided_regex": "("}, "invalid_value", "guided_regex"),
    ({"guided_json": {"not": {}}}, "invalid_value", "guided_json"),
]
WRONG_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "missing_required_parameter", "messages"),
    ({"messages": []}, "empty_array", "messages"),
    ({"messages": "Hello"}, "invalid_type", "messages"),
    ({"messages": [USER] * 4097}, "array_above_max_length", "messages"),
    ({"messages": [USER, None]}, "invalid_type", "messages[1]"),
    ({"messages": [{"content": "Hello"}]}, "missing_required_parameter", "messages[0].role"),
    ({"messages": [USER, {"role": "robot", "content": "Hello"}]}, "invalid_value", "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    ({"messages": [{"role": "system", "content": None}]}, "missing_required_parameter", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["Hello"]}]}, "invalid_type", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "invalid_value", "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "missing_required_parameter", "messages[0].content[0].text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, IMAGE]}]},
        "unsupported_value",
        "messages[0].content[1].image_url",
    ),
    ({"messages": [{"role": "tool", "content": "21"}]}, "missing_required_parameter", "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]}]},
        "invalid_type",
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_completion_tokens"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    ({"logprobs": 1}, "invalid_type", "logprobs"),
    ({"tools": [tool("two words")]}, "invalid_value", "tools[0].function.name"),
    ({"tools": [tool("f" * 129)]}, "invalid_value", "tools[0].function.name"),
    ({"tools": [tool("f"), tool("g"), tool("f")]}, "invalid_value", "tools[2].function.name"),
    ({"tools": [tool(None)]}, "invalid_type", "tools[0].function.name"),
    (
        {"tools": [tool("f", strict=True, parameters={"type": "object", "properties": {}})]},
        "invalid_value",
        "tools[0].function.parameters",
    ),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}], "stream": True}, "unsupported_value", "tools[0].type"),
    ({"tools": [tool(f"f{i}") for i in range(257)]}, "array_above_max_length", "tools"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [tool("f")]}, "invalid_value", "tool_choice.function.name"),
    ({"tool_choice": "maybe"}, "invalid_value", "tool_choice"),
    ({"tool_choice": 1}, "invalid_type", "tool_choice"),
    ({"response_format": {"type": "json"}}, "invalid_value", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
    ({"response_format": "text"}, "invalid_type", "response_format"),
    ({"reasoning_effort": "enormous"}, "invalid_value", "reasoning_effort"),
    ({"chat_template_kwargs": {"tools": []}}, "unsupported_parameter", "chat_template_kwargs.tools"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, "invalid_type", "chat_template_kwargs.enable_thinking"),
    ({"store": True}, "unsupported_value", "store"),
    ({"modalities": ["audio"]}, "unsupported_value", "modalities"),
]
WRONG_COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "missing_required_parameter", "prompt"),
    ({"prompt": 5}, "invalid_type", "prompt"),
    ({"prompt": {}}, "invalid_type", "prompt"),
    ({"prompt": []}, "empty_array", "prompt"),
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": ["a", 1]}, "invalid_type", "prompt[1]"),
    ({"prompt": [1, "a"]}, "invalid_type", "prompt[1]"),
    ({"prompt": [[1], []]}, "empty_array", "prompt[1]"),
    ({"prompt": [-1]}, "integer_below_min_value", "prompt[0]"),
    ({"prompt": ["a"] * 129}, "array_above_max_length", "prompt"),
    ({"logprobs": 6}, "integer_above_max_value", "logprobs"),
    ({"logprobs": True}, "invalid_type", "logprobs"),
    ({"echo": True, "logprobs": 1}, "unsupported_value", "echo"),
    ({"echo": True, "prompt": [1]}, "unsupported_value", "echo"),
    ({"best_of": 3}, "unsupported_value", "best_of"),
    ({"suffix": "end"}, "unsupported_parameter", "suffix"),
]
CASES = (
    [(path, *case) for path in (CHAT, COMPLETIONS) for case in WRONG]
    + [(CHAT, *case) for case in WRONG_CHAT]
    + [(COMPLETIONS, *case) for case in WRONG_COMPLETION]
)


@pytest.mark.parametrize(("path", "wrong", "code", "param"), CASES, ids=lambda v: json.dumps(v)[:48] if isinstance(v, dict) else "")
def test_a_wrong_field_is_named_with_what_is_wrong(http: httpx2.Client, path: str, wrong: dict[str, Any], code: str, param: str) -> None:
    message = check(http.post(path, json=BASE[path] | wrong), 400, code, param)
    assert param.rpartition(".")[2].split("[")[0] in message
    assert len(message) < 300


def test_the_words_say_what_would_be_right(http: httpx2.Client) -> None:
    def message(**wrong: Any) -> str:
        return http.post(CHAT, json=BASE[CHAT] | wrong).json()["error"]["message"]

    assert message(temperature=3) == "Invalid 'temperature': decimal above maximum value. Expected a value <= 2.0, but got 3 instead."
    assert message(n=0) == "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead."
    assert message(stop=7) == "Invalid type for 'stop': expected a string or an array, but got an integer instead."
    assert message(messages=None) == "Missing required parameter: 'messages'."
    told = message(messages=[{"role": "user", "content": [IMAGE]}])
    told = message(messages=[{"role": "user", "content": [IMAGE]}])
    assert told == "This model reads text only: it cannot take the image in 'messages[0].content[0].image_url'."
    assert "'developer', 'system', 'user', 'assistant', 'tool' or 'function'" in message(messages=[{"role": "robot", "content": ""}])


def test_a_token_that_the_model_does_not_have_is_refused(http: httpx2.Client) -> None:
    assert "Token ids" in check(http.post(COMPLETIONS, json=BASE[COMPLETIONS] | {"prompt": [99_999_999]}), 400, "invalid_value", "prompt")


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(http: httpx2.Client, path: str, param: str, stream: bool) -> None:
    long = "apple " * SMALL_WINDOW
    wrong = {"prompt": long} if path == COMPLETIONS else {"messages": [{"role": "user", "content": long}]}
    body = BASE[path] | wrong | {"stream": stream, "model": SMALL_WINDOW_MODEL}
    message = check(http.post(path, json=body), 400, "context_length_exceeded", param)
    num_tokens = int(message.split("resulted in ")[1].split()[0])
    assert num_tokens >= SMALL_WINDOW
    assert message == (
        f"This model's maximum context length is {SMALL_WINDOW} tokens. However, your messages resulted in {num_tokens} tokens. "
        "Please reduce the length of the messages."
    )


def test_the_last_prompt_that_fits_leaves_room_for_one_token(http: httpx2.Client) -> None:
    body = BASE[COMPLETIONS] | {"model": SMALL_WINDOW_MODEL, "max_tokens": 100}
    fits = http.post(COMPLETIONS, json=body | {"prompt": [300] * (SMALL_WINDOW - 1), "logit_bias": {"300": 100}})
    assert fits.json()["usage"]["completion_tokens"] == 1
    assert fits.json()["choices"][0]["finish_reason"] == "length"
    full = http.post(COMPLETIONS, json=body | {"prompt": [300] * SMALL_WINDOW})
    assert f"resulted in {SMALL_WINDOW} tokens" in check(full, 400, "context_length_exceeded", "prompt")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_not_found_and_the_reply_says_what_there_is(http: httpx2.Client, path: str) -> None:
    for stream in (False, True):
        message = check(http.post(path, json=BASE[path] | {"model": "gpt-4o", "stream": stream}), 404, "model_not_found", None)
        assert "'gpt-4o'" in message
        assert MODEL in message
    check(http.get("/v1/models/gpt-4o"), 404, "model_not_found", None)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", CHAT, "POST"), ("DELETE", COMPLETIONS, "POST"), ("POST", "/v1/models", "GET"), ("PUT", f"/v1/models/{MODEL}", "GET")],
)
def test_a_wrong_method_is_told_the_right_one(http: httpx2.Client, method: str, path: str, allowed: str) -> None:
    response = http.request(method, path)
    assert response.headers["allow"] == allowed
    message = check(response, 405, None, None)
    assert method in message
    assert allowed in message


def test_an_address_with_the_version_twice_is_told_so(http: httpx2.Client) -> None:
    assert "'/v1' too many" in check(http.post("/v1/v1/chat/completions", json=BASE[CHAT]), 404, None, None)
    assert "'/v1' too many" not in check(http.post("/v1/nothing", json={}), 404, None, None)


def test_no_slash_is_added_or_taken_away(http: httpx2.Client) -> None:
    check(http.post(f"{CHAT}/", json=BASE[CHAT]), 404, None, None)


def test_every_reply_has_an_id_of_its_own(http: httpx2.Client) -> None:
    replies = [
        http.get("/v1/models"),
        http.post(CHAT, json=BASE[CHAT]),
        http.post(CHAT, json={}),
        http.get("/nowhere"),
        http.get("/health"),
    ]
    assert len({r.headers["x-request-id"] for r in replies}) == len(replies)


def test_the_sdk_sees_the_class_of_error_that_it_knows(server: Running) -> None:
    with server.openai(max_retries=2) as client:
        for model, messages, kind in ((MODEL, [], openai.BadRequestError), ("nobody", [USER], openai.NotFoundError)):
            with pytest.raises(kind) as caught:
                client.chat.completions.create(model=model, messages=messages)  # type: ignore[arg-type]
            assert caught.value.request_id is not None
            assert caught.value.type == "invalid_request_error"
            assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_every_reference_in_our_description_points_somewhere(http: httpx2.Client) -> None:
    document = http.get("/openapi.json").json()

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    for reference in references(document):
        place: Any = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages"} <= set(body["required"])
