"""Arguments that go out while they are written: the model's own text, one JSON object at every moment, whatever the pieces."""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.deepseek import DEEPSEEK
from mlx_manager.inference.families.family import ArgumentReader, Family
from mlx_manager.inference.families.glm import GLM
from mlx_manager.inference.families.gptoss import GPT_OSS
from mlx_manager.inference.families.kimi import KIMI
from mlx_manager.inference.families.llama import LLAMA
from mlx_manager.inference.families.minimax import MINIMAX
from mlx_manager.inference.families.mistral import MISTRAL
from mlx_manager.inference.families.pieces import Arguments, Text
from mlx_manager.inference.families.qwen import QWEN, QWEN35
from mlx_manager.inference.families.sections import Splitter
from mlx_manager.inference.families.tool_formats import tagged
from mlx_manager.inference.families.tool_formats.json_arguments import JsonArguments, read_arguments
from mlx_manager.inference.families.tool_formats.parameters import json_value, types_of
from tests.inference.families.test_sections import called, split, told

SPECS = (ToolSpec("get_weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}}), ToolSpec("f"))


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def given_by(reader: ArgumentReader, pieces: Iterable[str]) -> tuple[str, str, int]:
    """What was given, what closes it, and how many characters it accounts for."""
    joined, used = "", 0
    for piece in pieces:
        text, num = reader.read(piece)
        joined, used = joined + text, used + num
        value = json.loads((joined + reader.close()) or "{}")
        assert isinstance(value, dict), "one JSON object at every moment"
    return joined, reader.close(), used


# ---- the text of an object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=5)
CUTS = st.lists(st.integers(0, 300), max_size=20)


@given(value=OBJECTS, escaped=st.booleans(), indent=st.sampled_from([None, 0, 2]), compact=st.booleans(), cuts=CUTS)
@settings(deadline=None)
def test_an_object_comes_out_as_it_was_written(
    value: dict[str, Any], escaped: bool, indent: int | None, compact: bool, cuts: list[int]
) -> None:
    text = json.dumps(value, ensure_ascii=escaped, indent=indent, separators=(",", ":") if compact else None)
    reader = JsonArguments()
    assert given_by(reader, pieces_of(text, cuts)) == (text, "", len(text))
    assert reader.state == "done"


@pytest.mark.parametrize(
    "text",
    ['{"a":1.50,"b" : -0.0 , "c":1e3}', '{"b":1,"a":2,"b":3}', '{"\\u00e9":"\\u00e9\\/é"}', "{\n}", '{"big":12345678901234567890}'],
)
def test_numbers_order_and_escapes_stay_as_the_model_spelt_them(text: str) -> None:
    assert read_arguments(text) == text


def test_what_json_cannot_hold_is_escaped() -> None:
    assert read_arguments('{"a": "x\ny\tz"}') == '{"a": "x\\u000ay\\u0009z"}'
    assert json.loads(read_arguments(r'{"re": "\d+\.\s", "p": "C:\x"}') or "") == {"re": r"\d+\.\s", "p": r"C:\x"}


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", '{"a"}', '{"a":}', '{"a":1,}', '{"a":1 2}', '{"a":[1,]}', '{"a":1]', "{a:1}", '{"a":NaN}', '{"a":1e999}'),
        *('{"a":01}', '{"a":.5}', '{"a":tru}', '{"a": "x', '{"a":"x"}}', '{"a":' * 300 + "1" + "}" * 300, '{"a":' + "9" * 500 + "}"),
    ],
)
def test_what_is_no_object_is_none(text: str) -> None:
    assert read_arguments(text) is None


BITS = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    "\\",
    "\\u12",
    "\\n",
    "\n",
    " ",
    "1",
    "-",
    "1.5e",
    "true",
    "nul",
    "é",
    '"a":',
    '"a": "b"',
    "\x01",
]


@given(bits=st.lists(st.sampled_from(BITS), max_size=30), in_record=st.booleans(), cuts=CUTS)
@settings(max_examples=300, deadline=None)
def test_any_text_in_any_pieces_is_closed_to_the_same_object(bits: list[str], in_record: bool, cuts: list[int]) -> None:
    text = '{"a": ' + "".join(bits)
    whole, chars, cut = (JsonArguments(in_record=in_record) for _ in range(3))
    expected = given_by(whole, [text])
    assert given_by(chars, text) == expected
    assert given_by(cut, pieces_of(text, cuts)) == expected
    assert whole.state == chars.state == cut.state
    assert text.startswith(expected[0]) or "\\" in text or any(c < " " for c in text)


def test_a_string_is_passed_on_letter_by_letter_and_a_number_when_it_has_ended() -> None:
    reader = JsonArguments()
    assert reader.read('{"city')[0] == "{"
    assert reader.read('": "Pa')[0] == '"city": "Pa'
    assert reader.read("r")[0] == "r"
    assert reader.read('is", "days": 1')[0] == 'is"'
    assert reader.read("2")[0] == ""
    assert reader.read("}")[0] == ', "days": 12}'


