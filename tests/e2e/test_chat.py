"""Chat completions through the official SDK, which here refuses every reply that its types do not allow."""

import json
import math
import secrets
from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tests.e2e.replies import Json, collected, said
from tests.e2e.serving import MODEL
from tests.fixtures.prompts import PROMPTS, WEATHER

FOREVER = "Say apple forever."


def whole(client: OpenAI, text: str = FOREVER, **options: Any) -> ChatCompletion:
    return client.chat.completions.create(**_request(text, options))


def streamed(client: OpenAI, text: str = FOREVER, **options: Any) -> Json:
    request = _request(text, options)
    return collected(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))


def _request(text: str, options: dict[str, Any]) -> dict[str, Any]:
    """Greedy, short and without reasoning, unless the options say otherwise (None: nothing at all). What the SDK does not know
    goes into the body."""
    ours = ("enable_thinking", "top_k", "min_p", "repetition_penalty", "chat_template_kwargs")
    extra = {"enable_thinking": False} | {k: options[k] for k in ours if k in options}
    known = {"temperature": 0, "max_tokens": 24} | {k: v for k, v in options.items() if k not in ours}
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "extra_body": _given(extra), **_given(known)}


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}


def content(reply: ChatCompletion) -> str:
    text = reply.choices[0].message.content
    assert text is not None
    return text


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (FOREVER, {}),
        (FOREVER, {"max_tokens": 1}),
        (FOREVER, {"max_completion_tokens": 7, "max_tokens": None}),
        (FOREVER, {"enable_thinking": None, "max_tokens": 60}),
        (FOREVER, {"n": 2, "temperature": 1.5, "seed": 3}),
        (FOREVER, {"logprobs": True, "top_logprobs": 3}),
        (FOREVER, {"logprobs": True, "n": 2, "seed": 1, "temperature": 1}),
        ("Hello", {"max_tokens": 100}),
        ("Hello", {"enable_thinking": None, "max_tokens": 100}),
        ("Count from 1 to 20.", {"stop": "7", "max_tokens": 100}),
        ("What is the weather in Paris?", {"tools": [WEATHER], "max_tokens": 100}),
        ("What is the weather in Paris?", {"tools": [WEATHER], "max_tokens": 100, "enable_thinking": None}),
        ("What is the weather in Paris and London?", {"tools": [WEATHER], "max_tokens": 150, "n": 2}),
    ],
)
def test_a_stream_collects_to_the_whole_reply(client: OpenAI, text: str, options: dict[str, Any]) -> None:
    assert streamed(client, text, **options) == said(whole(client, text, **options))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("limit", [1, 2, 7])
def test_a_limit_ends_the_reply_at_exactly_that_many_tokens(client: OpenAI, name: str, limit: int) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": FOREVER}], **{name: limit})  # type: ignore[call-overload]
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == limit


def test_usage_counts_every_token_once(client: OpenAI) -> None:
    one = said(whole(client, max_tokens=5))["usage"]
    two = said(whole(client, max_tokens=5, n=2))["usage"]
    assert one["total_tokens"] == one["prompt_tokens"] + one["completion_tokens"]
    assert one["completion_tokens"] == 5
    assert one["completion_tokens_details"]["reasoning_tokens"] == 0
    assert (two["prompt_tokens"], two["completion_tokens"]) == (one["prompt_tokens"], 10)


