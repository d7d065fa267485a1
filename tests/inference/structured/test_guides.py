"""Whatever a model would like to say, its reply has the form that was asked for. The model here draws among the allowed tokens."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.events import ChoiceFinished, Event, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart
from mlx_manager.core.messages import Message
from mlx_manager.core.requests import (
    AnyJson,
    Conversation,
    GenerationRequest,
    Grammar,
    JsonSchema,
    OneOf,
    OutputFormat,
    Reasoning,
    Regex,
    ToolChoice,
    ToolSpec,
)
from mlx_manager.inference.dialect import Dialect, Prepared
from mlx_manager.inference.engine.sequence import Constraint, Token
from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats import braced, marked, marked_pythonic, tagged
from tests.inference.fixture_models import FAMILIES, dialect

WEATHER = ToolSpec(
    "get_weather",
    "The weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 1, "maxLength": 8},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
            "exact": {"type": "boolean"},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    strict=True,
)
NOW = ToolSpec("now")
HI = (Message("user", "Hi"),)
MAX_TOKENS = 5000
FREE = ToolChoice()
AS_IT_LIKES = Reasoning()


def prepared(
    family: str,
    *,
    output: OutputFormat | None = None,
    parallel: bool = True,
    tools: Sequence[ToolSpec] = (),
    choice: ToolChoice = FREE,
    reasoning: Reasoning = AS_IT_LIKES,
) -> Prepared:
    conversation = Conversation(HI, tools=tuple(tools), tool_choice=choice, reasoning=reasoning)
    return dialect(family).prepare(GenerationRequest("m", (conversation,), output=output, parallel_tool_calls=parallel))


def constraint_of(ready: Prepared) -> Constraint:
    constraint = ready.specs[0].constraint
    assert constraint is not None
    return constraint


def allowed(family: str, constraint: Constraint) -> list[int]:
    mask = constraint.mask()
    size = dialect(family).vocab_size
    if mask is None:
        return list(range(size))
    return np.nonzero(np.unpackbits(np.frombuffer(mask, np.uint8), count=size, bitorder="little"))[0].tolist()


def reply(family: str, ready: Prepared, seed: int, *, begin: str = "", spoken: Dialect | None = None) -> tuple[str, list[Event]]:
    """What a model that draws evenly among the tokens it may write comes to say, after `begin` if it may."""
    spoken = spoken or dialect(family)
    constraint, reader = constraint_of(ready), spoken.reader(ready, 0)
    draw = random.Random(seed)
    wanted: list[int] = spoken.tokenizer.encode(begin, add_special_tokens=False) if begin else []
    tokens: list[int] = []
    events: list[Event] = []
    while not constraint.is_complete and len(tokens) < MAX_TOKENS:
        may = allowed(family, constraint)
        assert may, "something may always come"
        if wanted:
            token = wanted.pop(0)
            assert token in may, (spoken.decode([token]), spoken.decode(tokens))
        elif set(may) & spoken.stop_tokens and (draw.random() < 0.6 or set(may) <= spoken.stop_tokens):
            break
        else:
            token = draw.choice([t for t in may if t not in spoken.stop_tokens])
        tokens.append(token)
        events += reader.read(Token(0, token))
        assert constraint.accept(token)
    return spoken.decode(tokens), [*events, *reader.finish("stop", at_context_end=False)]


def calls(events: list[Event]) -> list[tuple[str, Any]]:
    names = {e.index: e.name for e in events if isinstance(e, ToolCallStart)}
    arguments = dict.fromkeys(names, "")
    for e in events:
        if isinstance(e, ToolCallDelta):
            arguments[e.index] += e.arguments
    return [(name, json.loads(arguments[i])) for i, name in names.items()]


def text(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta))


def reasoning(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, ReasoningDelta))


NO_REASONING = Reasoning(enabled=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(8))
def test_a_required_call_is_made_and_its_arguments_follow_the_schema(family: str, seed: int) -> None:
    ready = prepared(family, tools=(WEATHER, NOW), choice=ToolChoice("required"), parallel=seed % 2 == 0, reasoning=NO_REASONING)
    written, events = reply(family, ready, seed)
    assert calls(events), written
    for name, arguments in calls(events):
        if name == "get_weather":
            jsonschema.validate(arguments, dict(WEATHER.parameters))
        else:
            assert (name, arguments) == ("now", {})
    assert text(events).strip() == ""
    assert seed % 2 == 0 or len(calls(events)) == 1
    assert isinstance(events[-1], ChoiceFinished)
    assert events[-1].reason == "tool_calls"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_named_call_is_the_one_that_is_made(family: str) -> None:
    for seed in range(4):
        ready = prepared(family, tools=(WEATHER, NOW), choice=ToolChoice("required", ("now",)), reasoning=NO_REASONING)
        assert {name for name, _ in calls(reply(family, ready, seed)[1])} == {"now"}


BEGINNINGS = {
    "qwen3": "<tool_call>",
    "glm4": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "llama": "{",
    "gemma3_text": "[",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_may_call_only_some_tools_calls_only_these(family: str) -> None:
    for seed in range(4):
        ready = prepared(family, tools=(WEATHER, NOW), choice=ToolChoice("auto", ("now",)), parallel=False, reasoning=NO_REASONING)
        assert {name for name, _ in calls(reply(family, ready, seed, begin=BEGINNINGS[family])[1])} == {"now"}


@pytest.mark.parametrize("family", FAMILIES)
def test_strict_tools_are_held_to_their_schemas_when_the_model_decides_to_call(family: str) -> None:
    for seed in range(4):
        ready = prepared(family, tools=(WEATHER,), parallel=False, reasoning=NO_REASONING)
        ((name, arguments),) = calls(reply(family, ready, seed, begin=BEGINNINGS[family])[1])
        assert name == "get_weather"
        jsonschema.validate(arguments, dict(WEATHER.parameters))


@pytest.mark.parametrize("family", FAMILIES)
def test_strict_tools_leave_a_model_free_not_to_call(family: str) -> None:
    ready = prepared(family, tools=(WEATHER,), reasoning=NO_REASONING)
    _, events = reply(family, ready, 0, begin="Hello")
    assert text(events).startswith("Hello")
    assert not calls(events)


@pytest.mark.parametrize("family", ["qwen3", "glm4", "mistral"])
def test_no_call_is_opened_where_none_may_be(family: str) -> None:
    ready = prepared(family, tools=(WEATHER,), choice=ToolChoice("none"), reasoning=NO_REASONING)
    (opening,) = dialect(family).tokenizer.encode(BEGINNINGS[family], add_special_tokens=False)
    assert opening not in allowed(family, constraint_of(ready))


SPELLINGS = {
    "qwen3-coder": Family("", frozenset(), tool_format=tagged.FUNCTION_TAGS),
    "minimax": Family("", frozenset(), tool_format=tagged.MINIMAX),
    "deepseek v3.2": Family("", frozenset(), tool_format=tagged.DSML),
    "longcat": Family("", frozenset(), tool_format=tagged.LONGCAT),
    "minicpm": Family("", frozenset(), tool_format=tagged.FUNCTION_NAMES),
    "deepseek v3.1": Family("", frozenset(), tool_format=marked.DEEPSEEK),
    "kimi": Family("", frozenset(), tool_format=marked.KIMI),
    "lfm": Family("", frozenset(), tool_format=marked_pythonic),
    "gemma 4": Family("", frozenset(), tool_format=braced.GEMMA4),
    "functiongemma": Family("", frozenset(), tool_format=braced.FUNCTION_GEMMA),
    "gpt-oss": Family("", frozenset(), channels=True, reasoning_tags=()),
}
NESTED = ToolSpec(
    "plan",
    None,
    {
        "type": "object",
        "properties": {
            "stops": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3},
            "at": {"type": "object", "properties": {"x": {"type": "number", "minimum": 0, "maximum": 9}}, "required": ["x"]},
        },
        "required": ["stops"],
        "additionalProperties": False,
    },
)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("seed", range(6))
def test_every_spelling_of_a_call_that_is_enforced_is_one_that_is_read(spelling: str, seed: int) -> None:
    """By the tokens of another model: marks are plain text to it, which is the harder case."""
    spoken = replace(dialect("qwen3"), family=SPELLINGS[spelling])
    tools = (WEATHER, NOW) if spelling in ("lfm",) else (WEATHER, NOW, NESTED)
    conversation = Conversation(HI, tools=tools, tool_choice=ToolChoice("required"), reasoning=NO_REASONING)
    ready = spoken.prepare(GenerationRequest("m", (conversation,), parallel_tool_calls=seed % 2 == 0))
    written, events = reply("qwen3", ready, seed, spoken=spoken)
    assert calls(events), written
    for name, arguments in calls(events):
        (tool,) = (t for t in tools if t.name == name)
        jsonschema.validate(arguments, dict(tool.parameters))
    assert not text(events).strip()
    assert seed % 2 == 0 or len(calls(events)) == 1


INPUT: Mapping[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
PATCH = """start: "*** Begin" LF line+ "*** End"
line: /[+-]/ /[a-z <>]{0,6}/ LF
%import common.LF"""


@pytest.mark.parametrize("spelling", ["qwen3", "glm4", "llama", "mistral", *(set(SPELLINGS) - {"gpt-oss"})])
@pytest.mark.parametrize("mode", ["required", "auto"])
def test_the_one_text_of_a_tool_matches_its_regular_expression(spelling: str, mode: Literal["required", "auto"]) -> None:
    family = spelling if spelling in FAMILIES else "qwen3"
    spoken = dialect(family) if spelling in FAMILIES else replace(dialect(family), family=SPELLINGS[spelling])
    pattern = r'(SELECT|select) [a-z/"]{1,5}(\n;)?'
    tool = ToolSpec("query", None, INPUT, form=Regex(pattern))
    for seed in range(3):
        conversation = Conversation(HI, tools=(tool,), tool_choice=ToolChoice(mode), reasoning=NO_REASONING)
        ready = spoken.prepare(GenerationRequest("m", (conversation,), parallel_tool_calls=False))
        if mode == "auto":
            assert constraint_of(ready) is not None
            continue
        written, events = reply(family, ready, seed, spoken=spoken)
        ((_, arguments),) = calls(events)
        assert re.fullmatch(pattern, arguments["input"]), written


@pytest.mark.parametrize("spelling", ["glm4", "qwen3-coder", "minimax", "deepseek v3.2", "longcat", "minicpm"])
def test_the_one_text_of_a_tool_matches_its_grammar_where_calls_hold_plain_text(spelling: str) -> None:
    family = spelling if spelling in FAMILIES else "qwen3"
    spoken = dialect(family) if spelling in FAMILIES else replace(dialect(family), family=SPELLINGS[spelling])
    conversation = Conversation(
        HI, tools=(ToolSpec("patch", None, INPUT, form=Grammar(PATCH)), NOW), tool_choice=ToolChoice("required", ("patch",))
    )
    for seed in range(3):
        ready = spoken.prepare(GenerationRequest("m", (conversation,), parallel_tool_calls=False))
        written, events = reply(family, ready, seed, spoken=spoken)
        ((_, arguments),) = calls(events)
        assert re.fullmatch(r"\*\*\* Begin\n([+-][a-z <>]{0,6}\n)+\*\*\* End", arguments["input"]), written


def test_a_grammar_that_no_call_can_be_held_to_leaves_the_call_free_and_one_that_is_none_is_refused() -> None:
    free = ToolSpec("patch", None, INPUT, form=Grammar("start: ((("))
    assert prepared("qwen3", tools=(free,)).specs[0].constraint is None
    with pytest.raises(InvalidField) as refused:
        prepared("qwen3", tools=(NOW, ToolSpec("query", None, INPUT, form=Regex("((("))))
    assert refused.value.param == "tools: query"


@pytest.mark.parametrize("budget", [None, 3])
def test_a_model_that_writes_on_channels_thinks_first_and_answers_in_its_form(budget: int | None) -> None:
    spoken = replace(dialect("qwen3"), family=SPELLINGS["gpt-oss"])
    request = GenerationRequest(
        "m", (Conversation(HI, reasoning=Reasoning(enabled=True, budget=budget)),), output=JsonSchema(ANSWER_SCHEMA)
    )
    thought = "I think so." if budget is None else ""
    begin = f"<|channel|>analysis<|message|>{thought}" + ("<|end|>" if thought else "")
    _, events = reply("qwen3", spoken.prepare(request), 2, begin=begin, spoken=spoken)
    jsonschema.validate(json.loads(text(events)), ANSWER_SCHEMA)
    assert reasoning(events) == thought if thought else reasoning(events)


def test_a_model_that_writes_on_channels_need_not_think() -> None:
    spoken = replace(dialect("qwen3"), family=SPELLINGS["gpt-oss"])
    request = GenerationRequest("m", (Conversation(HI, reasoning=NO_REASONING),), output=OneOf(("yes", "no")))
    written, events = reply("qwen3", spoken.prepare(request), 2, spoken=spoken)
    assert text(events) in ("yes", "no")
    assert written.startswith("<|channel|>final<|message|>")


def test_tools_are_shown_to_the_model_whether_it_may_call_or_not() -> None:
    free, forbidden = (prepared("qwen3", tools=(WEATHER,), choice=ToolChoice(mode)) for mode in ("auto", "none"))
    assert free.specs[0].prompt == forbidden.specs[0].prompt, "the prefix is the same"


ANSWER_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
        "size": {"type": "number", "minimum": 0, "maximum": 10},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "tags", "size", "inner"],
    "additionalProperties": False,
    "$defs": {"inner": {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"], "additionalProperties": False}},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(10))
def test_an_answer_follows_its_schema(family: str, seed: int) -> None:
    ready = prepared(family, output=JsonSchema(ANSWER_SCHEMA), reasoning=NO_REASONING)
    _, events = reply(family, ready, seed)
    jsonschema.validate(json.loads(text(events)), ANSWER_SCHEMA)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_forms_of_an_answer(family: str) -> None:
    def answer(output: OutputFormat, seed: int) -> str:
        return text(reply(family, prepared(family, output=output, reasoning=NO_REASONING), seed)[1])

    for seed in range(5):
        number = answer(Regex("[1-9][0-9]{2}"), seed)
        assert len(number) == 3
        assert number.isdigit()
        assert answer(OneOf(("yes", "no", "I don't “know”")), seed) in ("yes", "no", "I don't “know”")
        assert answer(Grammar('start: "a" b\nb: "b" | "(" b ")"'), seed).startswith("a")


def test_any_json_is_an_object() -> None:
    ready = prepared("qwen3", output=AnyJson(), reasoning=NO_REASONING)
    assert {dialect("qwen3").decode([t])[:1] for t in allowed("qwen3", constraint_of(ready))} == {"{"}


# ---- reasoning


def test_reasoning_comes_before_the_form_and_is_free() -> None:
    ready = prepared("qwen3", output=JsonSchema(ANSWER_SCHEMA), reasoning=Reasoning(enabled=True))
    _, events = reply("qwen3", ready, 1, begin="<think>\nLet me think {freely}.\n</think>\n\n")
    assert reasoning(events).strip() == "Let me think {freely}."
    jsonschema.validate(json.loads(text(events)), ANSWER_SCHEMA)


def test_a_model_that_thinks_may_answer_at_once_too() -> None:
    ready = prepared("qwen3", output=JsonSchema(ANSWER_SCHEMA), reasoning=Reasoning(enabled=True))
    _, events = reply("qwen3", ready, 1, begin='{"')
    jsonschema.validate(json.loads(text(events)), ANSWER_SCHEMA)


def test_reasoning_cannot_end_a_reply_that_owes_an_answer() -> None:
    constraint = constraint_of(prepared("qwen3", output=AnyJson(), reasoning=Reasoning(enabled=True)))
    (opening,) = dialect("qwen3").tokenizer.encode("<think>", add_special_tokens=False)
    assert constraint.accept(opening)
    may = set(allowed("qwen3", constraint))
    assert not may & dialect("qwen3").stop_tokens
    assert len(may) == dialect("qwen3").vocab_size - len(dialect("qwen3").stop_tokens)


@pytest.mark.parametrize("family", ["qwen3", "glm4"])
@pytest.mark.parametrize("budget", [1, 5])
def test_a_spent_budget_ends_the_thinking_and_not_the_answer(family: str, budget: int) -> None:
    ready = prepared(family, reasoning=Reasoning(enabled=True, budget=budget))
    constraint, spoken = constraint_of(ready), dialect(family)
    opening, closing = (spoken.tokenizer.encode(tag, add_special_tokens=False)[0] for tag in ("<think>", "</think>"))
    if ready.rendered[0].opened is None:
        assert constraint.accept(opening)
    word = spoken.tokenizer.encode("word", add_special_tokens=False)[0]
    for _ in range(budget):
        assert constraint.mask() is None
        assert constraint.accept(word)
    assert allowed(family, constraint) == [closing]
    assert constraint.accept(closing)
    assert constraint.mask() is None, "the answer is free"
    assert not constraint.is_complete


def test_a_reply_that_nothing_was_asked_of_has_no_constraint() -> None:
    for family in FAMILIES:
        assert prepared(family, tools=(NOW,)).specs[0].constraint is None


# ---- what cannot be


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (JsonSchema({"type": "object", "not": {}}), "not"),
        (JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (JsonSchema({"type": "strin"}), "strin"),
        (JsonSchema({"type": "string", "format": "nope"}), "nope"),
        (JsonSchema({"$ref": "#/$defs/none"}), "none"),
        (JsonSchema({"$ref": -(2**63) - 1}), "serializable"),
        (JsonSchema({"type": "string", "maxLength": 2**64}), "serializable"),
        (Regex("(?=a)b"), "look-around"),
        (Regex("("), "regex"),
        (Grammar("start: x"), "x"),
        (Grammar("nonsense ("), "nonsense|expected|Unexpected|at 1"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_reason(output: OutputFormat, told: str) -> None:
    with pytest.raises(InvalidField, match=told) as refused:
        prepared("qwen3", output=output)
    assert refused.value.param == "response_format"
    assert len(refused.value.message) < 600
    assert "\n" not in refused.value.message


TOO_LARGE: dict[str, OutputFormat] = {
    "nested repetition": Regex("(a{1000}){1000}"),
    "optional repetition": Regex("(a?){5000}a{5000}"),
    "many properties": JsonSchema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}),
    "many words": Grammar("start: " + " | ".join(f'"{i} word"' for i in range(4000))),
    "a cycle": JsonSchema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_proves_too_large_only_with_its_first_tokens_is_refused_before_them(name: str) -> None:
    with pytest.raises(InvalidField) as refused:
        prepared("qwen3", output=TOO_LARGE[name])
    assert refused.value.param == "response_format"
    assert "<state>" not in refused.value.message


def branch(kind: str) -> dict[str, Any]:
    properties = {"kind": {"const": kind}, "size": {"type": "integer", "minimum": 0, "maximum": 9}}
    return {"type": "object", "properties": properties, "required": ["kind", "size"], "additionalProperties": False}


@pytest.mark.parametrize(
    "branches",
    [[branch("cat"), branch("dog")], [{"type": "null"}, {"type": "string", "maxLength": 3}], [branch("cat"), {"type": "boolean"}]],
)
def test_one_of_branches_that_exclude_each_other_is_enforced(branches: list[dict[str, Any]]) -> None:
    for seed in range(4):
        _, events = reply("qwen3", prepared("qwen3", output=JsonSchema({"oneOf": branches}), reasoning=NO_REASONING), seed)
        jsonschema.validate(json.loads(text(events)), {"oneOf": branches})


@pytest.mark.parametrize(
    "branches",
    [[{"type": "integer"}, {"type": "number"}], [branch("cat"), branch("cat")], [{"type": "object"}, {"type": "object"}], [{}, {}]],
)
def test_one_of_branches_that_may_overlap_is_refused_unless_it_need_not_be_strict(branches: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidField, match="oneOf"):
        prepared("qwen3", output=JsonSchema({"oneOf": branches}))
    prepared("qwen3", output=JsonSchema({"oneOf": branches}, strict=False))


def test_what_is_not_strict_is_enforced_as_far_as_it_can_be() -> None:
    schema = {"type": "object", "not": {}, "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    _, events = reply("qwen3", prepared("qwen3", output=JsonSchema(schema, strict=False), reasoning=NO_REASONING), 0)
    assert json.loads(text(events)) == {"a": 1}


def test_a_tool_whose_schema_cannot_be_enforced_is_named() -> None:
    bad = ToolSpec("bad_one", None, {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, strict=True)
    with pytest.raises(InvalidField, match="bad_one"):
        prepared("qwen3", tools=(NOW, bad), choice=ToolChoice("required"))


def test_every_reply_to_a_prompt_has_a_constraint_of_its_own() -> None:
    request = GenerationRequest("m", (Conversation(HI, reasoning=NO_REASONING),), output=OneOf(("aa", "bb")), num_replies=2)
    first, second = (spec.constraint for spec in dialect("qwen3").prepare(request).specs)
    assert first is not None
    assert second is not None
    before = second.mask()
    token = allowed("qwen3", first)[0]
    assert first.accept(token)
    assert second.mask() == before
