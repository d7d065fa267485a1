"""What an OpenAI client sends → what it wants: absent is not zero, and nothing but `InvalidField` comes of nonsense."""

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Document, Image, RemoteImage, ToolCall, Video
from mlx_manager.core.requests import (
    AnyJson,
    Conversation,
    GenerationRequest,
    Grammar,
    JsonSchema,
    OneOf,
    OutputFormat,
    RawPrompt,
    Reasoning,
    Regex,
    ToolChoice,
)
from mlx_manager.protocols.openai.requests import read_chat, read_completion
from mlx_manager.protocols.openai.schema import CHAT_FIELDS, COMPLETION_FIELDS

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello"}


def chat(**fields: Any) -> GenerationRequest:
    return read_chat(json.dumps(CHAT | fields).encode()).request


def conversation(**fields: Any) -> Conversation:
    (prompt,) = chat(**fields).prompts
    assert isinstance(prompt, Conversation)
    return prompt


SAMPLING = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed"]


@pytest.mark.parametrize("name", SAMPLING)
def test_zero_is_an_answer_and_null_is_none(name: str) -> None:
    for read, base in ((read_chat, CHAT), (read_completion, COMPLETION)):
        assert getattr(read(json.dumps(base | {name: 0}).encode()).request.sampling, name) == 0
        assert getattr(read(json.dumps(base | {name: None}).encode()).request.sampling, name) is None
        assert getattr(read(json.dumps(base).encode()).request.sampling, name) is None


def test_empty_values_are_answers_too() -> None:
    assert conversation(messages=[{"role": "user", "content": ""}]).messages[0].content == ""
    assert conversation(messages=[{"role": "user", "content": []}]).messages[0].content == ""
    assert chat(stop=[]).stop == ()
    assert conversation(tools=[]).tools == ()
    assert chat(logit_bias={}).sampling.logit_bias == {}
    assert chat(logprobs=False).num_top_logprobs is None
    assert chat(logprobs=True).num_top_logprobs == chat(logprobs=True, top_logprobs=0).num_top_logprobs == 0
    assert not chat(parallel_tool_calls=False).parallel_tool_calls
    assert conversation(enable_thinking=False).reasoning == Reasoning(enabled=False)
    assert conversation().reasoning == Reasoning()
    reasoned = {"role": "assistant", "content": None, "reasoning_content": "", "reasoning": "other"}
    assert conversation(messages=[reasoned]).messages[0].reasoning == ""
    assert read_completion(b'{"model": "m", "prompt": "", "logprobs": 0}').request.num_top_logprobs == 0


def test_an_empty_stop_list_and_either_name_of_the_limit_are_read() -> None:
    assert chat().max_tokens is None
    assert (
        chat(max_tokens=5).max_tokens
        == chat(max_completion_tokens=5).max_tokens
        == chat(max_tokens=5, max_completion_tokens=5).max_tokens
        == 5
    )
    assert chat(stop="a").stop == chat(stop=["a"]).stop == ("a",)


def test_history_keeps_its_order_and_its_calls_as_they_were_written() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1.0, "a": "é"}'}}
    messages = conversation(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "21"},
            {"role": "system", "content": "In between."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        ]
    ).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "tool", "system", "assistant"]
    assert [m.content for m in messages] == ["Be kind.", "one, two", "", "21", "In between.", "No."]
    assert messages[2].tool_calls == (ToolCall("call_1", "f", '{"b": 1.0, "a": "é"}'),)
    assert messages[3].tool_call_id == "call_1"


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
NAMED = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        (NAMED, ToolChoice("required", ("g",))),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}, ToolChoice("auto", ("g",))),
    ],
)
def test_every_choice_among_tools_is_read(given: Any, chosen: ToolChoice) -> None:
    assert conversation(tools=TOOLS, tool_choice=given).tool_choice == chosen


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice.function.name"),
        ({"tools": TOOLS[:1], "tool_choice": NAMED}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
    ],
)
def test_a_choice_among_tools_that_are_not_there_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidField) as refused:
        chat(**fields)
    assert refused.value.param == param


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "output", "where"),
    [
        ({"response_format": {"type": "text"}}, None, "response_format"),
        ({"response_format": {"type": "json_object"}}, AnyJson(), "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
            JsonSchema(SCHEMA, strict=True),
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            JsonSchema(SCHEMA, strict=False),
            "response_format.json_schema.schema",
        ),
        ({"guided_json": SCHEMA}, JsonSchema(SCHEMA), "guided_json"),
        ({"guided_json": '{"type": "object"}'}, JsonSchema(SCHEMA), "guided_json"),
        ({"structured_outputs": {"json": SCHEMA}}, JsonSchema(SCHEMA), "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a+"}}, Regex("a+"), "structured_outputs.regex"),
        ({"guided_choice": ["a", "b"]}, OneOf(("a", "b")), "guided_choice"),
        ({"guided_grammar": 'start: "a"'}, Grammar('start: "a"'), "guided_grammar"),
    ],
)
def test_every_form_that_an_answer_can_have_is_read(fields: dict[str, Any], output: OutputFormat | None, where: str) -> None:
    assert (chat(**fields).output, chat(**fields).output_field) == (output, where)