def test_a_stream_says_nothing_of_usage_unless_it_is_asked(client: OpenAI) -> None:
    request = _request(FOREVER, {"max_tokens": 3})
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert all(len(c.choices) == 1 and "usage" not in c.model_fields_set for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_zero_temperature_takes_the_likeliest_token_each_time(client: OpenAI) -> None:
    reply = whole(client, logprobs=True, top_logprobs=1)
    assert reply.choices[0].logprobs is not None
    tokens = reply.choices[0].logprobs.content
    assert tokens
    assert all(t.logprob == t.top_logprobs[0].logprob and t.token == t.top_logprobs[0].token for t in tokens)


@pytest.mark.parametrize("only_the_likeliest", [{"top_k": 1}, {"min_p": 1}, {"top_p": 0}, {"top_p": 1e-6}])
def test_a_filter_that_leaves_one_token_is_greedy_at_any_temperature(client: OpenAI, only_the_likeliest: dict[str, Any]) -> None:
    greedy = content(whole(client))
    assert content(whole(client, temperature=2, seed=1, **only_the_likeliest)) == greedy


def test_a_seed_draws_the_same_reply_again_and_another_seed_another(client: OpenAI) -> None:
    replies = [content(whole(client, temperature=2, seed=seed)) for seed in (0, 1, 2, 3)]
    assert [content(whole(client, temperature=2, seed=seed)) for seed in (0, 1, 2, 3)] == replies
    assert len(set(replies)) > 1


def test_replies_of_one_request_differ_and_the_first_is_that_of_a_single_one(client: OpenAI) -> None:
    several = whole(client, temperature=2, seed=5, n=4)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert len({c.message.content for c in several.choices}) > 1
    assert several.choices[0].message == whole(client, temperature=2, seed=5).choices[0].message


@pytest.mark.parametrize("temperature", [0, 1])
def test_log_probabilities_belong_to_the_tokens_of_the_text(client: OpenAI, temperature: float) -> None:
    reply = whole(client, logprobs=True, top_logprobs=20, temperature=temperature, seed=2)
    assert reply.choices[0].logprobs is not None
    tokens = reply.choices[0].logprobs.content
    assert tokens
    if temperature == 0:  # otherwise the text may hold bytes that are no character
        assert "".join(t.token for t in tokens) == content(reply)
    for token in tokens:
        assert token.logprob <= 0
        assert token.bytes == list(token.token.encode()) or "\ufffd" in token.token
        assert len(token.top_logprobs) == 20
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)
        assert sum(math.exp(t.logprob) for t in token.top_logprobs) < 1.001


def test_a_stop_string_is_found_across_tokens_and_never_shown(client: OpenAI) -> None:
    reply = whole(client, logprobs=True, max_tokens=12)
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.content
    tokens = [t.token for t in reply.choices[0].logprobs.content]
    text = content(reply)
    straddling = {tokens[i][-2:] + tokens[i + 1][:2] for i in range(len(tokens) - 1)} | {"".join(tokens[1:4]), "".join(tokens[:3])[1:]}
    for stop in straddling:
        for given in (stop, ["not in there", stop, "\x00"]):
            stopped = whole(client, stop=given, max_tokens=12)
            assert content(stopped) == text[: text.index(stop)]
            assert stopped.choices[0].finish_reason == "stop"
        assert streamed(client, stop=stop, max_tokens=12) == said(whole(client, stop=stop, max_tokens=12))


def test_what_only_begins_like_a_stop_string_is_shown_in_full(client: OpenAI) -> None:
    text = content(whole(client, max_tokens=12))
    for i in range(1, len(text)):
        assert content(whole(client, max_tokens=12, stop=text[i:] + "\x00")) == text


def test_reasoning_stands_apart_from_the_content(client: OpenAI) -> None:
    thinking = whole(client, "Hello", enable_thinking=True, max_tokens=100)
    for off in ({"enable_thinking": False}, {"enable_thinking": None, "reasoning_effort": "none"}):
        assert said(whole(client, "Hello", max_tokens=100, **off))["choices"][0]["message"]["reasoning_content"] is None
    message = said(thinking)["choices"][0]["message"]
    assert message["reasoning_content"]
    assert "think>" not in message["reasoning_content"]
    assert 0 < said(thinking)["usage"]["completion_tokens_details"]["reasoning_tokens"] < said(thinking)["usage"]["completion_tokens"]


def test_a_tool_call_comes_back_and_its_result_is_understood(client: OpenAI) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    reply = client.chat.completions.create(model=MODEL, messages=[question], tools=[WEATHER], temperature=0, max_tokens=150)  # type: ignore[list-item]
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"}
    history = [question, choice.message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER], temperature=0, max_tokens=150)  # type: ignore[list-item]
    assert "18 degrees, sunny" in content(answer)
    assert answer.choices[0].finish_reason == "stop"


