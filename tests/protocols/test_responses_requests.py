"""What a client of the Responses API sends → what it wants; and the same conversation means the same over chat completions."""

import base64
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import input_token_count_params, response_create_params

from mlx_manager.core.errors import InvalidField, NotFound
from mlx_manager.core.messages import Image, Message, RemoteImage, ToolCall
from mlx_manager.core.requests import AnyJson, Conversation, Grammar, JsonSchema, Reasoning, Regex, ToolChoice, ToolSpec
from mlx_manager.protocols.openai.requests import read_chat
from mlx_manager.protocols.responses import schema
from mlx_manager.protocols.responses.history import Item, Kept, item_of
from mlx_manager.protocols.responses.requests import ResponsesWanted, read_responses
from mlx_manager.protocols.seal import Seal

SEAL = Seal(lambda: bytes(32))
OTHER_SEAL = Seal(lambda: bytes([1]) * 32)
BASE: dict[str, Any] = {"model": "m", "input": "Hello"}
PICTURE = "data:image/png;base64," + base64.b64encode(b"picture").decode()


@dataclass
class Past:
    """What is kept, written down."""

    responses: dict[str, Kept] = field(default_factory=dict)
    items: dict[str, Item] = field(default_factory=dict)

    def response(self, response_id: str) -> Kept | None:
        return self.responses.get(response_id)

    def item(self, item_id: str) -> Item | None:
        return self.items.get(item_id)


def wanted(past: Past | None = None, **fields: Any) -> ResponsesWanted:
    body = {k: v for k, v in (BASE | fields).items() if v is not ...}
    return read_responses(json.dumps(body).encode(), past or Past(), SEAL)


def conversation(past: Past | None = None, **fields: Any) -> Conversation:
    (prompt,) = wanted(past, **fields).request.prompts
    assert isinstance(prompt, Conversation)
    return prompt


def messages(*items: Any, **fields: Any) -> tuple[Message, ...]:
    return conversation(input=list(items), **fields).messages


def refusal(past: Past | None = None, **fields: Any) -> InvalidField:
    with pytest.raises(InvalidField) as refused:
        wanted(past, **fields)
    return refused.value


# ---- the table


def test_every_field_that_the_sdk_documents_has_a_rule() -> None:
    create = response_create_params.ResponseCreateParamsBase.__annotations__.keys() | {"stream"}
    count = input_token_count_params.InputTokenCountParams.__annotations__.keys()
    assert (create | count) - schema.RESPONSES_FIELDS.keys() == set()


def test_what_is_read_is_honoured_and_what_is_honoured_is_read() -> None:
    assert schema.ResponsesRequest.model_fields.keys() == {n for n, rule in schema.RESPONSES_FIELDS.items() if rule.kind == "honoured"}


def test_every_rule_that_takes_something_away_says_why() -> None:
    assert all(rule.note for rule in schema.RESPONSES_FIELDS.values() if rule.kind != "honoured")


@pytest.mark.parametrize("name", [name for name, rule in schema.RESPONSES_FIELDS.items() if rule.kind == "noted"])
def test_what_is_noted_is_named(name: str) -> None:
    for value in ("x", 0, False, [], {"a": 1}):
        assert wanted(**{name: value}).ignored == (name,)
    assert wanted(**{name: None}).ignored == ()


@pytest.mark.parametrize("name", [name for name, rule in schema.RESPONSES_FIELDS.items() if rule.kind == "refused"])
def test_what_is_refused_is_refused_by_name(name: str) -> None:
    refused = refusal(**{name: "x"})
    assert (refused.param, refused.code) == (name, "unsupported_parameter")
    wanted(**{name: None})