def test_two_forms_at_once_are_refused() -> None:
    with pytest.raises(InvalidField) as refused:
        chat(guided_regex="a", structured_outputs={"choice": ["a"]})
    assert refused.value.param in ("guided_regex", "structured_outputs.choice")


def test_what_is_said_of_reasoning_is_read_and_a_field_counts_before_a_template_option() -> None:
    options = {"enable_thinking": True, "reasoning_effort": "low", "thinking_budget": 7}
    assert conversation(chat_template_kwargs=options).reasoning == Reasoning(enabled=True, effort="low", budget=7)
    assert conversation(chat_template_kwargs=options, enable_thinking=False, thinking_budget=0).reasoning == Reasoning(False, "low", 0)
    for param, value in {"x": 1, "thinking_budget": "7", "reasoning_effort": "lots"}.items():
        with pytest.raises(InvalidField) as refused:
            chat(chat_template_kwargs={param: value})
        assert refused.value.param == f"chat_template_kwargs.{param}"


def test_pictures_stay_where_they_were_in_the_text() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "b"}]
    (message,) = conversation(messages=[{"role": "user", "content": parts}]).messages
    assert message.content == ("a", Image(b"picture"), "b")
    assert message.media[0].where == "messages[0].content[1].image_url"


@pytest.mark.parametrize("url", ["http://example.com/a.png", "HTTPS://user@127.1:80\\@a/", "https://"])
def test_a_picture_that_is_elsewhere_is_left_to_who_may_fetch_it(url: str) -> None:
    (message,) = conversation(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]).messages
    assert message.content == (RemoteImage(url),)
    assert message.media[0].where == "messages[0].content[0].image_url"


def test_a_request_has_so_many_pictures_and_no_more() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,YQ=="}}
    clip = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,YQ=="}}
    named = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}

    def ask(*turns: list[dict[str, Any]]) -> int:
        return sum(len(m.media) for m in conversation(messages=[{"role": "user", "content": parts} for parts in turns]).messages)

    assert ask([picture] * 16, [named] * 16) == 32
    assert ask([clip] * 4) == 4
    for turns, param in (
        (([picture] * 16, [named] * 17), "messages[1].content[16].image_url"),
        (([clip] * 5,), "messages[0].content[4].video_url"),
        (([picture], [clip] * 4), "messages[1].content[3].video_url"),
    ):
        with pytest.raises(InvalidField, match="a request has 32 pictures at most") as refused:
            ask(*turns)
        assert refused.value.param == param


def test_a_clip_stands_where_the_client_put_it() -> None:
    url = "data:video/mp4;base64," + base64.b64encode(b"clip").decode()
    parts = [{"type": "text", "text": "a"}, {"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "b"}]
    (message,) = conversation(messages=[{"role": "user", "content": parts}]).messages
    assert message.content == ("a", Video(b"clip", 8), "b")
    assert message.media[0].where == "messages[0].content[1].video_url"
    for num_frames in (1, 32):
        parts[1] = {"type": "video_url", "video_url": {"url": url.replace("mp4", "WebM;codecs=vp8,opus"), "num_frames": num_frames}}
        assert conversation(messages=[{"role": "user", "content": parts}]).messages[0].content[1] == Video(b"clip", num_frames)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.mp4",
        "file:///etc/passwd",
        "data:video/mp4,abc",
        "data:image/png;base64,YQ==",
        "data:;base64,YQ==",
        "data:video/mp4;base64,?",
        f"data:video/mp4;{'a' * 300};base64,YQ==",
        "xdata:video/mp4;base64,YQ==",
        "",
    ],
)
def test_a_clip_that_is_none_is_refused_by_its_field(url: str) -> None:
    with pytest.raises(InvalidField) as refused:
        chat(messages=[{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}])
    assert refused.value.param == "messages[0].content[0].video_url"


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "video_url"}, "video_url"),
        ({"type": "video_url", "video_url": {}}, "video_url.url"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,YQ==", "num_frames": 0}}, "video_url.num_frames"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,YQ==", "num_frames": 33}}, "video_url.num_frames"),
    ],
)
def test_what_is_said_of_a_clip_is_checked(part: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidField) as refused:
        chat(messages=[{"role": "user", "content": [part]}])
    assert refused.value.param == f"messages[0].content[0].{param}"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "http:/a.png",
        " http://a/",
        "data:image/png,abc",
        "data:text/html;base64,YQ==",
        "x",
        "",
    ],
)
def test_a_picture_that_is_none_is_refused_by_its_field(url: str) -> None:
    with pytest.raises(InvalidField) as refused:
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert refused.value.param == "messages[0].content[0].image_url"


