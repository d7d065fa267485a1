"""What an Anthropic client sends → what it wants: history as it was, nothing that changes with every request, and nothing but
`InvalidField` of nonsense."""

import base64
import json
from contextlib import suppress
from typing import Any, get_type_hints

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Image, Message, RemoteImage, ToolCall
from mlx_manager.core.requests import Conversation, JsonSchema, Reasoning, ToolChoice, ToolSpec
from mlx_manager.protocols.anthropic import schema
from mlx_manager.protocols.anthropic.requests import (
    AnthropicWanted,
    is_token_count,
    read_count_tokens,
    read_messages,
    without_billing_header,
)
from mlx_manager.protocols.anthropic.schema import COUNT_FIELDS, MESSAGE_FIELDS
from mlx_manager.protocols.fields import Rule
from mlx_manager.protocols.seal import Seal

SEAL, OTHER = Seal(lambda: bytes(32)), Seal(lambda: bytes([1]) * 32)
USER = {"role": "user", "content": "Hello"}
BASE: dict[str, Any] = {"model": "m", "max_tokens": 5000, "messages": [USER]}
PNG = base64.b64encode(b"\x89PNG").decode()
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def read(**fields: Any) -> AnthropicWanted:
    return read_messages(json.dumps(BASE | fields).encode(), SEAL)


def conversation(**fields: Any) -> Conversation:
    (prompt,) = read(**fields).request.prompts
    assert isinstance(prompt, Conversation)
    return prompt


def said(*messages: dict[str, Any], **fields: Any) -> tuple[Message, ...]:
    return conversation(messages=list(messages), **fields).messages


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def refused(**fields: Any) -> InvalidField:
    with pytest.raises(InvalidField) as error:
        read(**fields)
    return error.value


# ---- the field tables


@pytest.mark.parametrize(("model", "rules"), [(schema.MessagesRequest, MESSAGE_FIELDS), (schema.CountRequest, COUNT_FIELDS)])
def test_what_is_read_is_honoured_and_what_is_honoured_is_read(model: type[schema.CountRequest], rules: dict[str, Rule]) -> None:
    assert model.model_fields.keys() == {name for name, rule in rules.items() if rule.kind == "honoured"}
    assert all(rule.note for rule in rules.values() if rule.kind != "honoured")


@pytest.mark.parametrize(
    ("params", "rules"),
    [
        (message_create_params.MessageCreateParamsStreaming, MESSAGE_FIELDS),
        (beta_create_params.MessageCreateParamsStreaming, MESSAGE_FIELDS),
        (message_count_tokens_params.MessageCountTokensParams, COUNT_FIELDS),
        (beta_count_tokens_params.MessageCountTokensParams, COUNT_FIELDS),
    ],
)
def test_every_field_that_the_sdk_documents_has_a_rule(params: object, rules: dict[str, Rule]) -> None:
    assert get_type_hints(params).keys() - rules.keys() == set()


# ---- values


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed"])
def test_zero_is_an_answer_and_null_is_none(name: str) -> None:
    assert getattr(read(**{name: 0}).request.sampling, name) == 0
    assert getattr(read(**{name: None}).request.sampling, name) is None
    assert getattr(read().request.sampling, name) is None


def test_empty_values_are_answers_too() -> None:
    assert read(max_tokens=0).request.max_tokens == 0
    assert read(stop_sequences=[]).request.stop == ()
    assert conversation(tools=[]).tools == ()
    assert said(user()) == said(user(text(""))) == (Message("user", ""),)
    assert said(USER, system="") == (Message("system", ""), Message("user", "Hello"))
    assert said(USER, system=[]) == (Message("user", "Hello"),)
    assert conversation().reasoning == Reasoning()
    assert read(mcp_servers=[]).ignored == ()
    assert read(stream=False).stream is False


def test_what_is_asked_of_reasoning_is_read() -> None:
    def reasoning(**fields: Any) -> Reasoning:
        return conversation(**fields).reasoning

    assert reasoning(thinking={"type": "enabled", "budget_tokens": 1024}) == Reasoning(enabled=True, budget=1024)
    assert reasoning(thinking={"type": "disabled"}) == Reasoning(enabled=False)
    assert reasoning(thinking={"type": "adaptive"}) == reasoning(thinking={"type": "between_tools"}) == Reasoning(enabled=True)
    assert reasoning(output_config={"effort": "max"}) == Reasoning(effort="max")
    assert read(thinking={"type": "adaptive", "display": "omitted"}).omits_thinking
    assert not read(thinking={"type": "adaptive", "display": "summarized"}).omits_thinking
    named = read(thinking={"type": "adaptive"}, output_config={"effort": "low"})
    assert named.without_effect(("enabled", "effort")) == ("thinking", "output_config.effort")