@pytest.mark.parametrize("name", schema.ResponsesRequest.model_fields.keys() - {"model", "input"})
def test_null_is_the_same_as_absent(name: str) -> None:
    assert wanted(**{name: None}) == wanted()


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed"])
def test_zero_is_an_answer(name: str) -> None:
    assert getattr(wanted(**{name: 0}).request.sampling, name) == 0
    assert getattr(wanted().request.sampling, name) is None


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"background": True}, "background", "unsupported_value"),
        ({"truncation": "auto"}, "truncation", "unsupported_value"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"input": ...}, "input", "missing_required_parameter"),
        ({"input": 5}, "input", "invalid_type"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"reasoning": {"effort": "lots"}}, "reasoning.effort", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "missing_required_parameter"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "missing_required_parameter"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "missing_required_parameter"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", "missing_required_parameter"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output", "missing_required_parameter"),
        ({"input": [{"type": "compaction_trigger"}]}, "input[0].type", "unsupported_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": [{"type": "function", "name": "f!"}]}, "tools[0].name", "invalid_value"),
        ({"tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "f"}]}, "tools[1].name", "invalid_value"),
    ],
)
def test_mistakes_are_told_by_the_path_that_the_client_wrote(fields: dict[str, Any], param: str, code: str) -> None:
    refused = refusal(**fields)
    assert (refused.param, refused.code) == (param, code), refused.message


# ---- what is said


def test_text_and_an_empty_input_can_be_rendered() -> None:
    assert conversation(input="Hi").messages == (Message("user", "Hi"),)
    for nothing in ("", []):
        assert conversation(input=nothing, max_output_tokens=1).messages == (Message("user", ""),)
    assert messages(instructions="Be kind.") == (Message("system", "Be kind."), Message("user", ""))


def test_messages_of_all_roles_stay_where_they_are() -> None:
    said = messages(
        {"role": "developer", "content": "One."},
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Two."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "a, "}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}, {"type": "refusal", "refusal": " No."}]},
        {"role": "developer", "content": "Three."},
        {"role": "user", "content": "d"},
        instructions="Zero.",
    )
    assert said == (
        Message("system", "Zero."),
        Message("system", "One."),
        Message("system", "Two."),
        Message("user", "a, b"),
        Message("assistant", "c No."),
        Message("system", "Three."),
        Message("user", "d"),
    )


def test_neighbouring_items_of_the_assistant_are_one_turn() -> None:
    said = messages(
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "content": [{"type": "output_text", "text": "Look:"}],
            "status": "completed",
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"b": 1.0}'},
        {"type": "custom_tool_call", "call_id": "c2", "name": "g", "input": 'say "é"'},
        {"type": "function_call_output", "call_id": "c1", "output": "18"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "ok"}]},
    )
    calls = (ToolCall("c1", "f", '{"b": 1.0}'), ToolCall("c2", "g", '{"input": "say \\"é\\""}'))
    assert said == (
        Message("user", "Weather?"),
        Message("assistant", "Look:", reasoning="Hm.", tool_calls=calls),
        Message("tool", "18", tool_call_id="c1"),
        Message("tool", "ok", tool_call_id="c2"),
    )