def test_the_text_of_a_file_is_read() -> None:
    def content(**file: str) -> Any:
        return conversation(messages=[{"role": "user", "content": [{"type": "file", "file": file}]}]).messages[0].content

    data = base64.b64encode("é".encode()).decode()
    assert content(file_data=data) == content(file_data=f"data:text/plain;base64,{data}") == "é"
    assert content(file_data=data, filename="a.txt") == "a.txt:\né"
    paper = base64.b64encode(b"%PDF-1.7").decode()
    assert content(file_data=paper, filename="a.pdf") == ("a.pdf:\n", Document(b"%PDF-1.7"))
    assert content(file_data=f"data:text/plain;base64,{paper}") == (Document(b"%PDF-1.7"),)
    for wrong in ({"file_id": "x"}, {"file_data": base64.b64encode(b"%PDF\xff").decode()}):
        with pytest.raises(InvalidField, match="file"):
            content(**wrong)


def test_prompts_of_every_kind_are_read() -> None:
    def prompts(prompt: Any) -> tuple[RawPrompt, ...]:
        return read_completion(json.dumps({"model": "m", "prompt": prompt}).encode()).request.prompts  # type: ignore[return-value]

    assert prompts("a") == (RawPrompt("a"),)
    assert prompts(["a", "b"]) == (RawPrompt("a"), RawPrompt("b"))
    assert prompts([1, 2]) == (RawPrompt((1, 2)),)
    assert prompts([[1], [2, 3]]) == (RawPrompt((1,)), RawPrompt((2, 3)))


numbers = st.integers() | st.floats(allow_nan=True) | st.sampled_from([0, 1, -1, 2**63, 10**400, 1e308])
leaves = st.none() | st.booleans() | numbers | st.text() | st.sampled_from(["user", "text", "auto", "function", "m", ""])
KEYS = sorted(
    {*CHAT_FIELDS, *COMPLETION_FIELDS, "role", "content", "type", "text", "function", "name", "tool_calls", "id", "arguments", "$ref"}
)
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), v, max_size=4), max_leaves=12
)
messages = st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("role", "content", "tool_calls", "name", "tool_call_id"), values)), max_size=3
)


def bodies(base: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A good body with some fields replaced by anything."""
    changes = st.dictionaries(st.sampled_from(KEYS) | st.text(), values, max_size=3) | st.fixed_dictionaries({"messages": messages})
    return changes.map(lambda wrong: base | wrong)


@pytest.mark.parametrize(("field", "limit"), [("guided_regex", 4096), ("guided_grammar", 65_536)])
def test_a_form_has_a_length_at_most(field: str, limit: int) -> None:
    assert chat(**{field: "a" * limit}).output is not None
    with pytest.raises(InvalidField) as refused:
        chat(**{field: "a" * (limit + 1)})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "custom"}, "tools[0].custom"),
        ({"type": "function", "custom": {"name": "f"}}, "tools[0].function"),
        ({"type": "custom", "custom": {"name": "f", "format": {"type": "grammar"}}}, "tools[0].custom.format.grammar"),
        ({"type": "custom", "custom": {"name": "a b"}}, "tools[0].custom.name"),
    ],
)
def test_a_tool_that_is_not_whole_is_refused_by_what_is_missing(tool: Any, param: str) -> None:
    with pytest.raises(InvalidField) as refused:
        chat(tools=[tool])
    assert refused.value.param == param


def test_a_call_of_a_custom_tool_comes_back_as_its_text() -> None:
    call: Any = {"id": "c", "type": "custom", "custom": {"name": "f", "input": "a\n"}}
    messages = [CHAT["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    said = conversation(messages=messages, tools=[{"type": "custom", "custom": {"name": "f"}}])
    assert said.messages[1].tool_calls == (ToolCall("c", "f", '{"input": "a\\n"}'),)
    lark = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: A"}}
    read = read_chat(json.dumps(CHAT | {"tools": [{"type": "custom", "custom": {"name": "f", "format": lark}}]}).encode())
    assert read.ignored == ("tools.custom.format",)
    del call["custom"]
    with pytest.raises(InvalidField) as refused:
        conversation(messages=messages)
    assert refused.value.param == "messages[1].tool_calls[0].custom"


@given(bodies(CHAT) | bodies(COMPLETION))
def test_any_object_is_read_or_refused_as_an_invalid_field(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    for read in (read_chat, read_completion):
        with suppress(InvalidField):
            read(raw)


@given(st.binary())
def test_any_bytes_are_read_or_refused_as_an_invalid_field(raw: bytes) -> None:
    with pytest.raises(InvalidField):
        read_chat(raw)