# ---- values between tags

TAGS = [
    *("<parameter=city>", "<parameter=days>", "<parameter=x>", "</parameter>", "</function>", "<parameter", "\n", "\n\n", " ", "</"),
    *("Paris", "2", '"', "{", "}", '{"a": 1}', "[1, 2]", "True", "null", "é\x01", "<b>", "\\"),
]
TYPED = (ToolSpec("f", parameters={"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),)


@given(bits=st.lists(st.sampled_from(TAGS), max_size=20), cuts=CUTS)
@settings(max_examples=300, deadline=None)
def test_values_between_tags_in_any_pieces_close_to_the_same_object(bits: list[str], cuts: list[int]) -> None:
    text = "<parameter=city>\n" + "".join(bits)
    whole, chars, cut = (tagged.TaggedArguments(tagged.FUNCTION_TAGS, "f", TYPED) for _ in range(3))
    expected = given_by(whole, [text])
    assert given_by(chars, text) == expected
    assert given_by(cut, pieces_of(text, cuts)) == expected
    assert whole.state == chars.state == cut.state


VALUED = [
    ("7", {"type": "integer"}, "7"),
    ("7.50", {"type": "number"}, "7.50"),
    ("007", {"type": "integer"}, '"007"'),
    ("007", {"type": "string"}, '"007"'),
    ("True", {"type": "boolean"}, "true"),
    ("maybe", {"type": "boolean"}, '"maybe"'),
    ("None", {"type": ["string", "null"]}, "null"),
    ("null", {"type": "string"}, '"null"'),
    ("null", {}, "null"),
    ("10", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "10"),
    ("10", {"enum": ["10", "20"]}, '"10"'),
    ("10", {"const": 10}, "10"),
    ('{"b":1, "a":2}', {"type": "object"}, '{"b":1, "a":2}'),
    ("{'b': (1, None)}", {"type": "object"}, '{"b": [1, null]}'),
    ("{'b': {1}}", {"type": "object"}, "\"{'b': {1}}\""),
    ("[1, 2", {"type": "array"}, '"[1, 2"'),
    ("[1, 2]", {"type": "string"}, '"[1, 2]"'),
    (" Paris ", {}, '" Paris "'),
    (" 7 ", {}, "7"),
    ('"Paris"', {}, '"Paris"'),
    ('1, "x": 2', {}, '"1, \\"x\\": 2"'),
    ("1e999", {"type": "number"}, '"1e999"'),
    ("x", True, '"x"'),
    ("x", {"type": 5, "enum": {}}, '"x"'),
]


@pytest.mark.parametrize(("text", "schema", "expected"), VALUED, ids=[f"{t} {s}" for t, s, _ in VALUED])
def test_a_value_is_what_its_schema_says_and_spelt_as_the_model_did(text: str, schema: object, expected: str) -> None:
    tools = (ToolSpec("f", parameters={"properties": {"x": schema}}),)
    assert json_value(text, types_of("f", "x", tools)) == expected
    assert isinstance(json.loads(expected), object)


# ---- in a reply

QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "n": 1.50}}\n</tool_call>'
WRITTEN = [
    (QWEN, QWEN_CALL),
    (QWEN, QWEN_CALL.replace('"name"', '"id": "x", "name"')),
    (QWEN, QWEN_CALL.replace("}}", '}, "id": "x y"}')),
    (LLAMA, '{"name": "get_weather", "parameters": {"city": "Paris", "n": 1.50}}'),
    (LLAMA, '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris", "n": 1.50}}'),
    (LLAMA, '<function=get_weather>{"city": "Paris", "n": 1.50}</function>'),
    (MISTRAL, '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "n": 1.50}'),
    (MISTRAL, '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris", "n": 1.50}'),
    (MISTRAL, '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "n": 1.50}, "id": "abcdefghi"}]'),
    (MISTRAL, '[TOOL_CALLS]{"name": "get_weather", "arguments": {"city": "Paris", "n": 1.50}}'),
    (
        GLM,
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>n</arg_key>\n<arg_value>1.50</arg_value>\n</tool_call>",
    ),
    (
        QWEN35,
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=n>\n1.50\n</parameter>\n</function>\n</tool_call>",
    ),
    (
        MINIMAX,
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="n">1.50</parameter>\n</invoke>\n</minimax:tool_call>',
    ),
    (
        KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "n": 1.50}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    (
        DEEPSEEK,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris", "n": 1.50}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    (DEEPSEEK, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris", "n": 1.50}<｜tool▁call▁end｜>'),
    (GPT_OSS, '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "n": 1.50}<|call|>'),
]  # fmt: skip


@pytest.mark.requirement("ADAPT-07")
@pytest.mark.parametrize(("family", "text"), WRITTEN, ids=[t[:40] for _, t in WRITTEN])
def test_streamed_or_parsed_whole_the_arguments_are_the_same_text(family: Family, text: str) -> None:
    if (its := family.tool_format) is None:
        return  # channels have one way
    section = its.parse(text.removeprefix(its.start).removesuffix(its.end) if its.end else text.removeprefix(its.start), SPECS)
    assert section is not None
    assert [(c.name, c.arguments) for c in section.calls] == called(split(family, text, tools=SPECS))


SEVERAL = [
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {}}] and', 2, "and"),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"arguments": {"b": 2}, "name": "f"}] and', 2, "and"),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "other", "arguments": {}}]', 2, ""),
    (MISTRAL, '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]f[ARGS]{}', 2, ""),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, and', 1, ", and"),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}} ; {"name": "f", "parameters": {}}', 2, ""),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}; {"name": "other", "parameters": {}}', 1, '; {"name": "other", "parameters": {}}'),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}; so', 1, "; so"),
    (QWEN, '<tool_call>{"name": "f", "arguments": {"a": 1}}<tool_call>{"name": "f", "arguments": {}}</tool_call>', 2, ""),
    (QWEN, '<tool_call>{"name": "f", "arguments": {"a": 1}} and so on', 1, "and so on"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "num", "said"), SEVERAL, ids=[t[:80] for _, t, _, _ in SEVERAL])