@pytest.mark.parametrize(
    ("item", "reasoning", "ignored"),
    [
        ({"encrypted_content": SEAL.seal("ours")}, "ours", ()),
        ({"encrypted_content": SEAL.seal("ours"), "summary": [{"type": "summary_text", "text": "other"}]}, "ours", ()),
        (
            {"encrypted_content": OTHER_SEAL.seal("x"), "content": [{"type": "reasoning_text", "text": "y"}]},
            None,
            ("input.encrypted_content",),
        ),
        ({"encrypted_content": "gAAAA", "content": [{"type": "reasoning_text", "text": "y"}]}, "y", ("input.encrypted_content",)),
        ({"encrypted_content": "gAAAA", "summary": []}, None, ("input.encrypted_content",)),
        ({"summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}], "content": None}, "a\n\nb", ()),
        ({"summary": [{"type": "summary_text", "text": "a"}], "content": [{"type": "reasoning_text", "text": "c"}]}, "c", ()),
    ],
)
def test_reasoning_comes_back_as_far_as_it_can_be_read(item: Any, reasoning: str | None, ignored: tuple[str, ...]) -> None:
    items = [{"type": "reasoning", "id": "rs_1", **item}, {"role": "assistant", "content": "Yes."}]
    read = wanted(input=items)
    (prompt,) = read.request.prompts
    assert isinstance(prompt, Conversation)
    assert prompt.messages == (Message("assistant", "Yes.", reasoning=reasoning),)
    assert read.ignored == ignored


def test_shells_and_patches_are_calls_with_results() -> None:
    said = messages(
        {"type": "local_shell_call", "id": "l", "call_id": "c1", "action": {"type": "exec", "command": ["ls"], "env": {}, "user": None}},
        {"type": "local_shell_call_output", "id": "c1", "output": "a.txt"},
        {"type": "shell_call", "call_id": "c2", "action": {"commands": ["ls"]}},
        {"type": "shell_call_output", "call_id": "c2", "output": [{"stdout": "b", "stderr": ""}]},
        {"type": "apply_patch_call", "call_id": "c3", "status": "completed", "operation": {"type": "delete_file", "path": "a"}},
        {"type": "apply_patch_call_output", "call_id": "c3", "status": "failed"},
    )
    assert [c for m in said for c in m.tool_calls] == [
        ToolCall("c1", "local_shell", '{"command": ["ls"], "env": {}}'),
        ToolCall("c2", "shell", '{"commands": ["ls"]}'),
        ToolCall("c3", "apply_patch", '{"type": "delete_file", "path": "a"}'),
    ]
    assert [(m.tool_call_id, m.content) for m in said if m.role == "tool"] == [
        ("c1", "a.txt"),
        ("c2", '[{"stdout": "b", "stderr": ""}]'),
        ("c3", "failed"),
    ]


def test_pictures_stay_where_they_were_in_the_text_of_users_and_tools() -> None:
    parts = [
        {"type": "input_text", "text": "a"},
        {"type": "input_image", "image_url": PICTURE, "detail": "auto"},
        {"type": "input_text", "text": "b"},
    ]
    said = messages({"role": "user", "content": parts}, {"type": "function_call_output", "call_id": "c", "output": parts})
    assert [m.content for m in said] == [("a", Image(b"picture"), "b")] * 2
    assert [m.media[0].where for m in said] == ["input[0].content[1].image_url", "input[1].output[1].image_url"]
    refused = refusal(input=[{"role": "developer", "content": parts}])
    assert refused.param == "input[0].content[1].type"


def test_a_request_has_so_many_pictures_and_no_more() -> None:
    parts = [{"type": "input_image", "image_url": PICTURE}] * 32
    assert len(conversation(input=[{"role": "user", "content": parts}]).messages[0].media) == 32
    refused = refusal(input=[{"role": "user", "content": parts}, {"role": "user", "content": parts}])
    assert (refused.param, refused.code) == ("input[1].content[0].image_url", "invalid_value")
    assert "32 pictures at most" in refused.message


def test_a_picture_that_is_elsewhere_is_left_to_who_may_fetch_it() -> None:
    parts = [{"type": "input_image", "image_url": "https://example.com/a.png"}]
    (message,) = conversation(input=[{"role": "user", "content": parts}]).messages
    assert message.content == (RemoteImage("https://example.com/a.png"),)
    assert message.media[0].where == "input[0].content[0].image_url"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "data:image/png,abc", "data:text/html;base64,YQ==", "x", "", None])
def test_a_picture_that_is_none_is_refused_in_the_words_that_codex_looks_for(url: str | None) -> None:
    refused = refusal(input=[{"role": "user", "content": [{"type": "input_image", "image_url": url}]}])
    assert (refused.param, refused.code) == ("input[0].content[0].image_url", "invalid_value")


def test_the_text_of_a_file_is_read() -> None:
    data = base64.b64encode("é".encode()).decode()
    file = {"type": "input_file", "filename": "a.txt", "file_data": f"data:text/plain;base64,{data}"}
    assert messages({"role": "user", "content": [file]})[0].content == "a.txt:\né"
    for wrong in ({"file_id": "x"}, {"file_url": "http://a"}, {"file_data": base64.b64encode(b"%PDF\xff").decode()}):
        assert refusal(input=[{"role": "user", "content": [{"type": "input_file", **wrong}]}]).param == "input[0].content[0].file_data"