def test_the_form_of_the_answer_is_a_strict_schema() -> None:
    form = {"type": "object", "properties": {"b": {}, "a": {}}}
    request = read(output_config={"format": {"type": "json_schema", "schema": form}}).request
    assert isinstance(request.output, JsonSchema)
    assert (dict(request.output.schema), request.output.strict) == (form, True)  # type: ignore[call-overload]
    assert request.output_field == "output_config.format.schema"


def test_tools_are_read_and_those_of_others_are_named() -> None:
    tools = [
        {"name": "f", "description": "Does.", "input_schema": {"type": "object"}, "strict": True, **MARK},
        {"type": "custom", "name": "g", "input_examples": [{"b": 1, "a": "é"}], "eager_input_streaming": True, "defer_loading": True},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
    ]
    wanted = read(tools=tools)
    (prompt,) = wanted.request.prompts
    assert isinstance(prompt, Conversation)
    assert prompt.tools == (
        ToolSpec("f", "Does.", {"type": "object"}, strict=True),
        ToolSpec("g", 'Examples of input:\n{"b": 1, "a": "é"}'),
    )
    assert wanted.ignored == ("tools.defer_loading", "tools.bash_20250124", "tools.web_search_20250305")
    assert conversation(tools=tools, tool_choice={"type": "tool", "name": "f"}).tool_choice == ToolChoice("required", ("f",))
    assert conversation(tools=tools, tool_choice={"type": "any"}).tool_choice == ToolChoice("required")
    assert conversation(tools=tools, tool_choice={"type": "none"}).tool_choice == ToolChoice("none")
    assert conversation(tools=tools, tool_choice={"type": "auto"}).tool_choice == ToolChoice()
    assert read(tools=tools).request.parallel_tool_calls
    assert not read(tools=tools, tool_choice={"type": "auto", "disable_parallel_tool_use": True}).request.parallel_tool_calls
    assert "bash_20250124" in refused(tools=tools, tool_choice={"type": "tool", "name": "bash"}).message


# ---- history


def test_a_turn_of_tools_becomes_a_call_and_its_results_in_order() -> None:
    messages = said(
        USER,
        assistant(
            text("Let me see."),
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"b": 1.0, "a": "é"}, "caller": {"type": "direct"}},
            {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
        ),
        user(
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "18 degrees", **MARK},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": [text("a"), PICTURE, text("b")], "is_error": True},
            text("Go on."),
        ),
        user(text("Please.")),
    )
    assert messages == (
        Message("user", "Hello"),
        Message("assistant", "Let me see.", tool_calls=(ToolCall("toolu_1", "f", '{"b":1.0,"a":"é"}'), ToolCall("toolu_2", "g", "{}"))),
        Message("tool", "18 degrees", tool_call_id="toolu_1"),
        Message("tool", ("Error: a", Image(b"\x89PNG"), "b"), tool_call_id="toolu_2"),
        Message("user", "Go on.\n\nPlease."),
    )


def test_a_result_of_nothing_is_empty_and_text_before_results_stays_before_them() -> None:
    assert said(user(text("See:"), {"type": "tool_result", "tool_use_id": "t"}))[:2] == (
        Message("user", "See:"),
        Message("tool", "", tool_call_id="t"),
    )
    assert len(said(user({"type": "tool_result", "tool_use_id": "t", "content": "", "is_error": False}, text("")))) == 1


def test_neighbours_of_one_role_are_one_turn() -> None:
    assert said(USER, USER, {"role": "system", "content": "Be kind."}, {"role": "system", "content": "Be short."}, USER) == (
        Message("user", "Hello\n\nHello"),
        Message("system", "Be kind.\n\nBe short."),
        Message("user", "Hello"),
    )
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    assert said(USER, assistant(thought, text("The ans")), assistant(text("wer."), call), USER)[1] == Message(
        "assistant", "The answer.", reasoning="Hm.", tool_calls=(ToolCall("t", "f", "{}"),)
    )


