"""Whatever the pieces in which a text comes, it is split the same; for what models of each family write, and for what they should not."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.deepseek import DEEPSEEK
from mlx_manager.inference.families.family import REASONING, THINK, Family, Tag
from mlx_manager.inference.families.gemma import GEMMA, GEMMA4
from mlx_manager.inference.families.glm import GLM
from mlx_manager.inference.families.gptoss import GPT_OSS
from mlx_manager.inference.families.kimi import KIMI
from mlx_manager.inference.families.lfm import LFM
from mlx_manager.inference.families.llama import LLAMA
from mlx_manager.inference.families.longcat import LONGCAT
from mlx_manager.inference.families.minimax import MINIMAX
from mlx_manager.inference.families.mistral import MISTRAL
from mlx_manager.inference.families.pieces import Arguments, CallOpened, Calls, Piece, Reasoning, Text
from mlx_manager.inference.families.qwen import QWEN, QWEN35
from mlx_manager.inference.families.sections import Splitter, splitter_for
from mlx_manager.inference.families.tool_formats import braced, json_tags, tagged
from tests.inference.fixture_models import SHARED

HERMES = Family(name="hermes", model_types=frozenset(), tool_format=json_tags, stop_tokens=("<|im_end|>",))
FUNCTION = replace(GEMMA, tool_format=braced.FUNCTION_GEMMA)
FAMILIES = {
    "qwen3": QWEN,
    "qwen3_coder": QWEN35,
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "gemma-fg": FUNCTION,
    "gemma-g4": GEMMA4,
    "glm4": GLM,
    "deepseek": DEEPSEEK,
    "gptoss": GPT_OSS,
    "kimi": KIMI,
    "minimax": MINIMAX,
    "dsml": replace(DEEPSEEK, tool_format=tagged.DSML),
    "lfm": LFM,
    "longcat": LONGCAT,
    "minicpm": replace(LLAMA, tool_format=tagged.FUNCTION_NAMES),
}
TAGGED = {name: family for name, family in FAMILIES.items() if THINK in family.reasoning_tags}
MARKED = {name: family for name, family in FAMILIES.items() if not family.channels}
BRACKETS = Tag("[THINK]", "[/THINK]")
WEATHER = (ToolSpec("get_weather", parameters={"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),)

Told = tuple[str, str, list[tuple[str, Any]]]
"""What was said, what was thought, what was called."""


def split(family: Family, chunks: Iterable[str], *, tools: Sequence[ToolSpec] = WEATHER, opened: Tag | None = None) -> list[Piece]:
    splitter = splitter_for(family, tools=tools, opened=opened)
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)] + splitter.finish()
    assert sum(piece.num_chars for piece in pieces) == sum(len(chunk) for chunk in chunks), "nothing is lost or made up"
    return pieces


def told(pieces: Iterable[Piece]) -> Told:
    pieces = list(pieces)
    return (
        "".join(p.text for p in pieces if isinstance(p, Text)),
        "".join(p.text for p in pieces if isinstance(p, Reasoning)),
        [(name, json.loads(arguments)) for name, arguments in called(pieces)],
    )


def called(pieces: Iterable[Piece]) -> list[tuple[str, str]]:
    """Names and arguments as text, joined from their pieces."""
    calls: list[tuple[str, str]] = []
    is_open = False
    for piece in pieces:
        match piece:
            case Calls(whole):
                assert not is_open
                calls += [(call.name, call.arguments) for call in whole]
            case CallOpened(name):
                assert not is_open
                calls.append((name, ""))
                is_open = True
            case Arguments(text, _, closes):
                assert is_open
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
                is_open = not closes
            case _:
                assert not is_open, "nothing comes between the pieces of a call"
    return calls


def tell(family: Family, text: str, *, tools: Sequence[ToolSpec] = WEATHER, opened: Tag | None = None) -> Told:
    return told(split(family, [text], tools=tools, opened=opened))


PARIS = ("get_weather", {"city": "Paris"})
ROME = ("get_weather", {"city": "Rome"})
QWEN_PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
QWEN_ROME = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CODER_PARIS = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
MINIMAX_PARIS = '<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n</invoke>\n'
DSML_PARIS = (
    '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
)
KIMI_PARIS = '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>'
GPT_PARIS = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}'
INFINITE = '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>'
MINICPM_PARIS = '<function name="get_weather"><param name="city">Paris</param></function>'
GLM_PARIS = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"

OUTPUTS: list[tuple[Family, str, Told]] = [
    # Reasoning
    (QWEN, "<think>\nHm.\n</think>\n\nYes.", ("Yes.", "Hm.", [])),
    (QWEN, "<think>\n\n</think>\n\nYes.", ("Yes.", "", [])),
    (QWEN, "\n <think>Hm.</think>Yes.", ("Yes.", "Hm.", [])),
    (QWEN, "<think><think>Hm.</think>Yes.", ("Yes.", "Hm.", [])),
    (QWEN, "<think>\n<think>\nHm.</think>Yes.", ("Yes.", "Hm.", [])),
    (QWEN, "<think>Hm. a < b </thin", ("", "Hm. a < b </thin", [])),
    (QWEN, "<think>Hm.", ("", "Hm.", [])),
    (QWEN, "<think>", ("", "", [])),
    (QWEN, "<think></think>", ("", "", [])),
    (QWEN, "<reasoning>Hm.</reasoning> Yes.", ("Yes.", "Hm.", [])),
    (QWEN, "Yes. <think> is a tag.", ("Yes. <think> is a tag.", "", [])),
    (QWEN, "<thinking> is none.", ("<thinking> is none.", "", [])),
    (QWEN, "<thi", ("<thi", "", [])),
    (QWEN, f"<think>Use {QWEN_PARIS}?</think>No.", ("No.", f"Use {QWEN_PARIS}?", [])),
    (MISTRAL, "[THINK]Hm.[/THINK]Yes.", ("Yes.", "Hm.", [])),
    # White space
    (QWEN, "  Yes. \n", ("  Yes. \n", "", [])),
    (QWEN, " \n ", (" \n ", "", [])),
    (QWEN, "", ("", "", [])),
    (QWEN, "<think>a</think>  \n", ("", "a", [])),
    (QWEN, f"Look:\n\n{QWEN_PARIS}\n", ("Look:", "", [PARIS])),
    # Calls
    (QWEN, QWEN_PARIS, ("", "", [PARIS])),
    (QWEN, f"<think>a</think>\n\n{QWEN_PARIS}", ("", "a", [PARIS])),
    (QWEN, f"{QWEN_PARIS}\n{QWEN_ROME}", ("", "", [PARIS, ROME])),
    (QWEN, f"{QWEN_PARIS}{QWEN_PARIS}{QWEN_ROME}", ("", "", [PARIS, PARIS, ROME])),
    (QWEN, f"One: {QWEN_PARIS} two: {QWEN_ROME} done.", ("One: two: done.", "", [PARIS, ROME])),
    (QWEN, QWEN_PARIS.removesuffix("</tool_call>"), ("", "", [PARIS])),
    (QWEN, QWEN_PARIS.removesuffix("</tool_call>") + QWEN_ROME, ("", "", [PARIS, ROME])),
    (
        QWEN,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "a </tool_call> b"}}</tool_call>',
        ("", "", [("get_weather", {"city": "a </tool_call> b"})]),
    ),
    (QWEN, "<tool_call>{'name': 'get_weather', 'arguments': {'city': 'Paris'}}</tool_call>", ("", "", [PARIS])),
    (QWEN, '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', ("", "", [PARIS])),
    (LLAMA, '{"name": "get_weather", "parameters": {"city": "Paris"}}', ("", "", [PARIS])),
    (LLAMA, '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', ("", "", [PARIS])),
    (
        LLAMA,
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "get_weather", "parameters": {"city": "Rome"}}',
        ("", "", [PARIS, ROME]),
    ),
    (LLAMA, '<think>a</think>\n{"name": "get_weather", "parameters": {"city": "Paris"}}', ("", "a", [PARIS])),
    (LLAMA, "<function=get_weather>{\"city\": \"Paris\"}</function>", ("", "", [PARIS])),
    (LLAMA, '{"name": "Alice", "parameters": {}}', ('{"name": "Alice", "parameters": {}}', "", [])),
    (LLAMA, '{"name": "Al', ('{"name": "Al', "", [])),
    (LLAMA, '\n{"nam', ('\n{"nam', "", [])),
    (MISTRAL, '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', ("", "", [PARIS])),
    (MISTRAL, "[TOOL_CALLS] [{'name': 'get_weather', 'arguments': {'city': 'Paris'}}]", ("", "", [PARIS])),
    (MISTRAL, 'Look. [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_weather{"city": "Rome"}', ("Look.", "", [PARIS, ROME])),
    (MISTRAL, "[TOOL_CALLS] is a mark.", ("[TOOL_CALLS] is a mark.", "", [])),
    (GEMMA, '[get_weather(city="Paris"), get_weather(city="Rome")]', ("", "", [PARIS, ROME])),
    (GEMMA, '```tool_code\nget_weather(city="Paris")\n```', ("", "", [PARIS])),
    (GEMMA, "[1, 2, 3]", ("[1, 2, 3]", "", [])),
    (GEMMA, "[see(below)] the note", ("[see(below)] the note", "", [])),
    (GEMMA, "[get_weather(city={1, 2})]", ("[get_weather(city={1, 2})]", "", [])),
    (GEMMA, "[get_weather(**x)]", ("[get_weather(**x)]", "", [])),
    (GEMMA, r'[get_weather(city="\d")]', ("", "", [("get_weather", {"city": r"\d"})])),
    (GLM, GLM_PARIS, ("", "", [PARIS])),
    (GLM, f"\n<think>a</think>\n{GLM_PARIS}\n{GLM_PARIS}", ("", "a", [PARIS, PARIS])),
    (GLM, "<tool_call>get_weather</tool_call>", ("", "", [("get_weather", {})])),
    (
        GLM,
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>a </tool_call> b</arg_value></tool_call>",
        ("", "", [("get_weather", {"city": "a </tool_call> b"})]),
    ),
    # Functions and parameters between tags
    (QWEN35, CODER_PARIS, ("", "", [PARIS])),
    (QWEN35, f"Look.\n{CODER_PARIS}\n{CODER_PARIS}\nThere.", ("Look.\nThere.", "", [PARIS, PARIS])),
    (QWEN35, CODER_PARIS.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"), ("", "", [PARIS])),
    (QWEN35, CODER_PARIS.removesuffix("</tool_call>"), ("", "", [PARIS])),
    (QWEN35, QWEN_PARIS, ("", "", [PARIS])),
    (QWEN35, "<tool_call>\n<function=get_weather>\n</function>\n</tool_call>", ("", "", [("get_weather", {})])),
    (QWEN35, "<tool_call>\n<function=other>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>", ("", "", [("other", {"n": 1})])),
    (QWEN35, CODER_PARIS.replace("Paris", "\na </tool_call> b\n\n"), ("", "", [("get_weather", {"city": "\na </tool_call> b\n\n"})])),
    (QWEN35, "A <function=get_weather> is one.", ("A <function=get_weather> is one.", "", [])),
    (QWEN35, CODER_PARIS.replace("city", "days").replace("Paris", "3"), ("", "", [("get_weather", {"days": 3})])),
    (QWEN35, CODER_PARIS.replace("city", "days").replace("Paris", "many"), ("", "", [("get_weather", {"days": "many"})])),
    (
        FAMILIES["minimax"],
        "<think>a</think>\n\n<minimax:tool_call>\n" + 2 * MINIMAX_PARIS + "</minimax:tool_call>",
        ("", "a", [PARIS, PARIS]),
    ),
    (FAMILIES["minimax"], "<minimax:tool_call> is a tag", ("<minimax:tool_call> is a tag", "", [])),
    (
        FAMILIES["dsml"],
        "Look.\n\n<｜DSML｜function_calls>\n" + 2 * DSML_PARIS + "</｜DSML｜function_calls>",
        ("Look.", "", [("get_weather", {"city": "Paris", "days": 3}), ("get_weather", {"city": "Paris", "days": 3})]),
    ),
    (
        FAMILIES["longcat"],
        "<longcat_think>a</longcat_think><longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
        "<longcat_arg_value>Paris</longcat_arg_value>\n</longcat_tool_call>",
        ("", "a", [PARIS]),
    ),
    (FAMILIES["minicpm"], f"<think>a</think>Look.\n{MINICPM_PARIS}\n{MINICPM_PARIS}", ("Look.", "a", [PARIS, PARIS])),
    (
        FAMILIES["minicpm"],
        MINICPM_PARIS.replace("Paris", "<![CDATA[a </param> & <b>\n]]>").replace("</function>", '<param name="days">3</param></function>'),
        ("", "", [("get_weather", {"city": "a </param> & <b>\n", "days": 3})]),
    ),
    (FAMILIES["minicpm"], MINICPM_PARIS.replace("Paris", "<![CD"), ("", "", [("get_weather", {"city": "<![CD"})])),
    (
        FAMILIES["minicpm"],
        MINICPM_PARIS.replace("city", "days").replace("Paris", "<![CDATA[3]]>"),
        ("", "", [("get_weather", {"days": 3})]),
    ),
    (FAMILIES["minicpm"], MINICPM_PARIS.replace("Paris", "\n<![CDATA[Paris]]>\n"), ("", "", [PARIS])),
    (FAMILIES["minicpm"], MINICPM_PARIS.replace("Paris", "<![CDATA[Paris]]> ") + " There.", (" There.", "", [PARIS])),
    (FAMILIES["minicpm"], MINICPM_PARIS.replace("Paris", "<![CDATA[Paris]]> or so"), (" or so</param></function>", "", [PARIS])),
    (
        FAMILIES["minicpm"],
        MINICPM_PARIS.replace("get_weather", "other").replace("Paris", "<![CDATA[</param></function>]]>"),
        ("", "", [("other", {"city": "</param></function>"})]),
    ),
    (FAMILIES["minicpm"], '<function name="get_weather"></function>', ("", "", [("get_weather", {})])),
    (FAMILIES["minicpm"], "<function name= is how it begins", ("<function name= is how it begins", "", [])),
    (FAMILIES["minicpm"], '<function name="f" is none', ('<function name="f" is none', "", [])),
    # Calls with marks of their own
    (KIMI, f"Look.<|tool_calls_section_begin|>{KIMI_PARIS}{KIMI_PARIS}<|tool_calls_section_end|>", ("Look.", "", [PARIS, PARIS])),
    (KIMI, f"<|tool_calls_section_begin|>{KIMI_PARIS.replace('get_weather', 'other')}", ("", "", [("other", {"city": "Paris"})])),
    (KIMI, f"{KIMI_PARIS} So.", (" So.", "", [PARIS])),
    (LFM, '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>Look.', ("Look.", "", [PARIS])),
    (LFM, '<|tool_call_start|>[get_weather(city={"a": [true, null]})]', ("", "", [("get_weather", {"city": {"a": [True, None]}})])),
    (GEMMA4, "<|tool_call>call:get_weather{city:<|\"|>Paris<|\"|>", ("<|tool_call>call:get_weather{city:<|\"|>Paris<|\"|>", "", [])),
    (GEMMA4, "<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d", ("bd", "ac", [])),
    # Channels
    (GPT_OSS, "Hello", ("Hello", "", [])),
    (GPT_OSS, "", ("", "", [])),
    (GPT_OSS, "a < b <|start", ("a < b <|start", "", [])),
    (GPT_OSS, "<|channel|>analysis<|message|>a<|channel|>final<|message|>b", ("b", "a", [])),
    (GPT_OSS, "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>", ("", "ab", [])),
    (GPT_OSS, "<|channel|>commentary<|message|>Look.<|end|><|start|>assistant" + GPT_PARIS, ("Look.", "", [PARIS])),
    (GPT_OSS, GPT_PARIS.replace("get_weather", "other") + "<|call|>", ("", "", [("other", {"city": "Paris"})])),
    (GPT_OSS, GPT_PARIS.replace('{"city": "Paris"}', "Paris"), (GPT_PARIS.replace('{"city": "Paris"}', "Paris"), "", [])),
    (GPT_OSS, GPT_PARIS.replace('"}', ""), ("", "", [PARIS])),
    (GPT_OSS, GPT_PARIS.replace('"Paris"', '"Paris", x'), (", x}", "", [PARIS])),
    (GPT_OSS, GPT_PARIS.replace('{"city": "Paris"}', ""), ("", "", [("get_weather", {})])),
    # Prose
    *[
        (family, text, (text, "", []))
        for family in (QWEN, GLM, HERMES)
        for text in (
            "Use the <tool_call> tag like this.",
            "Use <tool_call> and </tool_call>, in that order.",
            "<tool_call>",
            "<tool_call> is a tag; </tool_call> closes it.",
            "a <tool_belt and x < y",
            "ends with <tool_",
        )
    ],
    (QWEN, f"Write <tool_call> like this: {QWEN_PARIS}", ("Write <tool_call> like this:", "", [PARIS])),
    (QWEN, f"<tool_call>{{bad}}</tool_call> or {QWEN_PARIS}", ("<tool_call>{bad}</tool_call> or", "", [PARIS])),
    (QWEN, '<tool_call>{"name": 5}</tool_call>', ('<tool_call>{"name": 5}</tool_call>', "", [])),
    (QWEN, INFINITE, (INFINITE, "", [])),
    (QWEN, "<tool_call>" + '{"a":' * 3000, ("<tool_call>" + '{"a":' * 3000, "", [])),
    (QWEN, '<tool_call>{"name": "get_w', ('<tool_call>{"name": "get_w', "", [])),
]  # fmt: skip


@pytest.mark.requirement("ADAPT-06", "ADAPT-07", "14.1", "14.2")
@pytest.mark.parametrize(("family", "text", "expected"), OUTPUTS, ids=[f"{f.name}: {t[:60]}" for f, t, _ in OUTPUTS])
def test_what_a_model_wrote_is_told_apart_wherever_it_is_cut(family: Family, text: str, expected: Told) -> None:
    said, thought, called = tell(family, text)
    assert (said.replace("  ", " "), thought, called) == (expected[0].replace("  ", " "), expected[1], expected[2])
    whole = (said, thought, called)
    for at in range(0, len(text) + 1, max(1, len(text) // 200)):
        assert told(split(family, [text[:at], text[at:]])) == whole
    if len(text) < 1000:
        assert told(split(family, list(text))) == whole


MARKS = [
    "<think>",
    "<function=",
    "<parameter=",
    "</parameter>",
    "<minimax:tool_call>",
    '<invoke name="get_weather">',
    "</invoke>",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<|tool_call_start|>",
    "<start_function_call>",
    "<|tool_call>",
    "<|channel>thought",
    "<channel|>",
    "<|start|>",
    "<|channel|>",
    "<|channel|>analysis<|message|>",
    "<|channel|>commentary to=functions.get_weather<|message|>",
    "<|message|>",
    "<|end|>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<reasoning>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "[THINK]",
    "[/THINK]",
]
PARTS = ["get_weather", "<", "{", "[", "word", "<arg_key>a</arg_key><arg_value>", "</arg_value>"]
BITS = [
    *MARKS,
    *PARTS,
    *(" ", "\n\n", '"', "; ", "```tool_code\n", "\n```"),
    *(CODER_PARIS, MINICPM_PARIS, MINIMAX_PARIS, DSML_PARIS, KIMI_PARIS, GPT_PARIS, "call:get_weather{city:", '<|"|>', "}", '{"'),
    *(QWEN_PARIS, GLM_PARIS, '{"name": "get_weather", "parameters": {}}', '[get_weather(city="x")]'),
    '[{"name": "get_weather", "arguments": {}}]',
]
JUMBLES = st.lists(st.sampled_from(BITS), max_size=10).map("".join)


@pytest.mark.parametrize("opened", [None, THINK], ids=["closed", "opened"])
@pytest.mark.parametrize("name", FAMILIES)
@given(text=JUMBLES, cuts=st.lists(st.integers(0, 200), max_size=12))
@settings(max_examples=100, deadline=None)
def test_any_jumble_in_any_pieces_is_split_the_same_and_loses_nothing(name: str, opened: Tag | None, text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    whole = tell(FAMILIES[name], text, opened=opened)
    assert told(split(FAMILIES[name], [text[a:b] for a, b in pairwise(edges)], opened=opened)) == whole
    assert told(split(FAMILIES[name], list(text), opened=opened)) == whole


@pytest.mark.parametrize("name", FAMILIES)
@given(text=JUMBLES)
@settings(max_examples=50, deadline=None)
def test_without_tools_nothing_is_called_and_no_mark_of_a_call_is_removed(name: str, text: str) -> None:
    said, thought, called = told(split(FAMILIES[name], [text], tools=()))
    assert called == []
    for mark in ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"):
        assert (said + thought).count(mark) >= text.count(mark)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_passed_on_at_once_where_no_mark_can_begin(name: str) -> None:
    splitter = Splitter(FAMILIES[name], tools=WEATHER)
    assert told(splitter.feed("The first words"))[0] == "The first words"
    assert told(splitter.feed(" and more"))[0] == " and more"


@pytest.mark.parametrize("name", TAGGED)
def test_a_prompt_that_opened_the_tag_begins_inside_and_the_tag_may_come_again(name: str) -> None:
    for text in ("Hm.</think>Yes.", "\n<think>\nHm.\n</think>\nYes.", " Hm. </think>\n\nYes."):
        assert tell(FAMILIES[name], text, opened=THINK) == ("Yes.", "Hm.", [])
    assert tell(FAMILIES[name], "Hm.</reasoning>Yes.", opened=REASONING) == ("Yes.", "Hm.", [])


def test_half_a_surrogate_pair_in_arguments_is_still_json_that_can_be_sent() -> None:
    pieces = split(QWEN, ['<tool_call>{"name": "f", "arguments": {"x": "\\ud83d"}}</tool_call>'])
    assert called(pieces) == [("f", '{"x": "\\ud83d"}')]


def test_a_schema_of_the_oddest_kind_does_not_break_a_call() -> None:
    for properties in ({"city": True}, {"city": {"type": ["string", "null"]}}, [], None):
        assert tell(GLM, GLM_PARIS, tools=(ToolSpec("get_weather", parameters={"properties": properties}),)) == ("", "", [PARIS])


REPEATED = ["word ", "<tool_call>{", "x < y ", '<tool_call>{"</tool_call>', "<tool_call>{'", "<tool_call>{'}", QWEN_PARIS + "<tool_call>"]


@pytest.mark.parametrize("unit", REPEATED)
def test_a_long_text_costs_no_more_for_each_piece(unit: str) -> None:
    """Held text does not grow with what was said; a call's may, but it is not looked through again for each piece."""
    splitter = Splitter(QWEN, tools=WEATHER)
    for _ in range(2000):
        splitter.feed(unit)
    splitter.finish()