def test_what_nobody_here_reads_is_rendered_as_nothing_and_named() -> None:
    read = wanted(
        input=[
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
            {"type": "compaction", "encrypted_content": "x"},
            {"type": "never_heard_of", "x": {"y": 1}},
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}, {"type": "hologram", "data": 1}], "mood": "good"},
        ],
        include=["reasoning.encrypted_content", "web_search_call.action.sources"],
        top_logprobs=2,
        text={"verbosity": "low"},
        reasoning={"context": "auto", "effort": "low"},
        client_metadata={},
    )
    assert read.request.prompts[0].messages == (Message("user", "Hi"),)  # type: ignore[union-attr]
    assert set(read.ignored) == {
        "client_metadata",
        "input.mood",
        "text.verbosity",
        "reasoning.context",
        "top_logprobs",
        "include.web_search_call.action.sources",
        "input.web_search_call",
        "input.compaction",
        "input.never_heard_of",
        "input.content.hologram",
    }


# ---- what was said before


def kept(*pairs: tuple[dict[str, Any], dict[str, Any]]) -> Past:
    given, made = [item_of(g) for g, _ in pairs], [item_of(m) for _, m in pairs]
    return Past({"resp_1": Kept({"id": "resp_1"}, tuple(given), tuple(made), 0, 0.0)}, {i.id: i for i in (*given, *made)})


TURN = kept(
    (
        {"id": "msg_1", "type": "message", "role": "user", "content": "My name is Bob."},
        {
            "id": "msg_2",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Hi, Bob!"}],
        },
    )
)


def test_a_response_goes_on_where_an_earlier_one_ended_without_its_instructions() -> None:
    read = wanted(TURN, input="Who am I?", previous_response_id="resp_1", instructions="Be brief.")
    assert read.request.prompts[0].messages == (  # type: ignore[union-attr]
        Message("system", "Be brief."),
        Message("user", "My name is Bob."),
        Message("assistant", "Hi, Bob!"),
        Message("user", "Who am I?"),
    )
    assert [isinstance(item, Item) for item in read.items] == [True, True, False]
    assert len(conversation(TURN, input=..., previous_response_id="resp_1").messages) == 2


@pytest.mark.parametrize("reference", [{"type": "item_reference", "id": "msg_2"}, {"id": "msg_2"}, {"type": None, "id": "msg_2"}])
def test_an_item_can_be_named_by_its_id(reference: dict[str, Any]) -> None:
    assert conversation(TURN, input=[reference, {"role": "user", "content": "x"}]).messages[0] == Message("assistant", "Hi, Bob!")


def test_what_is_not_kept_is_told_in_the_words_that_clients_look_for() -> None:
    refused = refusal(previous_response_id="resp_9")
    assert (refused.message, refused.param, refused.code) == (
        "Previous response with id 'resp_9' not found.",
        "previous_response_id",
        "previous_response_not_found",
    )
    with pytest.raises(NotFound) as missing:
        wanted(input=[{"type": "item_reference", "id": "msg_9"}])
    assert (missing.value.message, missing.value.param) == ("Item with id 'msg_9' not found.", "input")


# ---- tools

F = {"type": "function", "name": "f", "description": "Does f", "parameters": {"type": "object"}, "strict": True}
G = {"type": "custom", "name": "g", "description": "Takes text"}
SPACE = {
    "type": "namespace",
    "name": "crm",
    "description": "Customers",
    "tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "h"}],
}


