"""Tool calls as grammars, in each format's own spelling. `Format.call` is one call; `Format.rest` what follows the mark that opens one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import ToolFormat
from mlx_manager.inference.families.tool_formats import arg_tags, json_tags, llama_json, mistral, pythonic
from mlx_manager.inference.structured.compiler import json_rule, literal

MarkOf = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """Rules in Lark's notation. `section` is a rule for one section of calls with its marks, `rest` for what follows `opening` in it;
    `opening` is "" where calls have no mark. `separator` stands between sections; None: there is but one."""

    rules: tuple[str, ...]
    section: str
    rest: str
    opening: str
    separator: str | None

    def required(self, *, once: bool) -> str:
        """A reply that is calls and nothing else."""
        more = "" if once or self.separator is None else f" ({literal(self.separator)} section)*"
        return self._lark(f"start: section{more}", f"section: {self.section}")

    def after_opening(self) -> str:
        """What follows the mark that opened a section."""
        return self._lark(f"start: {self.rest}")

    def or_text(self, *, once: bool) -> str:
        """For a format without a mark: text that does not begin as a call would, or calls."""
        more = "" if once or self.separator is None else f" ({literal(self.separator)} section)*"
        return self._lark(f"start: TEXT | section{more}", "TEXT: /[^{\\[<`](.|\\n)*/", f"section: {self.section}")

    def _lark(self, *first: str) -> str:
        return "\n".join((*first, *self.rules))


def call_grammar(tool_format: ToolFormat, tools: Sequence[ToolSpec], mark: MarkOf, vocabulary: Mapping[str, int]) -> CallGrammar | None:
    """The calls of these tools (one at least), or None for a format that cannot be told as a grammar yet."""
    if tool_format is json_tags:
        return _json_tags(tools, mark)
    if tool_format is llama_json:
        return _llama_json(tools)
    if tool_format is mistral:
        return _mistral(tools, mark, named="[ARGS]" in vocabulary)
    if tool_format is arg_tags:
        return _arg_tags(tools, mark)
    if tool_format is pythonic:
        return _pythonic(tools)
    return None


def _json_tags(tools: Sequence[ToolSpec], mark: MarkOf) -> CallGrammar:
    rest = f'"\\n" call "\\n" {mark(json_tags.end)}'
    return CallGrammar(
        rules=_objects(tools, "arguments"), section=f"{mark(json_tags.start)} {rest}", rest=rest, opening=json_tags.start, separator="\n"
    )


def _llama_json(tools: Sequence[ToolSpec]) -> CallGrammar:
    return CallGrammar(rules=_objects(tools, "parameters"), section="call", rest="call", opening="", separator="; ")


def _mistral(tools: Sequence[ToolSpec], mark: MarkOf, *, named: bool) -> CallGrammar:
    if named:
        rules = [f"call: {_alternatives(len(tools))}"]
        for i, tool in enumerate(tools):
            rules += [f"call{i}: {literal(tool.name)} {mark('[ARGS]')} args{i}", f"args{i}: {_arguments(tool)}"]
        return CallGrammar(tuple(rules), f"{mark(mistral.start)} call", "call", mistral.start, "")
    rest = '" "? "[" call (", " call)* "]"'
    return CallGrammar(_objects(tools, "arguments"), f"{mark(mistral.start)} {rest}", rest, mistral.start, None)


def _objects(tools: Sequence[ToolSpec], arguments: str) -> tuple[str, ...]:
    """`call`: `{"name": …, "arguments": {…}}` of any of the tools."""
    rules = [f"call: {_alternatives(len(tools))}"]
    for i, tool in enumerate(tools):
        head = literal(f'{{"name": {literal(tool.name)}, {literal(arguments)}: ')
        rules += [f'call{i}: {head} args{i} "}}"', f"args{i}: {_arguments(tool)}"]
    return tuple(rules)


def _arg_tags(tools: Sequence[ToolSpec], mark: MarkOf) -> CallGrammar:
    rules = [f"call: {_alternatives(len(tools))}"]
    key, key_end, value, value_end = (mark(m) for m in ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"))
    any_character = "(.|\\n)" if value_end.startswith("<[") else "[^<]"  # no text matches a special token
    for i, tool in enumerate(tools):
        pairs: list[str] = []
        for j, (name, schema, is_required) in enumerate(_properties(tool)):
            rules.append(f"value{i}_{j}: {_bare(schema, any_character) or json_rule(schema, strict=tool.strict)}")
            pair = f'{key} {literal(name)} {key_end} "\\n" {value} value{i}_{j} {value_end} "\\n"'
            pairs.append(pair if is_required else f"({pair})?")
        rules.append(f'call{i}: {literal(tool.name)} "\\n" {" ".join(pairs)}')
    rest = f"call {mark(arg_tags.end)}"
    return CallGrammar(tuple(rules), f"{mark(arg_tags.start)} {rest}", rest, arg_tags.start, "\n")


def _bare(schema: Mapping[str, Any], any_character: str) -> str | None:
    """A string without its quotes; None for what is no string, or has to match more than a length."""
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(choices, list) and all(isinstance(c, str) for c in cast(list[object], choices)):
        return " | ".join(literal(c) for c in cast(list[str], choices))
    if schema.get("type") != "string" or not schema.keys() <= _BARE_KEYWORDS:
        return None
    longest = schema.get("maxLength")
    return f"/{any_character}{{{schema.get('minLength', 0)},{'' if longest is None else longest}}}/"


_BARE_KEYWORDS = frozenset({"type", "title", "description", "default", "examples", "minLength", "maxLength"})


def _pythonic(tools: Sequence[ToolSpec]) -> CallGrammar:
    rules = [f"call: {_alternatives(len(tools))}"]
    for i, tool in enumerate(tools):
        properties = _properties(tool)
        for j, (name, schema, _) in enumerate(properties):
            value = '"True" | "False"' if schema.get("type") == "boolean" else json_rule(schema, strict=tool.strict)
            rules += [f"arg{i}_{j}: {literal(name + '=')} value{i}_{j}", f"value{i}_{j}: {value}"]
        given = _in_order([f"arg{i}_{j}" for j in range(len(properties))], [required for _, _, required in properties])
        rules.append(f'call{i}: {literal(tool.name + "(")} ({given}) ")"')
    section = '"[" call (", " call)* "]"'
    return CallGrammar(tuple(rules), section, section, "", None)


def _in_order(names: Sequence[str], required: Sequence[bool]) -> str:
    """`names` in this order with commas between, those that are not required there or not."""
    if not names:
        return '""'
    tail = "".join(f' ", " {n}' if r else f' (", " {n})?' for n, r in zip(names[1:], required[1:], strict=True))
    here = f"{names[0]}{tail}"
    return here if required[0] else f"{here} | {_in_order(names[1:], required[1:])}"


def _alternatives(count: int) -> str:
    return " | ".join(f"call{i}" for i in range(count))


def _arguments(tool: ToolSpec) -> str:
    schema = dict(tool.parameters) or {"type": "object", "properties": {}, "additionalProperties": False}
    return json_rule({"type": "object", **schema}, strict=tool.strict)


def _properties(tool: ToolSpec) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Name, schema and whether it must be given, of each parameter."""
    properties: object = tool.parameters.get("properties")
    required: object = tool.parameters.get("required")
    needed = set(cast(list[str], required)) if isinstance(required, list) else set[str]()
    if not isinstance(properties, Mapping):
        return []
    entries = cast(Mapping[str, object], properties).items()
    return [(name, cast(Mapping[str, Any], schema) if isinstance(schema, Mapping) else {}, name in needed) for name, schema in entries]