def test_pictures_and_documents_stand_where_they_were() -> None:
    text_file = {
        "type": "document",
        "title": "a.txt",
        "context": "old",
        "source": {"type": "text", "media_type": "text/plain", "data": "é"},
    }
    coded = {"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": base64.b64encode("é".encode()).decode()}}
    mixed = {"type": "document", "source": {"type": "content", "content": [text("one"), PICTURE]}}
    plain = {"type": "document", "source": {"type": "content", "content": "two"}}
    found = {"type": "search_result", "title": "T", "source": "https://a", "content": [text("x")], "citations": {"enabled": True}}
    (message,) = said(user(PICTURE, text_file, coded, mixed, plain, found, text("Why?")))
    picture = Image(b"\x89PNG")
    assert message.content == (picture, "a.txt\nold\né\n\né\n\none", picture, "\n\ntwo\n\nT\nhttps://a\nx\n\nWhy?")
    assert isinstance(message.content[0], Image)
    assert message.content[0].where == "messages[0].content[0].source"


@pytest.mark.parametrize(
    ("block", "param"),
    [
        ({"type": "image", "source": {"type": "url"}}, "source.url"),
        ({"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}, "source.url"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "source.type"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": PNG}}, "source"),
        ({"type": "image", "source": {"type": "base64", "data": PNG}}, "source.media_type"),
        ({"type": "document", "source": {"type": "url", "url": "https://a"}}, "source.type"),
        ({"type": "document", "source": {"type": "file", "file_id": "f"}}, "source.type"),
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi3/"}}, "source.data"),
        ({"type": "document", "source": {"type": "text"}}, "source.data"),
        ({"type": "tool_use", "id": "t", "name": "f", "input": {}}, "type"),
        ({"type": "thinking", "thinking": "Hm.", "signature": ""}, "type"),
        ({"type": "text"}, "text"),
        ({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": 5}]}, "content[0].text"),
        ({"text": "a"}, "type"),
    ],
)
def test_a_block_that_cannot_be_read_is_refused_by_its_field(block: dict[str, Any], param: str) -> None:
    error = refused(messages=[user(text("a"), block)])
    assert error.param == f"messages[0].content[1].{param}"
    assert error.param in error.message


def test_a_request_has_so_many_pictures_and_no_more() -> None:
    assert len(said(user(*[PICTURE] * 32))[0].media) == 32
    with pytest.raises(InvalidField, match="a request has 32 pictures at most") as refused:
        said(user(*[PICTURE] * 16), {"role": "assistant", "content": "Hm."}, user(*[PICTURE] * 17))
    assert refused.value.param == "messages[2].content[16].source"


def test_a_picture_that_is_elsewhere_is_left_to_who_may_fetch_it() -> None:
    block = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [block]}
    tool, message = said(user(result, block))
    assert message.content == tool.content == (RemoteImage("https://example.com/a.png"),)
    assert message.media[0].where == "messages[0].content[1].source.url"
    assert tool.media[0].where == "messages[0].content[0].content[0].source.url"


@pytest.mark.parametrize("block", [PICTURE, {"type": "tool_result", "tool_use_id": "t"}])
def test_an_assistant_has_no_pictures_and_no_results(block: dict[str, Any]) -> None:
    assert refused(messages=[USER, assistant(block), USER]).param == "messages[1].content[0].type"
    assert refused(messages=[USER, {"role": "system", "content": [block]}]).param == "messages[1].content[0].type"


def test_what_nobody_here_knows_is_named_and_never_refused() -> None:
    wanted = read(
        system=[text("Be kind."), {"type": "tool_addition", "tool": {}}],
        messages=[
            user(text("a", mood="good", citations=None), {"type": "hologram", "data": {"deep": [1]}}),
            assistant({"type": "redacted_thinking", "data": "x"}, text("b")),
            user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "browser_state"}]}),
        ],
    )
    assert wanted.ignored == (
        "messages.content.mood",
        "system.tool_addition",
        "messages.content.hologram",
        "messages.content.redacted_thinking",
        "messages.content.browser_state",
    )
    (prompt,) = wanted.request.prompts
    assert isinstance(prompt, Conversation)
    assert [m.content for m in prompt.messages] == ["Be kind.", "a", "b", ""]