def test_tools_of_all_kinds_are_functions_to_the_model_and_keep_their_names() -> None:
    read = wanted(tools=[F, G, SPACE, {"type": "web_search", "filters": {}}, {"type": "local_shell"}])
    (prompt,) = read.request.prompts
    assert isinstance(prompt, Conversation)
    f, g, crm_f, crm_h = prompt.tools
    assert f == ToolSpec("f", "Does f", {"type": "object"}, strict=True)
    assert (g.name, g.description, g.parameters["required"], g.strict) == ("g", "Takes text", ["input"], False)
    assert (crm_f.name, crm_f.description, crm_h.name, crm_h.description) == ("crm.f", "Customers", "crm.h", None)
    assert {name: (t.kind, t.namespace, t.name) for name, t in read.tools.items()} == {
        "f": ("function", None, "f"),
        "g": ("custom", None, "g"),
        "crm.f": ("function", "crm", "f"),
        "crm.h": ("custom", "crm", "h"),
        "h": ("custom", "crm", "h"),  # nobody else has that name
    }
    assert [tool["type"] for tool in read.given["tools"]] == ["function", "custom", "namespace"]
    assert read.ignored == ("tools.web_search", "tools.local_shell")


def test_the_grammar_of_a_custom_tool_is_told_to_the_model_and_named_because_few_are_held_to_it() -> None:
    read = wanted(tools=[{**G, "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"}}])
    assert "start: /a+/" in (read.request.prompts[0].tools[0].description or "")  # type: ignore[union-attr]
    assert read.ignored == ("tools.format",)
    assert wanted(tools=[{**G, "format": {"type": "text"}}]).ignored == ()
    assert read.request.prompts[0].tools[0].form == Grammar("start: /a+/")  # type: ignore[union-attr]


def test_the_regular_expression_of_a_custom_tool_is_asked_for() -> None:
    read = wanted(tools=[{**G, "format": {"type": "grammar", "syntax": "regex", "definition": "a+"}}])
    assert read.request.prompts[0].tools[0].form == Regex("a+")  # type: ignore[union-attr]
    assert read.ignored == ()
    for name in ("syntax", "definition"):
        format = {"type": "grammar", "syntax": "regex", "definition": "a+", name: None}
        assert refusal(tools=[{**G, "format": format}]).param == f"tools[0].format.{name}"


def test_tools_that_come_with_the_input_are_added_once() -> None:
    more = {"type": "additional_tools", "role": "developer", "tools": [F, {"type": "function", "name": "k"}]}
    found = {"type": "tool_search_output", "call_id": "s", "status": "completed", "tools": [SPACE, {"type": "mcp", "server_label": "x"}]}
    search = {"type": "tool_search_call", "call_id": "s", "arguments": {"query": "crm"}}
    read = wanted(tools=[F], input=[more, search, found, {"role": "user", "content": "Hi"}])
    (prompt,) = read.request.prompts
    assert isinstance(prompt, Conversation)
    assert [t.name for t in prompt.tools] == ["f", "k", "crm.f", "crm.h"]
    assert [m.role for m in prompt.messages] == ["assistant", "user"]
    assert len(read.given["tools"]) == 1
    assert read.ignored == ("tools.mcp",)


def test_a_call_of_a_namespace_is_the_model_s_own_name_in_history() -> None:
    call = {"type": "function_call", "call_id": "c", "namespace": "crm", "name": "f", "arguments": "{}"}
    assert messages(call)[0].tool_calls == (ToolCall("c", "crm.f", "{}"),)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "f"}, ToolChoice("required", ("f",))),
        ({"type": "function", "name": "f", "namespace": "crm"}, ToolChoice("required", ("crm.f",))),
        ({"type": "custom", "name": "g"}, ToolChoice("required", ("g",))),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}, {"type": "mcp"}]},
            ToolChoice("auto", ("f",)),
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}, ToolChoice("auto", ())),
    ],
)
def test_every_choice_among_tools_is_read(given: Any, chosen: ToolChoice) -> None:
    read = wanted(tools=[F, G, SPACE], tool_choice=given)
    assert read.request.prompts[0].tool_choice == chosen  # type: ignore[union-attr]
    assert read.given["tool_choice"] == ("auto" if given is None else given)


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([], "required", "tool_choice"),
        ([{"type": "web_search"}], "required", "tool_choice"),
        ([{"type": "web_search"}], {"type": "web_search"}, "tool_choice"),
        ([F], {"type": "mcp", "server_label": "x"}, "tool_choice"),
        ([F], {"type": "function", "name": "x"}, "tool_choice.name"),
        ([F], {"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp"}]}, "tool_choice.tools"),
        ([F], {"type": "allowed_tools", "mode": "auto", "tools": [{}]}, "tool_choice.tools"),
        ([F], {"type": "function"}, "tool_choice"),
        ([F], "sometimes", "tool_choice"),
    ],
)
def test_a_choice_of_what_is_not_there_is_refused(tools: list[Any], choice: Any, param: str) -> None:
    assert refusal(tools=tools, tool_choice=choice).param == param