def test_two_calls_come_in_one_reply_unless_only_one_is_wanted(client: OpenAI) -> None:
    question = "What is the weather in Paris and London?"
    both = said(whole(client, question, tools=[WEATHER], max_tokens=200))["choices"][0]
    one = said(whole(client, question, tools=[WEATHER], max_tokens=200, parallel_tool_calls=False))["choices"][0]
    assert [json.loads(c["arguments"]) for c in both["message"]["tool_calls"]] == [{"city": "Paris"}, {"city": "London"}]
    assert one["message"]["tool_calls"] == both["message"]["tool_calls"][:1]
    assert one["finish_reason"] == both["finish_reason"] == "tool_calls"


def _as_sent(message: Json) -> Json:
    """The prompts have the arguments of calls as templates want them; on the wire they are text."""
    if "tool_calls" not in message:
        return message
    calls = [c | {"function": c["function"] | {"arguments": json.dumps(c["function"]["arguments"])}} for c in message["tool_calls"]]
    return message | {"tool_calls": calls}


@pytest.mark.parametrize("name", [name for name, prompt in PROMPTS[MODEL].items() if prompt.ends])
def test_known_questions_have_known_answers(client: OpenAI, name: str) -> None:
    prompt = PROMPTS[MODEL][name]
    messages = [_as_sent(message) for message in prompt.messages]
    request: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 400}
    request["extra_body"] = {"chat_template_kwargs": prompt.template_kwargs}
    if prompt.tools is not None:
        request["tools"] = prompt.tools
    reply = said(client.chat.completions.create(**request))
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == prompt.content
    assert [(c["name"], json.loads(c["arguments"])) for c in choice["message"]["tool_calls"]] == prompt.calls
    assert choice["message"]["reasoning_content"] == (prompt.reasoning if name.startswith("thinking_") else None)
    assert choice["finish_reason"] == ("tool_calls" if prompt.calls else "stop")
    assert collected(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})) == reply


@pytest.mark.requirement("BATCH-02")
def test_a_prompt_that_was_computed_before_is_not_computed_again_and_the_usage_says_so(client: OpenAI) -> None:
    words = " ".join(f"{secrets.randbelow(1000)}" for _ in range(60))
    first, again = (whole(client, f"Remember {words}. What is {n} + 1?", max_tokens=3).usage for n in (3, 4))
    assert first is not None
    assert again is not None
    assert first.prompt_tokens_details is not None
    assert again.prompt_tokens_details is not None
    before, after = first.prompt_tokens_details.cached_tokens, again.prompt_tokens_details.cached_tokens
    assert before is not None
    assert after is not None
    assert before <= 32, "the words are new"
    assert first.prompt_tokens - 96 < after < again.prompt_tokens


def test_every_word_of_the_reply_is_in_its_envelope(client: OpenAI) -> None:
    reply = whole(client, max_tokens=1)
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model, reply.service_tier) == ("chat.completion", MODEL, "default")
    assert reply.system_fingerprint
    raw = reply.choices[0].message.model_fields_set
    assert {"content", "refusal", "role", "annotations"} <= raw


def test_a_reply_goes_back_as_it_came_with_nothing_to_ignore(client: OpenAI) -> None:
    reply = client.chat.completions.create(**_request("What is the weather in Paris?", {"tools": [WEATHER], "max_tokens": 150}))
    message = reply.choices[0].message.model_dump()
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "18 degrees, sunny"}
    for annotations, ignored in (([], None), ([{"type": "url_citation"}], "messages.annotations")):
        assert message["annotations"] == []
        history: Any = [{"role": "user", "content": "What is the weather in Paris?"}, message | {"annotations": annotations}, result]
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=history, max_tokens=20)
        assert raw.headers.get("x-ignored-fields") == ignored