def test_several_calls_of_a_section_and_what_follows(family: Family, text: str, num: int, said: str) -> None:
    for chunks in ([text], list(text)):
        pieces = split(family, chunks, tools=SPECS)
        assert called(pieces)[0] == ("f", '{"a": 1}')
        assert len(called(pieces)) == num
        assert told(pieces)[0].strip() == said


BROKEN = [
    # where it breaks: the arguments that are given, and what is said
    ('{"city": "Paris", "days": three}}</tool_call>', {"city": "Paris"}, ', "days": three}}</tool_call>'),
    ('{"city": "Paris"; "days": 3}}</tool_call>', {"city": "Paris"}, '; "days": 3}}</tool_call>'),
    ('{"city": ["Paris", }}</tool_call> Sorry.', {"city": ["Paris"]}, ", }}</tool_call> Sorry."),
    ('{"city": Paris}}</tool_call>', {}, '"city": Paris}}</tool_call>'),
    # a brace or two forgotten: nothing is said
    ('{"city": "Paris"}</tool_call>', {"city": "Paris"}, ""),
    ('{"city": "Paris"</tool_call>', {"city": "Paris"}, ""),
    ('{"city": "Paris"}, </tool_call>', {"city": "Paris"}, ", </tool_call>"),
    # cut off: half of something is nothing's
    ('{"city": "Par', {"city": "Par"}, ""),
    ('{"city": "Paris", "da', {"city": "Paris"}, ""),
    ('{"city": "Paris", "days": [1, 2', {"city": "Paris", "days": [1]}, ""),
    ('{"city": "Paris\\', {"city": "Paris"}, ""),
    ('{"city": "Paris"}', {"city": "Paris"}, ""),
    ('{"', {}, ""),
]


@pytest.mark.requirement("14.2")
@pytest.mark.parametrize(("rest", "arguments", "said"), BROKEN, ids=[r[:50] for r, _, _ in BROKEN])
def test_a_call_that_breaks_off_is_closed_and_what_follows_the_break_is_said(rest: str, arguments: dict[str, Any], said: str) -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": ' + rest
    for at in range(len(text) + 1):
        pieces = split(QWEN, [text[:at], text[at:]], tools=SPECS)
        assert told(pieces) == (said, "", [("get_weather", arguments)])
    assert told(split(QWEN, list(text), tools=SPECS))[2] == [("get_weather", arguments)]


@pytest.mark.parametrize(
    "begun", ['{"name": "get_weather", "arguments": ', '{"name": "get_weather", "arguments": {', '{"name": "get_weather", "arguments": {x']
)
def test_what_is_no_call_yet_is_text(begun: str) -> None:
    text = "<tool_call>" + begun
    for chunks in ([text], list(text)):
        assert told(split(QWEN, chunks, tools=SPECS)) == (text, "", [])


def test_arguments_of_any_length_cost_the_same_for_each_piece() -> None:
    splitter = Splitter(QWEN, tools=SPECS)
    splitter.feed('<tool_call>{"name": "f", "arguments": {"text": "')
    for _ in range(20_000):
        (piece,) = splitter.feed("word ")
        assert isinstance(piece, Arguments)
    for unit in ('", "x', "\n", " ", "12"):
        for _ in range(2000):
            splitter.feed(unit)
    assert not any(isinstance(p, Text) and len(p.text) > 20_000 for p in splitter.finish())