def test_what_anthropics_servers_did_is_told_in_short() -> None:
    found = {"type": "web_search_result", "url": "https://a", "title": "A", "encrypted_content": "SECRET", "page_age": None}
    ran = {"type": "code_execution_result", "stdout": "4\n", "stderr": "", "return_code": 0, "content": []}
    (_, message, _) = said(
        USER,
        assistant(
            text("I search."),
            {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "apple"}},
            {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [found] * 500},
            {"type": "code_execution_tool_result", "tool_use_id": "srvtoolu_2", "content": ran},
        ),
        user(text("?"), {"type": "container_upload", "file_id": "file_1"}),
    )
    assert message.text.startswith(
        'I search.[server_tool_use: web_search {"query": "apple"}]\n[web_search_tool_result: https://a A https://a'
    )
    assert message.text.endswith("[code_execution_tool_result: 4\n ]\n")
    assert "SECRET" not in message.text
    assert len(message.text) < 3000


# ---- thinking comes back


def thought(**block: Any) -> tuple[str | None, tuple[str, ...]]:
    """What of a thinking block reaches the prompt, and what is named."""
    wanted = read(messages=[USER, assistant({"type": "thinking", **block}, text("So.")), USER])
    (prompt,) = wanted.request.prompts
    assert isinstance(prompt, Conversation)
    return prompt.messages[1].reasoning, wanted.ignored


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_our_signature_is_believed_if_it_holds_and_others_are_not_ours_to_judge(words: str) -> None:
    dropped = (None, ("messages.content.thinking",))
    assert thought(thinking=words, signature=SEAL.sign(words)) == (words, ())
    assert thought(thinking=words + "!", signature=SEAL.sign(words)) == dropped
    assert thought(thinking=words, signature=OTHER.sign(words)) == dropped
    assert thought(thinking="", signature=SEAL.seal(words)) == (words, ())
    assert thought(thinking="", signature=OTHER.seal(words)) == dropped
    assert thought(thinking=words, signature="EqQBCkYIBBgC") == (words, ())
    assert thought(thinking=words) == thought(thinking=words, signature=None) == thought(thinking=words, signature="") == (words, ())
    assert thought(thinking="", signature="EqQBCkYIBBgC") == dropped


# ---- the reply goes on


def test_an_assistants_last_message_is_continued_with_its_white_space() -> None:
    prompt = conversation(messages=[USER, {"role": "assistant", "content": "The answer is ( "}])
    assert prompt.continues
    assert prompt.messages[-1] == Message("assistant", "The answer is ( ")
    assert conversation(messages=[USER, assistant(text("a"))], thinking={"type": "disabled"}).continues
    assert not conversation().continues
    for nothing in ("", [], [text("")], [{"type": "redacted_thinking", "data": "x"}]):
        prompt = conversation(messages=[USER, {"role": "assistant", "content": nothing}], thinking={"type": "adaptive"})
        assert (prompt.continues, prompt.messages) == (False, (Message("user", "Hello"),))