# ---- how it is to be answered


def test_forms_of_an_answer_are_read() -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
    read = wanted(text={"format": form})
    assert (read.request.output, read.request.output_field) == (JsonSchema({"type": "object"}), "text.format.schema")
    assert read.given["text"]["format"] == {**form, "description": None}
    assert wanted(text={"format": {"type": "json_object"}}).request.output == AnyJson()
    assert wanted(text={"format": {"type": "text"}}).request.output is None


def test_what_is_said_of_reasoning_is_read() -> None:
    read = wanted(reasoning={"effort": "low", "summary": "auto"}, thinking_budget=7)
    assert read.request.prompts[0].reasoning == Reasoning(effort="low", budget=7)  # type: ignore[union-attr]
    assert read.summarises
    assert wanted(reasoning={"generate_summary": "auto"}).summarises
    assert not wanted(reasoning={"effort": "low"}).summarises
    assert read.without_effect(("effort", "budget")) == ("reasoning.effort", "thinking_budget")


def test_log_probabilities_are_given_to_who_includes_them() -> None:
    included = ["message.output_text.logprobs"]
    assert wanted(top_logprobs=3).request.num_top_logprobs is None
    assert wanted(include=included).request.num_top_logprobs == 0
    assert wanted(include=included, top_logprobs=3).request.num_top_logprobs == 3


# ---- the same over chat completions