# ---- what models and documents give

KNOWN_LATER = {
    "llama-json-in-text": "a call without a mark in the middle of prose: found only at the start of a reply",
}


def golden(name: str) -> list[dict[str, Any]]:
    path = SHARED / "data" / "golden" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


RECORDS = [record for name in FAMILIES for record in golden(name)]


def family_of(record: dict[str, Any]) -> Family:
    """Several families of one name are told apart by the ids of their records."""
    return FAMILIES.get(record["id"][:8], FAMILIES[record["family"]])


def tools_of(record: dict[str, Any]) -> tuple[ToolSpec, ...]:
    """Those that the request offered; where the record has none, those that it expects to be called, and another."""
    offered = [ToolSpec(t["function"]["name"], parameters=t["function"].get("parameters", {})) for t in record.get("tools", [])]
    called = [ToolSpec(name) for name in dict.fromkeys(c["name"] for c in record["expect"]["tool_calls"])]
    return tuple(offered or [*called, ToolSpec("another")])


def outcome(record: dict[str, Any], chunks: list[str]) -> dict[str, Any]:
    opened = (BRACKETS if record["family"] == "mistral" else THINK) if record.get("thinking_open") else None
    said, thought, called = told(split(family_of(record), chunks, tools=tools_of(record), opened=opened))
    return {
        "content": said.strip(),
        "reasoning": thought.strip(),
        "tool_calls": [name for name, _ in called],
        "arguments": [arguments for _, arguments in called],
    }