def test_what_cannot_be_continued_is_refused() -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    for thinking in ({"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}):
        error = refused(messages=[USER, assistant(text("a")), {"role": "assistant", "content": ""}], thinking=thinking)
        assert error.param == "messages[2]"
        assert "thinking" in error.message
    assert "tool_result" in refused(messages=[USER, assistant(text("a"), call)]).message
    assert refused(messages=[USER, assistant({"type": "thinking", "thinking": "Hm."})]).param == "messages[1]"
    assert refused(messages=[{"role": "assistant", "content": ""}]).param == "messages"


# ---- what changes with every request does not reach the prompt


def test_a_billing_header_is_dropped_where_a_system_text_begins_and_nowhere_else() -> None:
    header = "x-anthropic-billing-header: cc_version=2.1.37.fbe; cc_entrypoint=cli; cch=a9fc8;"
    kind = Message("system", "Be kind.")
    assert said(USER, system=[text(header), text("Be kind.", **MARK)])[0] == kind
    assert said(USER, system=[text(f"{header}\nBe kind.")])[0] == kind
    assert said(USER, system=f"{header}\nBe kind.")[0] == kind
    assert said(USER, system=header) == said(USER) == (Message("user", "Hello"),)
    assert said(USER, {"role": "system", "content": [text(header)]}) == said(USER)
    for kept in (f" {header}", f"Be kind.\n{header}", f'Do not write "{header}"'):
        assert said(USER, system=kept)[0].content == without_billing_header(kept) == kept
    assert said({"role": "user", "content": header}, assistant(text(header)), USER)[:2] == (
        Message("user", header),
        Message("assistant", header),
    )


def test_the_count_of_tokens_left_is_dropped_as_a_system_message_of_its_own_only() -> None:
    count = "<total_tokens>15432 tokens left</total_tokens>"
    assert said(USER, {"role": "system", "content": count}, USER) == (Message("user", "Hello\n\nHello"),)
    assert said(USER, {"role": "system", "content": [text(count)]}, system=[text("Be kind."), text(count)]) == said(USER, system="Be kind.")
    for kept in (f"{count} Hurry!", "<total_tokens>many tokens left</total_tokens>", ""):
        assert not is_token_count(kept)
        assert said(USER, {"role": "system", "content": kept})[1] == Message("system", kept)
    assert said({"role": "user", "content": count}) == (Message("user", count),)


def marked(value: Any) -> Any:
    """The same with a cache mark on everything that may have one."""
    match value:
        case dict():
            inner = {k: v if k in ("input_schema", "input") else marked(v) for k, v in value.items()}
            return inner | MARK if {"type", "name"} & value.keys() and "source" not in inner.get("type", "") else inner
        case list():
            return [marked(v) for v in value]
        case _:
            return value


def test_a_cache_mark_changes_nothing_wherever_it_stands_and_is_not_named() -> None:
    plain: dict[str, Any] = {
        "system": [text("Be kind.")],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "messages": [
            user(text("a")),
            assistant(text("b"), {"type": "tool_use", "id": "t", "name": "f", "input": {}}),
            user({"type": "tool_result", "tool_use_id": "t", "content": [text("c")]}),
        ],
    }
    with_marks = marked(plain)
    assert json.dumps(with_marks).count("cache_control") == 7
    assert read(**with_marks, **MARK) == read(**plain)


# ---- counting


def test_the_prompt_that_is_counted_is_the_one_that_is_answered() -> None:
    body: dict[str, Any] = {
        "system": "Be kind.",
        "messages": [USER],
        "tools": [{"name": "f"}],
        "tool_choice": {"type": "none"},
        "thinking": {"type": "disabled"},
    }
    counted = read_count_tokens(json.dumps({"model": "m", **body}).encode(), SEAL)
    assert counted.request.prompts == read(**body).request.prompts
    assert counted.ignored == ()
    again = read_count_tokens(json.dumps({"model": "m", **body, "max_tokens": 10, "stream": True}).encode(), SEAL)
    assert again.request == counted.request
    assert again.ignored == ("max_tokens", "stream")


# ---- nonsense

numbers = st.integers() | st.floats(allow_nan=True) | st.sampled_from([0, 1, -1, 2**63, 10**400, 1e308])
WORDS = ["user", "assistant", "system", "text", "image", "document", "tool_use", "tool_result", "thinking", "base64", "content", "enabled"]
leaves = st.none() | st.booleans() | numbers | st.text() | st.sampled_from(WORDS)
INNER = ("role", "content", "type", "text", "source", "data", "media_type", "name", "id", "input", "tool_use_id", "thinking", "signature")
KEYS = sorted({*MESSAGE_FIELDS, *INNER, "display", "budget_tokens", "format", "schema", "effort"})
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), v, max_size=4), max_leaves=12
)
blocks = st.fixed_dictionaries({"type": st.sampled_from(WORDS)}, optional=dict.fromkeys(INNER[3:], values))
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(WORDS[:3]), "content": st.text() | st.lists(blocks | values, max_size=3)}), max_size=3
)
changes = st.dictionaries(st.sampled_from(KEYS) | st.text(), values, max_size=3) | st.fixed_dictionaries({"messages": messages})


@given(changes)
def test_any_object_is_read_or_refused_as_an_invalid_field(wrong: dict[str, Any]) -> None:
    raw = json.dumps(BASE | wrong).encode()
    for read_one in (read_messages, read_count_tokens):
        with suppress(InvalidField):
            read_one(raw, SEAL)
