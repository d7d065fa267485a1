"""Messages and tools as the model's own template and tokenizer say; with no control token that a user spelt."""

import copy
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Image, Message, ToolCall
from mlx_manager.core.requests import Conversation, RawPrompt, Reasoning, ToolSpec
from mlx_manager.inference.families import prompt
from mlx_manager.inference.families.detect import detect
from mlx_manager.inference.families.prompt import PromptRenderer
from tests.inference.fixture_models import FAMILIES, SHARED, dialect

WEATHER = ToolSpec(
    "get_weather",
    "The weather in a city",
    {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]},
)
PLAIN = Conversation((Message("system", "Be brief."), Message("user", "Hi, who <b>are</b> you? 2 < 3, 🎉")))
TURNS = Conversation((Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Bye")))
TOOLS = Conversation(
    (
        Message("user", "Weather in Paris?"),
        Message("assistant", "", tool_calls=(ToolCall("abcdefghi", "get_weather", '{"city": "Paris"}'),)),
        Message("tool", '{"sky": "sunny"}', tool_call_id="abcdefghi", name="get_weather"),
    ),
    (WEATHER,),
)


def renderer(family: str) -> PromptRenderer:
    return PromptRenderer(dialect(family).tokenizer, dialect(family).family)


def as_the_template_has_it(family: str, conversation: Conversation) -> list[int]:
    """What the tokenizer itself makes of the same messages."""
    messages: list[dict[str, Any]] = []
    for m in conversation.messages:
        message: dict[str, Any] = {"role": m.role, "content": m.content}
        if m.tool_calls:
            calls = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in m.tool_calls]
            message["tool_calls"] = [{"id": c.id, "type": "function", "function": f} for c, f in zip(m.tool_calls, calls, strict=True)]
        if m.tool_call_id:
            message |= {"tool_call_id": m.tool_call_id, "name": m.name}
        messages.append(message)
    tools = [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)}}
        for t in conversation.tools
    ]
    tokenizer: Any = dialect(family).tokenizer
    enabled = conversation.reasoning.enabled
    options = {} if enabled is None else {"enable_thinking": enabled}
    encoded = tokenizer.apply_chat_template(messages, tools=tools or None, add_generation_prompt=True, tokenize=True, **options)
    return list(encoded["input_ids"] if not isinstance(encoded, list) else encoded)