def is_later(record: dict[str, Any]) -> bool:
    return any(record["id"].startswith(known) for known in KNOWN_LATER)


@pytest.mark.requirement("CLEAN-03", "15.6", "ADAPT-06", "ADAPT-07")
@pytest.mark.skipif(not RECORDS, reason="../shared is not there")
@pytest.mark.parametrize("record", RECORDS, ids=[r["id"] for r in RECORDS])
def test_golden_outputs_are_told_apart_in_any_chunking(record: dict[str, Any]) -> None:
    raw = record["raw"]
    for stop in family_of(record).stop_tokens:
        raw = raw.removesuffix(stop)  # the engine ends there and never hands it out
    whole = outcome(record, [raw])
    for at in range(len(raw) + 1):
        assert outcome(record, [raw[:at], raw[at:]]) == whole
    assert outcome(record, list(raw)) == whole
    if "chunks" in record:
        assert outcome(record, record["chunks"]) == whole
    expected = {
        "content": record["expect"]["content"].strip(),
        "reasoning": record["expect"]["reasoning"].strip(),
        "tool_calls": [c["name"] for c in record["expect"]["tool_calls"]],
        "arguments": [c["arguments"] for c in record["expect"]["tool_calls"]],
    }
    lenient = {*record.get("lenient", ())}
    lenient |= {"arguments"} if "tool_calls" in lenient else set()
    strict = [part for part in expected if part not in lenient]
    agrees = {part: whole[part] for part in strict} == {part: expected[part] for part in strict}
    if is_later(record):
        assert not agrees, "it works now: take it off the list"
    else:
        assert {part: whole[part] for part in strict} == {part: expected[part] for part in strict}


THOUGHTFUL = [r for r in RECORDS if r["expect"]["reasoning"] and r["kind"] != "malformed" and not is_later(r)]


@pytest.mark.skipif(not RECORDS, reason="../shared is not there")
@pytest.mark.parametrize("record", THOUGHTFUL, ids=[r["id"] for r in THOUGHTFUL])
def test_golden_reasoning_that_is_cut_anywhere_is_never_content(record: dict[str, Any]) -> None:
    raw, reasoning = record["raw"], record["expect"]["reasoning"]
    begin = raw.find(reasoning)
    for length in range(begin, begin + len(reasoning) + 1):
        result = outcome(record, [raw[:length]])
        assert (result["content"], result["reasoning"]) == ("", raw[begin:length].strip())