texts = st.text(max_size=8)
calls = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("fg"), "arguments": st.dictionaries(texts, texts, max_size=2).map(json.dumps)}),
    max_size=2,
)
parts = st.one_of(texts.map(lambda t: ("text", t)), st.just(("image", PICTURE)))


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A conversation in neither wire's words: nobody is the assistant twice in a row, and an assistant's turn has something in it."""
    said: list[dict[str, Any]] = []
    for n in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["system", "user", "parts", "assistant"]))
        if kind == "assistant" and said and said[-1]["kind"] == "assistant":
            kind = "user"
        if kind == "assistant":
            turn = {"kind": kind, "reasoning": draw(st.none() | texts), "text": draw(st.none() | texts), "calls": draw(calls)}
            if turn["reasoning"] is None and not turn["calls"] and turn["text"] is None:
                turn["text"] = "yes"
            turn["calls"] = [{"id": f"call_{n}_{i}", **call} for i, call in enumerate(turn["calls"])]
            said.append(turn)
            said += [{"kind": "result", "id": call["id"], "text": draw(texts)} for call in turn["calls"]]
        elif kind == "parts":
            said.append({"kind": kind, "parts": draw(st.lists(parts, max_size=3))})
        else:
            said.append({"kind": kind, "text": draw(texts)})
    return said


def as_chat(turn: dict[str, Any]) -> dict[str, Any]:
    match turn["kind"]:
        case "parts":
            written = {
                "text": lambda value: {"type": "text", "text": value},
                "image": lambda value: {"type": "image_url", "image_url": {"url": value}},
            }
            return {"role": "user", "content": [written[kind](value) for kind, value in turn["parts"]]}
        case "assistant":
            made = [
                {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in turn["calls"]
            ]
            return {"role": "assistant", "content": turn["text"], "reasoning_content": turn["reasoning"], "tool_calls": made}
        case "result":
            return {"role": "tool", "tool_call_id": turn["id"], "content": turn["text"]}
        case role:
            return {"role": role, "content": turn["text"]}


def as_items(turn: dict[str, Any], *, sealed: bool) -> list[dict[str, Any]]:
    match turn["kind"]:
        case "parts":
            written = {
                "text": lambda value: {"type": "input_text", "text": value},
                "image": lambda value: {"type": "input_image", "image_url": value},
            }
            return [{"role": "user", "content": [written[kind](value) for kind, value in turn["parts"]]}]
        case "assistant":
            items: list[dict[str, Any]] = []
            if turn["reasoning"] is not None:
                hidden = {"encrypted_content": SEAL.seal(turn["reasoning"])}
                shown = {"content": [{"type": "reasoning_text", "text": turn["reasoning"]}]}
                items.append({"type": "reasoning", "summary": [], **(hidden if sealed else shown)})
            if turn["text"] is not None:
                items.append({"role": "assistant", "content": [{"type": "output_text", "text": turn["text"]}]})
            calls = [{"type": "function_call", "call_id": c["id"], "name": c["name"], "arguments": c["arguments"]} for c in turn["calls"]]
            return items + calls
        case "result":
            return [{"type": "function_call_output", "call_id": turn["id"], "output": turn["text"]}]
        case role:
            return [{"role": role, "content": turn["text"]}]


@given(turns(), st.booleans(), st.booleans(), st.booleans())
def test_the_same_conversation_is_the_same_over_both_wires(
    said: list[dict[str, Any]], with_tools: bool, as_instructions: bool, sealed: bool
) -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}, "strict": False}
    first = said[0]["text"] if as_instructions and said[0]["kind"] == "system" and len(said) > 1 else None
    items = [item for turn in (said if first is None else said[1:]) for item in as_items(turn, sealed=sealed)]
    chat: dict[str, Any] = {"model": "m", "messages": [as_chat(turn) for turn in said], "reasoning_effort": "low"}
    responses: dict[str, Any] = {"input": items, "instructions": first, "reasoning": {"effort": "low"}}
    if with_tools:
        chat |= {"tools": [{"type": "function", "function": function}], "tool_choice": "none"}
        responses |= {"tools": [{"type": "function", **function}], "tool_choice": "none"}
    (expected,) = read_chat(json.dumps(chat).encode()).request.prompts
    assert conversation(**responses) == expected


# ---- nonsense

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0, 1, -1, 2**63, 10**400])
leaves = (
    st.none() | st.booleans() | numbers | st.text(max_size=4) | st.sampled_from(["user", "input_text", "message", "reasoning", "m", ""])
)
KEYS = sorted(
    {
        "type",
        "role",
        "content",
        "text",
        "name",
        "tools",
        "call_id",
        "arguments",
        "output",
        "id",
        "summary",
        "image_url",
        "function",
        "input",
    }
)
KINDS = sorted({*schema._KINDS_OF_ITEM, "function", "custom", "namespace", "web_search", "compaction_trigger", "input_image", "input_file"})
values = st.recursive(
    leaves | st.sampled_from(KINDS),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), v, max_size=4),
    max_leaves=10,
)
things = st.builds(lambda kind, rest: {**rest, "type": kind}, st.sampled_from(KINDS), st.dictionaries(st.sampled_from(KEYS), values))
bodies = st.dictionaries(
    st.sampled_from(sorted(schema.RESPONSES_FIELDS)) | st.text(max_size=4), values, max_size=3
) | st.fixed_dictionaries({}, optional={"input": st.lists(things, max_size=3), "tools": st.lists(things, max_size=3)})


@given(bodies)
def test_any_object_is_read_or_refused(body: dict[str, Any]) -> None:
    with suppress(InvalidField, NotFound):
        read_responses(json.dumps(BASE | body).encode(), TURN, SEAL)