@pytest.mark.requirement("ADAPT-01", "7.5", "8.5")
@pytest.mark.parametrize("conversation", [PLAIN, TURNS], ids=["plain", "turns"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_prompts_are_what_the_tokenizer_itself_makes_of_them(family: str, conversation: Conversation) -> None:
    assert list(renderer(family).render(conversation).tokens) == as_the_template_has_it(family, conversation)


@pytest.mark.requirement("ADAPT-08", "14.3")
@pytest.mark.parametrize("family", FAMILIES)
def test_tools_calls_and_results_reach_the_prompt_as_the_template_has_them(family: str) -> None:
    assert list(renderer(family).render(TOOLS).tokens) == as_the_template_has_it(family, TOOLS)
    text = renderer(family).text(TOOLS)
    for part in ("get_weather", "Paris", "sunny"):
        assert part in text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinking", [True, False])
def test_the_switch_for_thinking_reaches_templates_that_have_one(family: str, thinking: bool) -> None:
    conversation = Conversation(TURNS.messages, reasoning=Reasoning(enabled=thinking))
    assert list(renderer(family).render(conversation).tokens) == as_the_template_has_it(family, conversation)


# ---- control tokens


def control_tokens(family: str) -> dict[str, int]:
    """Special ones, and those that begin or end a turn whatever the tokenizer calls them."""
    its = dialect(family)
    turns = {*its.family.stop_tokens, *its.family.turn_tokens}
    return {t.content: i for i, t in its.tokenizer.added_tokens_decoder.items() if t.special or t.content in turns}


def num_control_tokens(family: str, conversation: Conversation) -> int:
    control = set(control_tokens(family).values())
    return sum(token in control for token in renderer(family).render(conversation).tokens)


def conversations_with(text: str) -> Iterator[tuple[str, Conversation]]:
    """The same text wherever somebody from outside can put it."""
    call = ToolCall("abcdefghi", "get_weather", json.dumps({"city": text, text: [text]}))
    yield "content", Conversation((Message("user", f"a {text} b{text}"), Message("assistant", text), Message("user", text)))
    yield "system", Conversation((Message("system", text), Message("user", "Hi")))
    yield "name", Conversation((Message("user", "Hi", name=text),))
    yield "reasoning", Conversation((Message("user", "Hi"), Message("assistant", "a", reasoning=text), Message("user", "Hi")))
    yield (
        "tool",
        Conversation((Message("user", "Hi"),), (ToolSpec(f"f{text}", text, {"type": "object", "properties": {text: {"enum": [text]}}}),)),
    )
    for result, arguments in ((text, call.arguments), ("x", "{not json " + text), (text, json.dumps([text]))):
        called = ToolCall(text if result == text else call.id, text, arguments)
        yield (
            "call",
            Conversation(
                (
                    Message("user", "Hi"),
                    Message("assistant", "", tool_calls=(called,)),
                    Message("tool", result, tool_call_id=called.id, name=text),
                ),
                (WEATHER,),
            ),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_control_token_comes_of_what_a_user_spells(family: str) -> None:
    """As many in the prompt as with harmless text in its place."""
    rendered = 0
    for control in control_tokens(family):
        for (place, spelt), (_, harmless) in zip(conversations_with(control), conversations_with("harmless1"), strict=True):
            try:
                expected = num_control_tokens(family, harmless)
            except InvalidField:
                continue  # this template takes no such message
            assert num_control_tokens(family, spelt) == expected, f"{control} in {place}"
            rendered += 1
    assert rendered >= 4 * len(control_tokens(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_trick_puts_a_control_token_together(family: str) -> None:
    for control in control_tokens(family):
        for trick in (
            control * 2,
            control[:2] + control + control[2:],
            control[0] + "\ufdd0" + control[1:],
            control[:1] * 3 + control,
            "\ufdd0".join(control),
        ):
            conversation = Conversation((Message("user", trick),))
            assert num_control_tokens(family, conversation) == num_control_tokens(family, Conversation((Message("user", "x"),)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_token_that_is_spelt_can_still_be_read(family: str) -> None:
    tokenizer = dialect(family).tokenizer
    for control in control_tokens(family):
        tokens = renderer(family).render(Conversation((Message("user", f"What is {control}?"),))).tokens
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert f"What is {control}?" in text.replace("▁", " ")


# ---- what templates do


def with_template(template: str | None, family: str = "qwen3") -> PromptRenderer:
    """A fixture's tokenizer with another template."""
    tokenizer: Any = copy.copy(dialect(family).tokenizer)
    tokenizer.chat_template = template
    return PromptRenderer(tokenizer, detect({"model_type": min(dialect(family).family.model_types)}, template))


THINKING = Conversation((Message("user", "Hi"),), reasoning=Reasoning(enabled=True))


@pytest.mark.requirement("15.3", "CLEAN-02")
@pytest.mark.parametrize(
    "fails",
    ["{{ 1 + 'a' }}", "{{ nothing.at.all }}", "{{ raise_exception('no such switch') }}", "{{ messages[9].content.x }}", "{{ 1 / 0 }}"],
    ids=["TypeError", "UndefinedError", "its own", "another UndefinedError", "ZeroDivisionError"],
)
def test_a_template_that_fails_over_its_switch_renders_without_it(fails: str, caplog: pytest.LogCaptureFixture) -> None:
    template = "{% if enable_thinking is defined %}" + fails + "{% endif %}{{ messages[0].content }}!"
    with caplog.at_level(logging.WARNING):
        assert with_template(template).text(THINKING) == "Hi!"
    assert "enable_thinking" in caplog.text


def test_a_template_that_wants_a_list_of_tools_gets_an_empty_one() -> None:
    assert with_template("{{ tools | length }}{{ messages[0].content }}").text(TURNS) == "0Hi"


def test_a_switch_that_a_template_does_not_know_is_not_passed() -> None:
    assert with_template("{{ messages[0].content }}").text(THINKING) == "Hi"


def test_effort_goes_to_a_template_that_knows_it_and_its_levels() -> None:
    renderer = with_template("{{ reasoning_effort | default('none given') }}")
    levels = {"minimal": "low", "medium": "medium", "max": "high"}
    for effort, level in levels.items():
        assert renderer.text(Conversation(THINKING.messages, reasoning=Reasoning(effort=effort))) == level  # type: ignore[arg-type]
    assert renderer.text(Conversation(THINKING.messages)) == "none given"


def test_a_reply_can_go_on_with_what_the_assistant_has_begun() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    begun = (Message("user", "Hi"), Message("assistant", "Well"))
    assert with_template(template).text(Conversation(begun, continues=True)) == "<user>Hi</><assistant>Well"
    assert with_template(template).text(Conversation(begun)) == "<user>Hi</><assistant>Well</><assistant>"


def test_a_model_that_reads_text_refuses_a_picture_by_its_field() -> None:
    message = Message("user", ("Look: ", Image(b"", "messages[0].content[1].image_url")))
    with pytest.raises(InvalidField) as refused:
        with_template("{{ messages[0].content }}").text(Conversation((message,)))
    assert refused.value.param == "messages[0].content[1].image_url"


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(InvalidField, match=r"Roles must alternate\.") as refused:
        with_template("{{ raise_exception('Roles must alternate.') }}").text(TURNS)
    assert refused.value.param == "messages"


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages | nonsense }}", "{% if %}"])
def test_a_template_that_is_broken_refuses_too(template: str) -> None:
    with pytest.raises(InvalidField, match="chat template"):
        with_template(template).text(TURNS)


def test_a_model_without_a_template_points_to_completions() -> None:
    with pytest.raises(InvalidField, match="/v1/completions"):
        with_template(None).render(TURNS)


@pytest.mark.parametrize(("end", "opened"), [("<think>", "<think>"), ("<think>\n", "<think>"), ("<reasoning>", "<reasoning>"), ("x", None)])
def test_a_tag_that_the_prompt_leaves_open_is_noticed(end: str, opened: str | None) -> None:
    rendered = with_template("{{ messages[0].content }}" + end).render(TURNS)
    assert (rendered.opened and rendered.opened.open) == opened


def test_a_raw_prompt_goes_as_it_is() -> None:
    tokenizer = dialect("qwen3").tokenizer
    assert renderer("qwen3").render(RawPrompt((5, 6))).tokens == (5, 6)
    rendered = renderer("qwen3").render(RawPrompt("<|im_start|>x<think>"))
    assert list(rendered.tokens) == tokenizer.encode("<|im_start|>x<think>", add_special_tokens=True)
    assert rendered.opened is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", ["", " ", "{}", '{"city": "Paris"}', "{broken", '"text"', "[1, 2]", "null", '{"a": "\\ud83d"}'])
def test_arguments_of_any_kind_in_history_render_or_are_refused_by_name(family: str, arguments: str) -> None:
    history = Conversation(
        (
            Message("user", "Hi"),
            Message("assistant", "", tool_calls=(ToolCall("abcdefghi", "get_weather", arguments),)),
            Message("tool", "sunny", tool_call_id="abcdefghi", name="get_weather"),
        ),
        (WEATHER,),
    )
    try:
        outcome = renderer(family).render(history).tokens
    except InvalidField as error:
        outcome = error.param
    assert outcome


def test_several_templates_under_names_are_all_looked_at() -> None:
    templates = {"default": "{{ messages }}", "tool_use": "<tool_call>{{ enable_thinking }}"}
    family = detect({"model_type": "none of ours"}, templates)
    assert family.thinking_option == "enable_thinking"
    assert family.tool_format is not None


@pytest.mark.requirement("ADAPT-04")
def test_ids_of_calls_are_shortened_for_templates_that_take_no_others() -> None:
    """Clients send back the ids that we gave them."""
    long = "call_" + "x" * 24
    called = Message("assistant", "", tool_calls=(ToolCall(long, "get_weather", "{}"), ToolCall("abcdefghi", "get_weather", "{}")))
    results = (Message("tool", "sunny", tool_call_id=long), Message("tool", "dark", tool_call_id="abcdefghi"))
    text = renderer("mistral").text(Conversation((Message("user", "Hi"), called, *results), (WEATHER,)))
    assert long not in text
    assert text.count("abcdefghi") == 2
    (shortened,) = set(re.findall(r'"([A-Za-z0-9]{9})"', text)) - {"abcdefghi", "arguments"}
    assert text.count(shortened) == 2


@pytest.mark.requirement("ADAPT-08")
def test_a_template_that_adds_arguments_to_text_gets_them_as_text(caplog: pytest.LogCaptureFixture) -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls %}{{ 'call ' + c.function.arguments }}{% endfor %}{% endfor %}"
    with caplog.at_level(logging.WARNING):
        assert with_template(template).text(TOOLS) == 'call {"city": "Paris"}'
    assert "arguments as text" in caplog.text


@pytest.mark.parametrize("content", ["message['content']", "message.content"])
def test_a_template_that_looks_for_calls_where_there_is_no_content_finds_them(content: str) -> None:
    template = (
        "{% for message in messages %}{% if message.tool_calls and " + content + " is none %}calls{% endif %}"
        "{% if " + content + " is not none %}{{ '[' + " + content + " + ']' }}{% endif %}{% endfor %}"
    )
    assert with_template(template).text(TOOLS) == '[Weather in Paris?]calls[{"sky": "sunny"}]'


def test_earlier_thoughts_come_in_blocks_for_templates_that_take_such() -> None:
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for block in m.content %}{% if block['type'] == 'thinking' %}[THINK]{{ block['thinking'] }}[/THINK]"
        "{% else %}{{ block['text'] }}{% endif %}{% endfor %}{% endif %};{% endfor %}"
    )
    replies = (Message("assistant", "Yes.", reasoning="Hm."), Message("assistant", "", reasoning="Oh."))
    assert with_template(template).text(Conversation((Message("user", "Hi"), *replies))) == "Hi;[THINK]Hm.[/THINK]Yes.;[THINK]Oh.[/THINK];"


CHANNELS = (
    "{# <|channel|> #}{% for m in messages %}{{ m.role }}:{% if m.thinking and m.content %}{{ raise_exception('both') }}{% endif %}"
    "{% if m.tool_calls %}({{ m.thinking }}){{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %};{% endfor %}"
)


def test_several_calls_come_one_a_message_with_their_results_where_templates_of_channels_show_but_one() -> None:
    calls = tuple(ToolCall(name, name, "{}") for name in "abc")
    results = (Message("tool", "C", tool_call_id="c"), Message("tool", "A", tool_call_id="a"), Message("tool", "?", tool_call_id="z"))
    turn = Message("assistant", "Look.", tool_calls=calls, reasoning="Hm.")
    text = with_template(CHANNELS).text(Conversation((Message("user", "Hi"), turn, *results, Message("user", "So?"))))
    assert text == "user:Hi;assistant:(Hm.\n\nLook.)a;tool:A;assistant:()b;assistant:()c;tool:C;tool:?;user:So?;"


# ---- real templates

FOLDERS = [
    SHARED / "data" / "templates" / name for name in ("llama", "qwen", "mistral", "gemma", "glm", "deepseek", "gptoss", "hermes", "other")
]
TEMPLATES = [path for folder in FOLDERS for path in sorted(folder.glob("*.jinja"))]
WANTS_MORE = {
    "fireworks-ai-llama-3-firefunction-v2": "variables of its own: functions and a date",
}


@pytest.mark.skipif(not TEMPLATES, reason="../shared is not there")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_real_templates_render_a_conversation_and_tools(path: Path) -> None:
    """Or refuse with their own words."""
    renderer = with_template(path.read_text(encoding="utf-8"), "llama")
    if path.stem in WANTS_MORE:
        with pytest.raises(InvalidField, match="refuses these messages"):
            renderer.text(TURNS)
        return
    assert "Bye" in renderer.text(TURNS) or path.stem == "hfjs-HuggingFaceTB-SmolVLM-Instruct", "that one reads content in parts only"
    assert renderer.render(TURNS).tokens
    try:
        text = renderer.text(TOOLS)
    except InvalidField as error:
        text = error.message
    assert "Weather in Paris?" in text or not text.endswith("it failed.") or path.stem == "llama-cpp-deepseek-r1"


def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "TEMPLATE_S", 0.2)
    endless = "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidField, match="took longer") as refused:
        with_template(endless).render(TURNS)
    assert refused.value.param == "messages"


def test_a_template_that_makes_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "MAX_PROMPT_CHARS", 1000)
    with pytest.raises(InvalidField, match="too long"):
        with_template("{{ 'x' * 5000 }}").render(TURNS)
